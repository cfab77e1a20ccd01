"""A second graph for a hybridized block, from which its norm layers can be observed.

In a graph no Python runs, so no hook of a layer is called. The twin has the same operators, and
returns the inputs and outputs of the norm layers beside the block's own results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mxnet as mx
from mxnet.gluon import Block

from .._graph.arrays import is_symbol
from .._graph.trace import executing
from .._hidden import HiddenNorm, with_observed
from .._net import build_cached_op, cached_op, inputs_of_cached_op, retrace, set_cached_op
from ..backends import get_backend, use_backend
from ..backends.traced import Traced

Array = Any
TracedCall = tuple[Any, Array, Array]  # a layer, its input and its output


class GraphTwin:
    """Stands in for the CachedOp of a hybridized block, for one call.

    It is a CachedOp by duck typing. Gluon calls whatever it finds in that place with the block's
    inputs and Parameters, and takes a list of results: a `__call__` is all it needs, and
    `_register_op_hook` if the user has set such a hook. `observe` is then called with the layer,
    input and output of each call of one of the `layers`, of those that are nodes of an imported
    graph (:class:`~scratchbn._hidden.HiddenNorm`) too.
    """

    def __init__(
        self,
        block: Any,
        inputs: tuple[Any, ...],
        layers: list[Any],
        observe: Callable[[Any, Array, Array], None],
    ) -> None:
        build_cached_op(block, inputs)
        self._block = block
        self._own_op = cached_op(block)
        self._observe = observe
        self._op: Any = None
        # The layers may have been traced with another backend than would be chosen now. The order
        # of a graph's inputs tells: the compiled operator reads gamma before the statistics.
        blocks = [layer for layer in layers if isinstance(layer, Block)]
        hidden = [layer for layer in layers if isinstance(layer, HiddenNorm)]
        for backend in dict.fromkeys((get_backend(), "auto", "portable")):
            with use_backend(backend), executing(), _calls_of(blocks) as calls:
                data, graph = retrace(block, inputs)
            results = list(graph.as_nd_ndarray())
            observable = _inside(results, calls)
            pairs = [array for _, *pair in observable for array in pair]
            symbol = mx.sym.Group([*results, *map(mx.sym.BlockGrad, pairs)])
            observed = [layer for layer, *_ in observable]
            if hidden:
                symbol, more = with_observed(symbol, hidden)
                observed += more
            arguments = inputs_of_cached_op(block, data)
            if observed and symbol.list_inputs() == [name for _, name in arguments]:
                self._length = len(results)
                self._layers = observed
                compiled = _compiled(symbol, graph, [is_data for is_data, _ in arguments])
                self._op = Traced(compiled, symbol)
                break

    def is_current(self) -> bool:
        """Tell whether the block's own graph is the one this was made for."""
        return cached_op(self._block) is self._own_op

    def enter(self) -> None:
        """Take the place of the block's graph for its next call."""
        if self._op is not None:
            set_cached_op(self._block, self)

    def leave(self) -> None:
        """Give the block its graph back."""
        if cached_op(self._block) is self:
            set_cached_op(self._block, self._own_op)

    def __call__(self, *arrays: Array) -> list[Array]:
        """Run as the block's graph does, and report the layers."""
        self.leave()
        results = self._op(*arrays)
        pairs = iter(results[self._length :])
        for layer, x, y in zip(self._layers, pairs, pairs):
            self._observe(layer, x, y)
        return results[: self._length]

    def _register_op_hook(self, callback: Any, monitor_all: bool = False) -> None:
        self._op._register_op_hook(callback, monitor_all)


@contextmanager
def _calls_of(layers: list[Any]) -> Iterator[list[TracedCall]]:
    """Collect the calls of layers on symbols."""
    calls: list[TracedCall] = []

    def collect(layer: Any, inputs: tuple[Array, ...], output: Array) -> None:
        if is_symbol(output):
            calls.append((layer, inputs[0].as_nd_ndarray(), output.as_nd_ndarray()))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(collect).detach)
        yield calls


def _inside(results: list[Array], calls: list[TracedCall]) -> list[TracedCall]:
    """Return the calls that are part of a graph.

    A layer whose result is not used is no part of it, and to return it would make it run; one in a
    loop is part of another graph.
    """

    def size(symbols: list[Array]) -> int:
        return len(mx.sym.Group(symbols).get_internals().list_outputs())

    inside = size(results)
    if size([*results, *(array for _, *pair in calls for array in pair)]) == inside:
        return calls
    return [call for call in calls if size([*results, *call[1:]]) == inside]


def _compiled(symbol: Array, graph: Array, is_data: list[bool]) -> Any:
    """Make a graph executable, with or without NumPy semantics as another one."""
    if type(graph) is not mx.sym.Symbol:
        symbol = symbol.as_np_ndarray()
    indices = {
        flag: [i for i, given in enumerate(is_data) if given == flag] for flag in (True, False)
    }
    # No static_alloc: it keeps memory of its own.
    return mx.nd.CachedOp(
        symbol, [("data_indices", indices[True]), ("param_indices", indices[False])]
    )
