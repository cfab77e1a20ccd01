"""What runs a hybridized block: its own graph, or in inference a second one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
from mxnet import autograd

from ..._graph.names import LAST
from ..._graph.nodes import Graph
from ...native import OPERATOR
from ..choice import Kinds, get_backend, infers_apart, why_kept
from ..free_shape import Flags, free_shape
from ..leaner import infer_only, leaner
from ..marker import KEY
from ..traced import Traced
from .calls import Call, compiled, described
from .factors import Fact
from .rewrite import rewrite

Array = Any


class Second(NamedTuple):
    """What runs an inference graph, which inputs of the other graph it takes, and the graph."""

    op: Any
    used: list[int]
    symbol: Any

    def __call__(self, arrays: Sequence[Array]) -> Any:
        """Run it on the inputs of the other graph."""
        return self.op(*(arrays[i] for i in self.used))


class TwoGraphs(Traced):
    """Stands in the place of a block's CachedOp, and calls a second one in inference.

    It lives as long as the graph that the block was traced to, and is handed the data and the
    Parameters with each call, on whatever device; so there is nothing to be told when they change.
    The second graph is built when it is first needed, for each rank and type of the inputs.

    Parameters
    ----------
    own : CachedOp
        What runs the block.
    symbol : Symbol
        The graph in it.
    is_data : list of bool
        Which of its inputs are data and not Parameters.
    flags : list of pair
        What the block is run with.
    """

    def __init__(self, own: Any, symbol: Any, is_data: Sequence[bool], flags: Flags) -> None:
        super().__init__(own, symbol)
        self._data = [i for i, data in enumerate(is_data) if data]
        self._flags = flags
        lean = leaner(symbol)
        if lean is not None:
            self.trains = lean
        # What trains, unless a hook watches: then each node is to be seen.
        self._lean = own if lean is None else self._runner(lean, range(len(is_data)))
        # MXNet lets a static_shape graph write running statistics without telling the engine.
        self._unordered = bool(dict(flags).get("static_shape"))
        self._lock = threading.Lock()
        self._seconds: dict[Kinds, Second | None] = {}
        # What the calls in the graph became for each, as `Rewritten` says it.
        self._became: dict[Kinds, list[tuple[str, str | None, str]]] = {}
        self._observed = False
        self._latest: Any = None

    def __call__(self, *arrays: Array, **options: Any) -> Any:
        """Run the graph that the mode asks for."""
        observed, self._observed = self._observed, False
        first = self._own if observed else self._lean
        kinds = None if observed or options else self._infers(arrays)
        if kinds is None:
            self._wait_for_others(first)
            return first(*arrays, **options)
        try:
            second = self._second(kinds, arrays)
            self._wait_for_others(first if second is None else second)
            if second is not None:
                return second(arrays)
        except mx.MXNetError as error:
            try:
                results = first(*arrays)
            except mx.MXNetError:
                raise error from None  # it is the inputs that are wrong
            self._seconds[kinds] = None
            return results
        return first(*arrays)

    def _register_op_hook(self, callback: Any, monitor_all: bool = False) -> None:
        """Let a hook see the block's own graph: Gluon calls this before each call."""
        self._observed = True
        super()._register_op_hook(callback, monitor_all)

    def _infers(self, arrays: Sequence[Array]) -> Kinds | None:
        """Return what the second graph of a call is known by; None if there can be none for it."""
        if autograd.is_recording() or autograd.is_training():
            return None
        return infers_apart([arrays[i] for i in self._data])

    def inference(self) -> list[tuple[Any, list[tuple[str, str | None, str]]]]:
        """Return each inference graph, None where the block's own infers, and what it was made of.

        There is one for each rank and type of the inputs that it was called with.
        """
        found = [(self._seconds.get(kinds), became) for kinds, became in [*self._became.items()]]
        return [(None if second is None else second.symbol, became) for second, became in found]

    def _second(self, kinds: Kinds, arrays: Sequence[Array]) -> Second | None:
        """Return the second graph for inputs of this rank and type, if there is one."""
        if kinds not in self._seconds:
            with self._lock:
                if kinds not in self._seconds:
                    built = self._built(kinds, arrays)
                    if built is not None:  # no two threads may be the first to run a CachedOp
                        built(arrays)
                        mx.nd.waitall()
                    self._seconds[kinds] = built
        return self._seconds[kinds]

    def _wait_for_others(self, runs: Any) -> None:
        """Wait, where the engine does not, for what the graphs but this one read or write."""
        if self._unordered and self._latest is not None and self._latest is not runs:
            mx.nd.waitall()
        self._latest = runs

    def _built(self, kinds: Kinds, arrays: Sequence[Array]) -> Second | None:
        """Build the second graph for inputs like these; None if no layer gains by it."""
        names = self._symbol.list_inputs()
        given = dict(zip(names, arrays))
        measure = partial(_facts, given=given)
        graph, became = rewrite(self._symbol, (described, compiled), measure, why_kept)
        self._became[kinds] = became
        rewritten = graph is not None
        graph = graph or Graph(self._symbol, amp_casts=True)
        if not infer_only(graph) and not rewritten:
            return None
        symbol = graph.symbol()
        position = {name: i for i, name in enumerate(names)}
        used = [position[name] for name in symbol.list_inputs()]
        if type(self._symbol) is not mx.sym.Symbol:
            symbol = symbol.as_np_ndarray()
        return Second(self._runner(symbol, used), used, symbol)

    def _runner(self, symbol: Any, used: Sequence[int]) -> Any:
        """Return what runs a graph that takes these of the inputs, hybridized as the block is."""
        return _cached_op(symbol, [source in self._data for source in used], self._flags)


def _cached_op(symbol: Any, is_data: Sequence[bool], flags: Flags) -> Any:
    data = [i for i, is_one in enumerate(is_data) if is_one]
    parameters = [i for i, is_one in enumerate(is_data) if not is_one]
    return mx.nd.CachedOp(symbol, [("data_indices", data), ("param_indices", parameters), *flags])


def to_run(own: Any, symbol: Any, text: str, is_data: list[bool], flags: Flags) -> Any:
    """Return what is to run a block whose graph was just built, with a second graph if it may.

    `text` is the JSON of `symbol`.
    """
    has_layers = f'"{KEY}"' in text or f'"op": "{OPERATOR}"' in text
    allowed = free_shape(text, flags)
    if allowed != flags:
        own = _cached_op(symbol, is_data, allowed)
    if not has_layers:
        return Traced(own, symbol) if f'"{LAST}"' in text else own
    if get_backend() != "auto":  # chosen by name: what was traced is what runs
        return Traced(own, symbol)
    return TwoGraphs(own, symbol, is_data, allowed)


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
