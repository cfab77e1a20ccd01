"""Where to compute: a GPU that has run a kernel, or the CPU."""

from __future__ import annotations

import re
import warnings
from typing import Any

from .._text import first_line
from .driver import GPU, Driver, dotted, query_driver, visible_devices
from .help import CUDA_DISTRIBUTION, without_cuda_help
from .prepare import mxnet_distributions

__all__ = ["DeviceError", "resolve_device"]

# The machine code in mxnet-cu112 1.9.1's libmxnet.so: each runs on cards of the same major and the
# same or a higher minor compute capability (CUDA C++ Programming Guide, "Binary Compatibility").
# There is no PTX beside it that a driver could compile for a newer card.
WHEEL_CAPABILITIES = ((5, 0), (6, 0), (7, 0), (8, 0), (8, 6))


class DeviceError(RuntimeError):
    """A GPU was asked for and cannot be used; the message says what was found."""


def resolve_device(spec: str = "auto") -> Any:
    """Return the device to compute on.

    Parameters
    ----------
    spec : str
        ``'auto'`` is the first GPU that has just run a kernel, else the CPU, with a warning when
        there are GPUs and none of them is usable. ``'cpu'``, ``'cpu:1'``, ``'gpu'`` and ``'gpu:1'``
        name one device.

    Returns
    -------
    mxnet.Context
        The device.

    Raises
    ------
    TypeError
        If `spec` is not a string.
    ValueError
        If `spec` is none of the forms above.
    DeviceError
        If a GPU is named and cannot be used: mxnet without CUDA, no driver, no such index, a
        compute capability the mxnet wheel has no code for, or a kernel that failed.
    """
    kind, index = _parse(spec)
    import mxnet as mx

    if kind == "cpu":
        return mx.cpu(index)
    driver = query_driver()
    if kind == "gpu":
        problem = _gpu_problem(index, driver)
        if problem is not None:
            raise DeviceError(f"device {spec!r} cannot be used: {problem}")
        return mx.gpu(index)
    device, reason = choose_device(driver)
    if device.device_type == "cpu" and driver.gpus and _built_with_cuda():
        warnings.warn(f"device 'auto' is the CPU: {reason}", RuntimeWarning, stacklevel=2)
    return device


def wheel_runs(capability: tuple[int, int]) -> bool:
    """Whether the mxnet-cu112 wheel has machine code for a card of this compute capability."""
    return any(
        capability[0] == major and capability[1] >= minor for major, minor in WHEEL_CAPABILITIES
    )


def choose_device(driver: Driver) -> tuple[Any, str]:
    """Return what 'auto' is, and why."""
    import mxnet as mx

    if not _built_with_cuda():
        return mx.cpu(0), "mxnet is built without CUDA"
    problems = []
    for gpu in driver.gpus:
        problem = _gpu_problem(gpu.index, driver)
        if problem is None:
            return mx.gpu(gpu.index), f"{gpu} ran a kernel"
        problems.append(problem)
    return mx.cpu(0), "; ".join(problems) or str(driver.problem)


def wheel_verdict(gpu: GPU) -> bool | None:
    """Whether the wheel has code for the card; None for builds whose contents are not known."""
    return wheel_runs(gpu.capability) if CUDA_DISTRIBUTION in mxnet_distributions() else None


def _parse(spec: str) -> tuple[str, int]:
    if not isinstance(spec, str):
        raise TypeError(f"device must be a string such as 'auto' or 'gpu:1', got {spec!r}")
    match = re.fullmatch(r"auto|(cpu|gpu)(?::([0-9]{1,3}))?", spec)
    if match is None:
        raise ValueError(f"device must be 'auto', 'cpu', 'cpu:N', 'gpu' or 'gpu:N', got {spec!r}")
    return match[1] or "auto", int(match[2] or 0)


def _gpu_problem(index: int, driver: Driver) -> str | None:
    """Why nothing can run on GPU `index`; None after a kernel did."""
    if not _built_with_cuda():
        return without_cuda_help()
    if driver.problem is not None:
        return driver.problem
    if index >= len(driver.gpus):
        listed = ", ".join(map(str, driver.gpus))
        return f"index {index} is out of range, the driver lists: {listed}{visible_devices()}"
    gpu = driver.gpus[index]
    if wheel_verdict(gpu) is False:
        carried = ", ".join(map(dotted, WHEEL_CAPABILITIES))
        return (
            f"{CUDA_DISTRIBUTION} has no code for {gpu}: it carries {carried}, each of which "
            "runs on the same major version from that minor version on, and no PTX"
        )
    failure = _kernel_failure(index)
    return None if failure is None else f"a first kernel on {gpu} failed: {failure}"


def _kernel_failure(index: int) -> str | None:
    import mxnet as mx

    try:
        seen = mx.context.num_gpus()
        if index >= seen:
            return f"the CUDA runtime sees {seen} GPUs (driver too old for CUDA 11?)"
        values = (mx.nd.ones((2,), ctx=mx.gpu(index)) + 1).asnumpy()
    except mx.MXNetError as exc:
        return first_line(exc)
    return None if (values == 2).all() else f"1 + 1 gave {values.tolist()}"


def _built_with_cuda() -> bool:
    import mxnet as mx

    return bool(mx.runtime.Features().is_enabled("CUDA"))
