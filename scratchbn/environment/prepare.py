"""What must happen before ``import mxnet``: NumPy's old names, CUDA libraries. Imports no mxnet."""

from __future__ import annotations

import builtins
import ctypes
import re
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from .install import python_command

SUPPORTED_NUMPY = "numpy>=1.21,<2"
# Every name mxnet 1.9.1 takes from numpy that numpy 1.24 removed: `bool` throughout mxnet.numpy,
# `int` in mxnet.test_utils.
NUMPY_ALIASES = ("bool", "int")

MXNET_DISTRIBUTIONS = (
    "mxnet",
    "mxnet-native",
    *(f"mxnet-cu{cuda}" for cuda in (92, 100, 101, 102, 110, 111, 112, 113, 114, 115, 116, 117)),
)

# (library, component), each after those it needs: the component comes from the distribution
# nvidia-<component>-cu11 and lies below site-packages/nvidia.
CUDA_LIBRARIES = (
    ("libcudart.so.11.0", "cuda-runtime"),
    ("libcublasLt.so.11", "cublas"),
    ("libcublas.so.11", "cublas"),
    ("libcufft.so.10", "cufft"),
    ("libcurand.so.10", "curand"),
    ("libcusparse.so.11", "cusparse"),
    ("libcusolver.so.11", "cusolver"),
    ("libnvrtc.so.11.2", "cuda-nvrtc"),
    ("libnvToolsExt.so.1", "nvtx"),
    ("libnccl.so.2", "nccl"),
    ("libcudnn.so.8", "cudnn"),
)


def prepare() -> None:
    """Make ``import mxnet`` work where it otherwise would not; call it before.

    Supplies the names that numpy 1.24 removed and, for a CUDA 11 build of mxnet, loads the CUDA
    libraries that the ``nvidia-*-cu11`` packages brought, so that no ``LD_LIBRARY_PATH`` is needed.
    Raises ImportError with numpy 2. Missing libraries are left to ``import mxnet``, and several
    distributions of mxnet to the doctor, since the one installed last does work.
    """
    _supply_numpy_aliases()
    _preload_cuda()


def mxnet_distributions() -> dict[str, str]:
    """Return the installed distributions that provide ``mxnet``, by name; several are a mistake."""
    versions = {name: version(name) for name in MXNET_DISTRIBUTIONS}
    return {name: version for name, version in versions.items() if version is not None}


def find_cuda_libraries() -> dict[str, Path]:
    """Find what the ``nvidia-*-cu11`` packages installed, in the order in which to load it."""
    roots = [Path(entry, "nvidia") for entry in sys.path if entry]
    roots = [root for root in roots if root.is_dir()]
    found: dict[str, Path] = {}
    for library, component in CUDA_LIBRARIES:
        files = (root / component.replace("-", "_") / "lib" / library for root in roots)
        path = next((file for file in files if file.is_file()), None)
        if path is not None:
            found[library] = path
    return found


def version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cuda11_distributions() -> list[str]:
    """Return the installed distributions of mxnet that are built for CUDA 11."""
    return [name for name in mxnet_distributions() if name.startswith("mxnet-cu11")]


def _supply_numpy_aliases() -> None:
    major, minor = (int(part) for part in re.findall(r"\d+", np.__version__)[:2])
    if major >= 2:
        raise ImportError(
            f"mxnet 1.9.1 cannot be imported with numpy {np.__version__}, which removed names it "
            f"uses: {python_command('-m', 'pip', 'install', SUPPORTED_NUMPY)} (scratchbn is "
            "developed with numpy 1.23.5)"
        )
    if (major, minor) < (1, 24):
        return
    for name in NUMPY_ALIASES:
        # vars(), because asking numpy itself for a removed name warns.
        if name not in vars(np):
            setattr(np, name, getattr(builtins, name))


def _preload_cuda() -> None:
    libraries = {} if "mxnet" in sys.modules else find_cuda_libraries()
    if not libraries or not cuda11_distributions():
        return
    for path in libraries.values():
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError:
            continue
