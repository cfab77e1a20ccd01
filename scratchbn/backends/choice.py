"""Which way a layer computes: all that decides it.

A hybridized net keeps what was chosen when it was traced; a call of it that only infers may run
another graph, layer by layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import mxnet as mx

from .. import native as kernel
from .._graph import trace
from .._graph.arrays import Array, is_symbol
from .._setting import Setting
from ..native import OPERATOR, BackendError, cuda
from .inference.calls import Call
from .inference.factors import Fact
from .inference.switch import inference_graph
from .marker import describe, marker, marking
from .native import native
from .portable import portable
from .way import Layer, Way

BACKENDS = ("auto", "portable", "native")
_CPU = {"cpu", "cpu_pinned", "cpu_shared"}
_ANY = {*_CPU, "gpu"}
_HAS_GPUS = mx.runtime.Features().is_enabled("CUDA")

Kinds = tuple[tuple[int, Any], ...]


def _from_environment() -> str:
    name = os.environ.get("SCRATCHBN_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"SCRATCHBN_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


CHOSEN = Setting(_from_environment)


def choose(layer: Layer, x: Array) -> Way:
    """Return the way to compute for this layer and this input."""
    symbolic = is_symbol(x)
    if symbolic and marking() and describe(layer) is not None:
        return marker
    purpose = trace.current().purpose if symbolic else "eager"
    if layer.is_stock and is_native(trace.devices_of(x), purpose):
        return native
    return portable


def infers_apart(data: Sequence[Array]) -> Kinds | None:
    """Return the rank and type of each input if a call that infers may run a graph of its own.

    It is part of each call of a net, so it asks MXNet for nothing twice.
    """
    if get_backend() != "auto" or not inference_graph():
        return None
    kinds = []
    for array in data:
        shape = array.shape
        if 0 in shape or (_HAS_GPUS and array.context.device_type == "gpu"):
            return None
        kinds.append((len(shape), array.dtype))
    return tuple(kinds)


def why_kept(call: Call, fact: Fact) -> str | None:
    """Return why a layer keeps its operators where the net only infers; None if it gains.

    MXNet reorders what it hands to the compiled operator where the data is in the layout of
    oneDNN's convolutions, which a number of channels has that 8 divides. Elsewhere that operator
    is the fastest.
    """
    rank, channels = fact.rank or 0, fact.channels or 0
    if call.axis % rank != 1:
        return "its channels are not second"
    if call.output.node.inputs[0].node.op != OPERATOR:
        return None
    if rank != 4:
        return f"the kernel is faster on {rank} axes"
    return f"the kernel is faster on {channels} channels" if channels % 8 else None


def why_portable(is_stock: bool, devices: Set[mx.Context]) -> str | None:
    """Return why a layer of today's choice does not run by the kernel; None if it does."""
    if not is_stock:
        return "it overrides how it computes"
    if get_backend() == "portable":
        return "the backend portable was chosen"
    if is_native(devices, "execute"):
        return None
    if any(device.device_type == "gpu" for device in devices) and kernel.available():
        return str(cuda.facts()["problem"] or "the kernel cannot be had for its devices")
    return str(kernel.facts()["problem"] or "the kernel cannot be had for its devices")


def is_native(devices: Set[mx.Context], purpose: str) -> bool:
    """Tell whether to compute with the kernel.

    `devices` are those that hold the data, none if no data is at hand; `purpose` is 'eager', or
    that of the :class:`~scratchbn._graph.trace.Trace`. A BackendError says why the kernel cannot be
    had where it was chosen by name.
    """
    name = get_backend()
    if name == "portable" or purpose == "remember":
        return False
    kinds = {device.device_type for device in devices}
    gpus = {device.device_id for device in devices if device.device_type == "gpu"}
    if name == "auto":
        where = bool(devices) and (kinds <= _CPU or kinds == {"gpu"})
        if not (purpose in ("eager", "execute") and where and kernel.available()):
            return False
        return not gpus or cuda.available(gpus)
    if not kinds <= _ANY:
        raise BackendError(
            "the native backend runs on CPUs and GPUs, the data is on "
            f"{', '.join(sorted(kinds - _ANY))}: choose 'auto' or 'portable'"
        )
    kernel.load()
    cuda.load(gpus)
    return True


def set_backend(name: str) -> None:
    """Choose what layers compute with, in every thread, from now on.

    Without a call of this function it is what the environment variable SCRATCHBN_BACKEND names,
    else 'auto'.

    Parameters
    ----------
    name : {'auto', 'portable', 'native'}
        'portable': operators that every MXNet has, on any device. 'native': the compiled kernel,
        built now if it has not been; on an NVIDIA GPU it needs NVRTC, which compiles it for the
        card. 'auto': native, eager and hybridized, if the kernel is built (``python -m scratchbn
        build-native``) and, on a GPU, can be had for it; else portable. Nothing is ever built for
        'auto'.

    Raises
    ------
    ValueError
        If `name` is none of the three.
    BackendError
        If `name` is 'native' and the kernel can be neither found nor built. Nothing is changed.

    Notes
    -----
    A hybridized net keeps what was chosen when it was traced: choose before its first call, or
    call ``hybridize()`` again. What ``export`` and ``save`` write is always the portable graph,
    and so is what ``optimize_for`` hands to a backend of MXNet, and a layer called on symbols
    unless 'native' was chosen by name. A layer that overrides how it computes is always portable.
    """
    _check(name)
    CHOSEN.set(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose what layers compute with in this thread, inside a ``with`` block.

    Parameters
    ----------
    name : {'auto', 'portable', 'native'}
        See :func:`set_backend`.

    Raises
    ------
    ValueError, BackendError
        As :func:`set_backend` does.

    Examples
    --------
    >>> with use_backend("portable"):
    ...     get_backend()
    'portable'
    """
    _check(name)
    with CHOSEN.use(name):
        yield


def get_backend() -> str:
    """Return the name that was chosen, for this thread: 'auto', 'portable' or 'native'.

    Raises
    ------
    ValueError
        If the environment variable SCRATCHBN_BACKEND is none of the three.
    """
    return CHOSEN.get()


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native":
        kernel.load()
