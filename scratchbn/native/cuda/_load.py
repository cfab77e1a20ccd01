"""The kernels in this process: for which devices they are loaded, and why not."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from ...environment.driver import GPU, query_driver
from ...environment.install import python_command
from .. import _build
from ._compile import Nvrtc, image, image_path

_lock = threading.Lock()
_problems: dict[int, str | None] = {}  # by the index of the device; None: it is ready


def build(force: bool = False) -> dict[str, str]:
    """Compile the kernels for the cards that the driver lists.

    Parameters
    ----------
    force : bool
        Compile even what is in the cache.

    Returns
    -------
    dict
        For each compute capability, the path of the code.

    Raises
    ------
    BackendError
        If there are cards and no NVRTC.
    """
    built = {}
    for capability in sorted({_number(gpu) for gpu in query_driver().gpus}):
        image(capability, force)
        built[f"{capability // 10}.{capability % 10}"] = str(image_path(capability))
    return built


def load(devices: Iterable[int]) -> None:
    """Load the kernels into GPUs, once in a process; compile them first if need be.

    The operator must be loaded.

    Parameters
    ----------
    devices : iterable of int
        Their indices, 1 for ``gpu(1)``.

    Raises
    ------
    BackendError
        If one cannot be had.
    """
    for device in sorted(devices):
        with _lock:
            if device not in _problems:
                _problems[device] = _load(device)
        problem = _problems[device]
        if problem is not None:
            raise _build.BackendError(problem)


def available(devices: Iterable[int]) -> bool:
    """Load the kernels into GPUs if that can be done; tell whether they can be used."""
    try:
        load(devices)
    except _build.BackendError:
        return False
    return True


def facts() -> dict[str, Any]:
    """Say what ``doctor`` shows of the kernels on GPUs; compiles and loads nothing.

    Returns
    -------
    dict
        ``nvrtc``, its version and path, or None; ``code``, by compute capability a path, or None
        where it will be compiled at first use; ``problem``, a sentence or None.
    """
    driver, nvrtc, problem = query_driver(), None, None
    try:
        compiler = Nvrtc()
        nvrtc = f"{compiler.version}  {compiler.path}"
    except _build.BackendError as error:
        problem = str(error)
    code = {}
    for gpu in driver.gpus:
        path = image_path(_number(gpu))
        code["{}.{}".format(*gpu.capability)] = str(path) if path.exists() else None
    if driver.gpus and all(code.values()):
        problem = None
    problem = driver.problem or problem or next(filter(None, _problems.values()), None)
    return {"nvrtc": nvrtc, "code": code, "problem": problem}


def _load(device: int) -> str | None:
    """Return what is in the way; None if the kernels are loaded into the device."""
    driver = query_driver()
    if driver.problem is not None:
        return driver.problem
    gpu = next((gpu for gpu in driver.gpus if gpu.index == device), None)
    if gpu is None:
        return f"the NVIDIA driver lists no GPU {device}"
    try:
        library = ctypes.CDLL(str(_build.library_path()))  # the one that MXNet has loaded
        _hand_over(library, _number(gpu))
    except (_build.BackendError, OSError) as error:
        return str(error)
    for other in {_number(gpu) for gpu in driver.gpus} - {_number(gpu)}:
        # A net that is traced with arrays of one device is run on all that hold its Parameters.
        with suppress(_build.BackendError):
            _hand_over(library, other)
    reason = ctypes.create_string_buffer(1024)
    if library.scratchbn_gpu_open(device, reason, ctypes.c_size_t(len(reason))):
        again = python_command("-m", "scratchbn", "build-native", "--force")
        why = reason.value.decode(errors="replace")
        return f"{gpu} does not take the kernels: {why} (made for another driver? run {again})"
    return None


def _hand_over(library: ctypes.CDLL, capability: int) -> None:
    code = image(capability)
    library.scratchbn_gpu_add_image(capability, code, ctypes.c_size_t(len(code)))


def _number(gpu: GPU) -> int:
    major, minor = gpu.capability
    return 10 * major + minor
