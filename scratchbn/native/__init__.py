"""The compiled kernel: C++ source, built with the machine's compiler and loaded into MXNet.

It is never required. ``operator.cc`` registers one operator through MXNet's extension interface
(``mxnet/lib_api.h``, which the wheel brings); ``batch_norm.h`` is what it computes. The library is
kept in the cache directory under a name made of MXNet's version, the sources and the compiler
flags, so that a change of any of them leads to a new one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from ..environment.prepare import mxnet_distributions

__all__ = ["BackendError", "available", "build", "compiler", "facts", "library_path", "load"]

_HERE = Path(__file__).resolve().parent
_SOURCES = ("operator.cc", "batch_norm.h")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
# The instruction set that compilers call x86-64-v3, in words that older compilers know too.
_X86_64_V3 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c")
_X86_64_V3_FEATURES = {"avx2", "fma", "bmi1", "bmi2", "f16c"}
_COMPILERS = ("c++", "g++", "clang++")

_lock = threading.RLock()
_state: dict[str, Any] = {"loaded": None, "problem": None}


class BackendError(RuntimeError):
    """The compiled kernel cannot be built, loaded or used; the text says why and what to do."""


def compiler() -> str | None:
    """Return the C++ compiler to build with: that of the variable CXX, else the first found.

    Returns
    -------
    str or None
        Its path; None if there is none.
    """
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)


def library_path() -> Path:
    """Return where the library for this MXNet, this source and this processor is, or would be.

    Returns
    -------
    Path
        In the directory that the variable SCRATCHBN_CACHE names, else in the user's cache.

    Raises
    ------
    BackendError
        If the headers of MXNet's extension interface are not there.
    """
    digest = hashlib.sha256()
    for source in (*(_HERE / name for name in _SOURCES), *_interface()):
        digest.update(source.read_bytes())
    digest.update(" ".join(_flags()).encode())
    version = "-".join(mxnet_distributions().values()) or "source"
    return _cache_directory() / f"batch_norm-mxnet-{version}-{digest.hexdigest()[:16]}.so"


def build(force: bool = False) -> Path:
    """Compile the kernel, unless it is there already.

    Parameters
    ----------
    force : bool
        Compile even if it is.

    Returns
    -------
    Path
        The library.

    Raises
    ------
    BackendError
        If there is no compiler, or it fails; the text holds what it printed.
    """
    path = library_path()
    if path.exists() and not force:
        return path
    command = compiler()
    if command is None:
        raise BackendError(_no_compiler())
    header, source = _interface()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as directory:
            built = Path(directory, path.name)
            sources = [str(_HERE / "operator.cc"), str(source)]
            include = ["-isystem", str(header.parents[1])]
            child = subprocess.run(
                [command, *_flags(), *include, *sources, "-o", str(built)],
                capture_output=True,
                text=True,
            )
            if child.returncode:
                raise BackendError(f"{command} could not build the kernel:\n{child.stderr.strip()}")
            os.replace(built, path)
    except OSError as error:
        raise BackendError(f"the kernel could not be written to {path}: {error}") from error
    with _lock:
        _state["problem"] = None
    return path


def load() -> None:
    """Load the library into MXNet, once in a process; build it first if need be.

    Raises
    ------
    BackendError
        If it cannot be built or loaded.
    """
    with _lock:
        if _state["loaded"] is None:
            _load(build())


def available() -> bool:
    """Load the library if it has been built; tell whether it can be used. Never builds."""
    if _state["loaded"] is not None:
        return True
    if _state["problem"] is not None:
        return False
    with _lock:
        try:
            path = library_path()
            if not path.exists():
                raise BackendError(_not_built())
            _load(path)
        except BackendError as error:
            _state["problem"] = str(error)
    return _state["loaded"] is not None


def facts() -> dict[str, Any]:
    """Say what ``doctor`` shows of the kernel; loads nothing.

    Returns
    -------
    dict
        ``library`` and ``compiler``, paths or None, and ``problem``, a sentence or None.
    """
    try:
        path = library_path()
        problem = _state["problem"]
        if not path.exists():
            problem = _not_built() if compiler() else _no_compiler()
    except BackendError as error:
        path, problem = None, str(error)
    found = str(path) if path is not None and path.exists() else None
    return {"library": found, "compiler": compiler(), "problem": problem}


def _load(path: Path) -> None:
    import mxnet as mx

    try:
        if not hasattr(mx.nd._internal, "_scratchbn_batch_norm"):  # twice would replace it in use
            mx.library.load(str(path), verbose=False)
    except mx.MXNetError as error:
        raise BackendError(f"MXNet could not load {path}: {error}") from error
    _state["loaded"] = path


def _interface() -> tuple[Path, Path]:
    """Return lib_api.h and lib_api.cc, without importing mxnet."""
    spec = importlib.util.find_spec("mxnet")
    root = Path(spec.origin).parent if spec is not None and spec.origin else Path("mxnet")
    files = root / "include" / "mxnet" / "lib_api.h", root / "src" / "lib_api.cc"
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise BackendError(f"this mxnet lacks its extension interface: {', '.join(missing)}")
    return files


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *(_X86_64_V3 if _processor_features() >= _X86_64_V3_FEATURES else ()))


def _processor_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split()) if platform.machine() in ("x86_64", "AMD64") else set()


def _cache_directory() -> Path:
    chosen = os.environ.get("SCRATCHBN_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "native"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "scratchbn" / "native"


def _no_compiler() -> str:
    named = os.environ.get("CXX")
    if named:
        return f"CXX={named!r} is not a program that can be run"
    return (
        f"no C++ compiler found (looked for {', '.join(_COMPILERS)}); "
        "install one, on Debian: apt-get install g++"
    )


def _not_built() -> str:
    return "the kernel has not been built: run python -m scratchbn build-native"
