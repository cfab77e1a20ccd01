"""What runs a hybridized block: its own graph, or in inference a second one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd

from ..._graph.nodes import Graph
from ...native import OPERATOR
from ..choice import get_backend
from ..leaner import leaner
from ..marker import KEY
from .calls import Call, compiled, described
from .factors import Fact
from .rewrite import rewrite
from .switch import inference_graph

Array = Any
# An inference graph, and which inputs of the other graph it takes.
Second = tuple[Any, list[int]]


class TwoGraphs:
    """Stands in the place of a block's CachedOp, which it calls, or a second one in inference.

    It is a CachedOp by duck typing. It lives as long as the graph that the block was traced to,
    and is handed the data and the Parameters with each call, on whatever device; so there is
    nothing to be told when they change. The second graph is built when it is first needed, for
    each rank and type of the inputs.

    Parameters
    ----------
    own : CachedOp
        What runs the block.
    symbol : Symbol
        The graph in it.
    is_data : list of bool
        Which of its inputs are data and not Parameters.
    flags : list of pair
        What the block was hybridized with.
    """

    def __init__(
        self, own: Any, symbol: Any, is_data: Sequence[bool], flags: Sequence[tuple[str, Any]]
    ) -> None:
        self._own = own
        self._symbol = symbol
        self._data = [i for i, data in enumerate(is_data) if data]
        self._flags = list(flags)
        lean = leaner(symbol)
        # What trains, unless a hook watches: then each node is to be seen.
        self._lean = own if lean is None else self._runner(lean, range(len(is_data)))
        # MXNet lets a static_shape graph write running statistics without telling the engine.
        self._unordered = bool(dict(flags).get("static_shape"))
        self._lock = threading.Lock()
        self._seconds: dict[Any, Second | None] = {}
        self._observed = False
        self._latest: Any = None

    def __call__(self, *arrays: Array, **options: Any) -> Any:
        """Run the graph that the mode asks for."""
        observed, self._observed = self._observed, False
        first = self._own if observed else self._lean
        if observed or options or not self._infers(arrays):
            self._wait_for_others(first)
            return first(*arrays, **options)
        try:
            second = self._second(arrays)
            self._wait_for_others(first if second is None else second)
            if second is not None:
                return _run(second, arrays)
        except mx.MXNetError as error:
            try:
                results = first(*arrays)
            except mx.MXNetError:
                raise error from None  # it is the inputs that are wrong
            self._seconds[self._key(arrays)] = None
            return results
        return first(*arrays)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def _register_op_hook(self, callback: Any, monitor_all: bool = False) -> None:
        """Let a hook see the block's own graph: Gluon calls this before each call."""
        self._observed = True
        self._own._register_op_hook(callback, monitor_all)

    def _infers(self, arrays: Sequence[Array]) -> bool:
        """Tell whether a call is one of inference for which there may be a second graph."""
        if autograd.is_recording() or autograd.is_training():
            return False
        if get_backend() != "auto" or not inference_graph():
            return False
        data = [arrays[i] for i in self._data]
        return not any(a.context.device_type == "gpu" or not a.size for a in data)

    def _second(self, arrays: Sequence[Array]) -> Second | None:
        """Return the second graph for inputs of this rank and type, if there is one."""
        key = self._key(arrays)
        if key not in self._seconds:
            with self._lock:
                if key not in self._seconds:
                    built = self._built(arrays)
                    if built is not None:  # no two threads may be the first to run a CachedOp
                        _run(built, arrays)
                        mx.nd.waitall()
                    self._seconds[key] = built
        return self._seconds[key]

    def _key(self, arrays: Sequence[Array]) -> Any:
        return tuple((arrays[i].ndim, arrays[i].dtype) for i in self._data)

    def _wait_for_others(self, runs: Any) -> None:
        """Wait, where the engine does not, for what the graphs but this one read or write."""
        if self._unordered and self._latest is not None and self._latest is not runs:
            mx.nd.waitall()
        self._latest = runs

    def _built(self, arrays: Sequence[Array]) -> Second | None:
        """Build the second graph for inputs like these; None if no layer gains by it."""
        names = self._symbol.list_inputs()
        given = dict(zip(names, arrays))
        measure = partial(_facts, given=given)
        graph = rewrite(self._symbol, (described, compiled), measure, _gains)
        if graph is None:
            return None
        symbol = graph.symbol()
        position = {name: i for i, name in enumerate(names)}
        used = [position[name] for name in symbol.list_inputs()]
        if type(self._symbol) is not mx.sym.Symbol:
            symbol = symbol.as_np_ndarray()
        return self._runner(symbol, used), used

    def _runner(self, symbol: Any, used: Sequence[int]) -> Any:
        """Return what runs a graph that takes these of the inputs, hybridized as the block is."""
        data = [i for i, source in enumerate(used) if source in self._data]
        parameters = [i for i, source in enumerate(used) if source not in self._data]
        flags = [("data_indices", data), ("param_indices", parameters), *self._flags]
        return mx.nd.CachedOp(symbol, flags)


def _run(second: Second, arrays: Sequence[Array]) -> Any:
    op, used = second
    return op(*(arrays[i] for i in used))


def with_second_graph(
    own: Any, symbol: Any, is_data: list[bool], flags: Sequence[tuple[str, Any]]
) -> Any:
    """Return what is to run a block whose graph was just built: two graphs if it has layers."""
    text = symbol.tojson()
    has_layers = f'"{KEY}"' in text or f'"op": "{OPERATOR}"' in text
    if has_layers and get_backend() == "auto":
        return TwoGraphs(own, symbol, is_data, flags)
    return own


def _facts(graph: Graph, calls: list[Call], given: dict[str, Array]) -> list[Fact]:
    """Measure the inputs of calls, given all inputs of the graph."""
    part = graph.symbol([call.node.inputs[0] for call in calls])
    names = part.list_inputs()
    _, shapes, _ = part.infer_shape_partial(**{name: given[name].shape for name in names})
    _, types, _ = part.infer_type_partial(**{name: given[name].dtype for name in names})
    facts = []
    for call, shape, dtype in zip(calls, shapes, types):
        channels = shape[call.axis] if shape else -1
        known = channels if channels > 0 else None
        facts.append(Fact(len(shape) or None, known, np.dtype(dtype) if dtype else None))
    return facts


def _gains(call: Call, fact: Fact) -> bool:
    """Tell whether a call is faster in the second graph than in the first.

    MXNet reorders what it hands to the compiled operator where the data is in the layout of
    oneDNN's convolutions, which a number of channels has that 8 divides. Elsewhere that operator
    is the fastest.
    """
    rank, channels = fact.rank or 0, fact.channels or 0
    if call.axis % rank != 1:
        return False
    return call.output.node.inputs[0].node.op != OPERATOR or (rank == 4 and channels % 8 == 0)
