"""Building the kernel: the compiler, its flags, and where the library is kept.

The library lies in the cache directory under a name made of MXNet's version, the sources and the
compiler flags, so that a change of any of them leads to a new one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..environment.prepare import mxnet_distributions

_HERE = Path(__file__).resolve().parent
_SOURCES = (
    "operator.cc", "batch_norm.h", "walk.h", "simd.h",
    "cuda/launch.h", "cuda/driver.h", "cuda/call.h",
)  # fmt: skip
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
# The instruction set that compilers call x86-64-v3, in words that older compilers know too.
_X86_64_V3 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c")
_X86_64_V3_FEATURES = {"avx2", "fma", "bmi1", "bmi2", "f16c"}
_COMPILERS = ("c++", "g++", "clang++")


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
    return cache_directory() / f"batch_norm-mxnet-{version}-{digest.hexdigest()[:16]}.so"


def compile_library(path: Path) -> None:
    """Compile the kernel to `path`, which appears when it is whole."""
    command = compiler()
    if command is None:
        raise BackendError(no_compiler())
    header, source = _interface()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as directory:
            built = Path(directory, path.name)
            sources = [str(_HERE / "operator.cc"), str(source)]
            include = ["-isystem", str(header.parents[1])]
            child = subprocess.run(
                [command, *_flags(), *include, *sources, "-ldl", "-o", str(built)],
                capture_output=True,
                text=True,
            )
            if child.returncode:
                raise BackendError(f"{command} could not build the kernel:\n{child.stderr.strip()}")
            os.replace(built, path)
    except OSError as error:
        raise BackendError(f"the kernel could not be written to {path}: {error}") from error


def no_compiler() -> str:
    """Say which compilers were looked for, and what to install."""
    named = os.environ.get("CXX")
    if named:
        return f"CXX={named!r} is not a program that can be run"
    return (
        f"no C++ compiler found (looked for {', '.join(_COMPILERS)}); "
        "install one, on Debian: apt-get install g++"
    )


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
    """Return the compiler's flags; the variable SCRATCHBN_CXXFLAGS adds to them."""
    processor = _X86_64_V3 if _processor_features() >= _X86_64_V3_FEATURES else ()
    return (*_FLAGS, *processor, *shlex.split(os.environ.get("SCRATCHBN_CXXFLAGS", "")))


def _processor_features() -> set[str]:
    """Return the instruction sets of an x86-64 processor under Linux; else none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split()) if platform.machine() in ("x86_64", "AMD64") else set()


def cache_directory() -> Path:
    """Return the directory of libraries, in the user's cache unless SCRATCHBN_CACHE is set."""
    chosen = os.environ.get("SCRATCHBN_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "native"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "scratchbn" / "native"
