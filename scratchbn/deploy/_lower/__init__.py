"""Rewrite the graph of a trained net for inference, in five passes over the symbol's JSON.

Parameter values are known when a graph is written to files, not when it is traced. So a batch
normalization is one node until here (a marker of :func:`scratchbn.backends.marker`, or MXNet's
``BatchNorm``), and becomes one multiplication and one addition per channel, ``scale * x + shift``,
or disappears in the weights of the layer before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._graph.nodes import Graph, Node, Output
from .._report import FoldReport
from .emit import emit
from .fold import fold
from .infer import infer
from .read import read
from .simplify import simplify
from .state import STYLES, Lowering

__all__ = ["STYLES", "lower"]


def lower(
    graph: Graph,
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, Any],
    *,
    folding: bool,
    style: str,
) -> tuple[Any, dict[str, Any], FoldReport]:
    """Lower a graph, in place; return its symbol, the parameters it needs, and the report.

    `shapes` and `dtypes` are those of the inputs, as far as they are known.
    """
    lowering = Lowering(graph, dict(values), [head.node.name for head in graph.heads])
    simplify(lowering)
    norms = read(lowering)
    infer(lowering, norms, shapes, dtypes)
    lowering.variables = graph.variables()
    remaining = fold(lowering, norms) if folding else [(norm, "fold=False") for norm in norms]
    for norm, reason in remaining:
        emit(lowering, norm, reason, style)
    _keep_names(lowering)
    needed = _finish(lowering)
    return graph.symbol(), needed, FoldReport(tuple(lowering.folded), tuple(lowering.kept))


def _keep_names(lowering: Lowering) -> None:
    """Give outputs their names back where the node of that name is gone: a Dropout, say."""
    heads = lowering.graph.heads
    for i, (head, name) in enumerate(zip(heads, lowering.outputs)):
        if head.node.name != name:
            heads[i] = Output(Node("_copy", name, {}, [head]))


def _finish(lowering: Lowering) -> dict[str, Any]:
    """Make a graph that can run by itself; return the parameters that it needs."""
    graph = lowering.graph
    for node in graph.nodes():
        # MXNet fuses a convolution and a sum on a CPU, and fails if it is the sum of it and itself.
        if node.op == "elemwise_add" and node.inputs[0] == node.inputs[1]:
            node.op, node.attrs, node.inputs = "_mul_scalar", {"scalar": "2"}, node.inputs[:1]
    variables = graph.variables()
    values = {name: lowering.values[name] for name in variables if name in lowering.values}
    for name, value in values.items():
        # Module infers shapes from the inputs alone, which no broadcast operator can.
        variables[name].attrs["__shape__"] = str(value.shape)
    return values
