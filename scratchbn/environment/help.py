"""What to do about a failed ``import mxnet``, or about the wrong mxnet."""

from __future__ import annotations

import ctypes
import re
import sys

from .install import install_command, is_clone, python_command, uninstall_command
from .prepare import (
    CUDA_LIBRARIES,
    cuda11_distributions,
    find_cuda_libraries,
    mxnet_distributions,
)

DRIVER_LIBRARY = "libcuda.so.1"
CUDA_DISTRIBUTION = "mxnet-cu112"
PTX_DRIVER = "520.61.05"  # the first that knows the PTX of NVRTC 11.8
DEBIAN_PACKAGES = {"libgomp.so.1": "libgomp1", "libquadmath.so.0": "libquadmath0"}
_MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")


def import_error_help(exc: BaseException) -> str | None:
    """Say what a failed ``import mxnet`` misses and what to do; None if the failure is unknown."""
    if isinstance(exc, ModuleNotFoundError) and exc.name == "mxnet":
        return (
            f"mxnet is not installed: {install_command('cpu')}, or for an NVIDIA GPU "
            f"{install_command('cu112')}"
            + ("; make train sets up .venv with all of it" if is_clone() else "")
        )
    if isinstance(exc, ModuleNotFoundError) and exc.name == "distutils":
        return (
            f"mxnet 1.9.1 needs distutils, which Python {'.'.join(map(str, sys.version_info[:3]))} "
            "no longer has: use Python 3.9, 3.10 or 3.11"
        )
    missing = _MISSING_LIBRARY.search(str(exc)) if isinstance(exc, OSError) else None
    if missing is not None:
        return _missing_library_help(missing[1])
    installed = mxnet_distributions()
    return several_distributions_help(installed) if len(installed) > 1 else None


def several_distributions_help(installed: dict[str, str]) -> str:
    """Say how to get from several distributions of mxnet to one."""
    return (
        f"the distributions {' and '.join(installed)} are both installed, share the module name "
        f"mxnet and overwrite each other's files: {uninstall_command(list(installed))}, then "
        "install one of them again"
    )


def without_cuda_help() -> str:
    """Say how to get an mxnet that uses an NVIDIA GPU."""
    installed = mxnet_distributions()
    text = ", ".join(f"{name} {version}" for name, version in installed.items()) or "no wheel"
    uninstall = f"{uninstall_command(list(installed))}, then " if installed else ""
    return (
        f"mxnet is built without CUDA (installed: {text}); for an NVIDIA GPU: {uninstall}"
        f"{install_command('cu112')}"
    )


def _missing_library_help(library: str) -> str | None:
    if library == DRIVER_LIBRARY:
        return (
            f"this mxnet is built for CUDA and needs the NVIDIA driver ({library}), which is not "
            f"here. With an NVIDIA card: install its driver, {PTX_DRIVER} or newer (in a "
            "container: start it with GPU access, such as docker's --gpus all). Without one: "
            f"{uninstall_command(cuda11_distributions() or [CUDA_DISTRIBUTION])}, then "
            f"{install_command('cpu')}"
        )
    component = dict(CUDA_LIBRARIES).get(library)
    if component is not None:
        return _missing_cuda_library_help(library, component)
    package = DEBIAN_PACKAGES.get(library)
    if package is None:
        return None
    return f"mxnet needs {library}: apt-get install {package} (Debian and Ubuntu)"


def _missing_cuda_library_help(library: str, component: str) -> str:
    path = find_cuda_libraries().get(library)
    if path is None:
        package = f"nvidia-{component}-cu11{'<9' if component == 'cudnn' else ''}"
        return (
            f"this mxnet is built for CUDA and needs {library}: "
            f"{python_command('-m', 'pip', 'install', package)}, or for all of them "
            f"{install_command('cu112')}"
        )
    try:
        ctypes.CDLL(str(path))
    except OSError as exc:
        return f"this mxnet needs {library}; it is installed and cannot be loaded: {exc}"
    return (
        f"this mxnet needs {library}; it is installed as {path}: import scratchbn before mxnet, "
        "so that it is found"
    )
