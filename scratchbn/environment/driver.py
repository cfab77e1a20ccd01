"""What the NVIDIA driver says of the GPUs, asked through its C interface and without mxnet."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

from .help import DRIVER_LIBRARY, PTX_DRIVER

# What NVRTC 11.8 compiles when a hybridized net first runs is PTX for this CUDA and newer ones.
_PTX_CUDA = (11, 8)


@dataclass(frozen=True)
class GPU:
    """One card as the CUDA driver describes it; `index` is the 1 of ``gpu:1``."""

    index: int
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, compute capability {dotted(self.capability)})"


@dataclass(frozen=True)
class Driver:
    """The newest CUDA the driver supports, its cards, and why there are none."""

    cuda_version: str | None
    gpus: tuple[GPU, ...]
    problem: str | None


def query_driver() -> Driver:
    """Ask the CUDA driver which GPUs there are; never raises for want of one."""
    try:
        cuda = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as exc:
        return Driver(None, (), f"no NVIDIA driver ({exc})")
    version: str | None = None
    try:
        number = _integer(cuda, "cuDriverGetVersion")
        version = f"{number // 1000}.{number % 1000 // 10}"
        _call(cuda, "cuInit", 0)
        gpus = tuple(_gpu(cuda, index) for index in range(_integer(cuda, "cuDeviceGetCount")))
    except (OSError, AttributeError) as exc:
        return Driver(version, (), f"the NVIDIA driver offers no GPU: {exc}{visible_devices()}")
    if not gpus:
        return Driver(version, (), f"the NVIDIA driver lists no GPU{visible_devices()}")
    return Driver(version, gpus, None)


def fusion_problem(driver: Driver) -> str | None:
    """Say why the driver cannot load what MXNet compiles for hybridized nets; None if it can.

    Without a card, without a version, or with fusion switched off there is nothing to say.
    """
    if not driver.gpus or driver.cuda_version is None or os.environ.get("MXNET_USE_FUSION") == "0":
        return None
    if tuple(map(int, driver.cuda_version.split("."))) >= _PTX_CUDA:
        return None
    return (
        f"the driver supports CUDA {driver.cuda_version}, and hybridized nets run kernels that "
        f"NVRTC 11.8 compiles into PTX for CUDA {_PTX_CUDA[0]}.{_PTX_CUDA[1]}: install driver "
        f"{PTX_DRIVER} or newer, or set MXNET_USE_FUSION=0"
    )


def visible_devices() -> str:
    """Say in brackets that CUDA_VISIBLE_DEVICES may hide cards, if it is set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f" (CUDA_VISIBLE_DEVICES is {value!r})"


def dotted(capability: tuple[int, int]) -> str:
    """Write a compute capability as NVIDIA does."""
    return f"{capability[0]}.{capability[1]}"


def _call(cuda: Any, name: str, *arguments: Any) -> None:
    status = getattr(cuda, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        meaning = text.value.decode() if text.value else "unknown error"
        raise OSError(f"{name} returned {status} ({meaning})")


def _integer(cuda: Any, name: str, *arguments: Any) -> int:
    value = ctypes.c_int()
    _call(cuda, name, ctypes.byref(value), *arguments)
    return value.value


def _gpu(cuda: Any, index: int) -> GPU:
    attribute_major, attribute_minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
    handle = _integer(cuda, "cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    _call(cuda, "cuDeviceGetName", name, len(name), handle)
    major = _integer(cuda, "cuDeviceGetAttribute", attribute_major, handle)
    minor = _integer(cuda, "cuDeviceGetAttribute", attribute_minor, handle)
    return GPU(index, name.value.decode(errors="replace"), (major, minor))
