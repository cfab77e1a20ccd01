"""The compiled kernel: built with the machine's C++ compiler and loaded into MXNet; never required.

``operator.cc`` registers one operator through MXNet's extension interface (``mxnet/lib_api.h``,
which the wheel brings); ``batch_norm.h`` is the arithmetic, ``walk.h`` the ways through an array,
``simd.h`` the vectors. ``_build.py`` compiles them.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from ..environment.install import python_command
from ._build import BackendError, compile_library, compiler, library_path, no_compiler
from ._operator import OPERATOR, batch_norm, register

__all__ = [
    "OPERATOR",
    "BackendError",
    "available",
    "batch_norm",
    "build",
    "compiler",
    "facts",
    "library_path",
    "load",
]


class _Kernel:
    """The library in this process: loaded or not, and why it could not be."""

    def __init__(self, problem: str | None = None) -> None:
        self.loaded = False
        self.problem = problem
        self.lock = threading.RLock()

    def load(self, path: Path) -> None:
        """Load a library, once: twice would replace the operator in use."""
        import mxnet as mx

        try:
            if not hasattr(mx.nd._internal, OPERATOR):
                register(path)
        except mx.MXNetError as error:
            raise BackendError(f"MXNet could not load {path}: {error}") from error
        self.loaded, self.problem = True, None


_kernel = _Kernel()


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
    if force or not path.exists():
        compile_library(path)
        _kernel.problem = None
    return path


def load() -> None:
    """Load the library into MXNet, once in a process; build it first if need be.

    Raises
    ------
    BackendError
        If it cannot be built or loaded.
    """
    with _kernel.lock:
        if not _kernel.loaded:
            _kernel.load(build())


def available() -> bool:
    """Load the library if it has been built; tell whether it can be used. Never builds."""
    if _kernel.loaded or _kernel.problem is not None:
        return _kernel.loaded
    with _kernel.lock:
        try:
            path = library_path()
            if not path.exists():
                raise BackendError(_not_built())
            _kernel.load(path)
        except BackendError as error:
            _kernel.problem = str(error)
    return _kernel.loaded


def facts() -> dict[str, Any]:
    """Say what ``doctor`` shows of the kernel; loads nothing.

    Returns
    -------
    dict
        ``library`` and ``compiler``, paths or None, and ``problem``, a sentence or None.
    """
    path, problem = None, _kernel.problem
    try:
        path = library_path()
        if not path.exists():
            path, problem = None, _not_built() if compiler() else no_compiler()
    except BackendError as error:
        problem = str(error)
    return {"library": path and str(path), "compiler": compiler(), "problem": problem}


def _not_built() -> str:
    build = python_command("-m", "scratchbn", "build-native")
    return f"the kernel has not been built: run {build}"
