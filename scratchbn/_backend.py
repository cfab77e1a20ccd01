"""Which implementation the layers compute with: stock operators, or the compiled kernel.

Both have the same semantics. A hybridized net keeps what was chosen when it was traced.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager

from . import native
from .native import BackendError

__all__ = ["BACKENDS", "BackendError", "get_backend", "set_backend", "use_backend"]

BACKENDS = ("auto", "portable", "native")
_CPU = {"cpu", "cpu_pinned", "cpu_shared"}

_chosen: str | None = None
_here = threading.local()


def set_backend(name: str) -> None:
    """Choose what layers compute with, in every thread, from now on.

    Parameters
    ----------
    name : {'auto', 'portable', 'native'}
        'portable': operators that every MXNet has, on any device. 'native': the compiled kernel,
        built now if it has not been; it runs on CPUs. 'auto': the kernel in hybridized nets on
        CPUs if it has been built (``python -m scratchbn build-native``), else portable, as is
        eager code, whose time goes into Python. Without a call of this
        function: what the environment variable SCRATCHBN_BACKEND names, else 'auto'.

    Raises
    ------
    ValueError
        If `name` is none of the three.
    BackendError
        If `name` is 'native' and the kernel can be neither found nor built. Nothing is changed.

    Notes
    -----
    A hybridized net keeps what was chosen when it was traced: choose before its first call, or
    call ``hybridize()`` again. The kernel is used in nets, eager and hybridized; what ``export``
    and ``save`` write is always the portable graph, and so is a layer called on symbols unless
    'native' was chosen by name. A layer that overrides how it computes is portable always.
    """
    global _chosen
    _check(name)
    _chosen = name


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
    before = getattr(_here, "chosen", None)
    _here.chosen = name
    try:
        yield
    finally:
        _here.chosen = before


def get_backend() -> str:
    """Return the name that was chosen, for this thread: 'auto', 'portable' or 'native'.

    Raises
    ------
    ValueError
        If the environment variable SCRATCHBN_BACKEND is none of the three.
    """
    name = getattr(_here, "chosen", None) or _chosen
    if name is not None:
        return str(name)
    name = os.environ.get("SCRATCHBN_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"SCRATCHBN_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def is_native(devices: Set[str], graph: bool) -> bool:
    """Tell whether to compute with the kernel.

    Parameters
    ----------
    devices : set of str
        The types of the devices that hold the data; empty if no data is at hand.
    graph : bool
        Whether a graph is being built.

    Raises
    ------
    BackendError
        If 'native' was chosen by name and cannot be had.
    """
    name = get_backend()
    if name == "portable":
        return False
    if name == "auto":
        return graph and bool(devices) and devices <= _CPU and native.available()
    if not devices <= _CPU:
        raise BackendError(
            f"the native backend runs on CPUs, the data is on {', '.join(sorted(devices - _CPU))}: "
            "choose 'auto' or 'portable'"
        )
    native.load()
    return True


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native":
        native.load()
