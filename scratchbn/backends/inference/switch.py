"""Whether live nets run a second graph in inference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..._checks import check_flag
from ..._setting import Setting

_VALUES = {"": True, "1": True, "0": False}


def _from_environment() -> bool:
    text = os.environ.get("SCRATCHBN_INFERENCE_GRAPH", "")
    if text not in _VALUES:
        raise ValueError(f"SCRATCHBN_INFERENCE_GRAPH must be 0 or 1, got {text!r}")
    return _VALUES[text]


CHOSEN = Setting(_from_environment)


def set_inference_graph(on: bool) -> None:
    """Choose whether hybridized nets run a second graph in inference, in every thread.

    Without a call of this function it is what the environment variable SCRATCHBN_INFERENCE_GRAPH
    says, 0 or 1, else True.

    Parameters
    ----------
    on : bool
        Whether to. It is read at each call of a net.

    Raises
    ------
    TypeError
        If `on` is no bool.

    Notes
    -----
    A net that is called neither in training nor under ``autograd.record()`` needs no batch
    statistics. On a CPU, with the backend 'auto', it then runs a graph of its own: a layer behind
    a convolution becomes a depthwise convolution whose weights are computed from the Parameters
    each time, so that it is right at once whatever changes them. Layers that gain nothing by it,
    or cannot be written so, keep the graph they have. It takes the memory of a second graph, and
    its results differ from those of the other graph by rounding.
    """
    CHOSEN.set(check_flag("on", on))


@contextmanager
def use_inference_graph(on: bool) -> Iterator[None]:
    """Choose whether nets run a second graph in inference, in this thread, in a ``with`` block.

    Parameters
    ----------
    on : bool
        See :func:`set_inference_graph`.

    Raises
    ------
    TypeError
        If `on` is no bool.

    Examples
    --------
    >>> with use_inference_graph(False):
    ...     inference_graph()
    False
    """
    with CHOSEN.use(check_flag("on", on)):
        yield


def inference_graph() -> bool:
    """Tell whether nets run a second graph in inference, for this thread.

    Raises
    ------
    ValueError
        If the environment variable SCRATCHBN_INFERENCE_GRAPH is neither 0 nor 1.
    """
    return CHOSEN.get()
