"""Third pass: find the rank and dtype of each norm's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mxnet as mx
import numpy as np

from ..._graph.nodes import RANK_VARIES, Graph, Node
from ..._net import BATCH_NORM_OPERATORS
from ..._text import first_line
from .._inference import complete_shapes, infer_types, is_complete
from .state import Lowering, Norm

_SPATIAL = {
    *("Convolution", "Deconvolution", "Pooling"),
    *("_contrib_quantized_conv", "_contrib_quantized_pooling", "_sg_mkldnn_conv"),
}
# Operators whose output has the rank of their first input.
_SAME_RANK = {
    *("Activation", "BlockGrad", "Cast", "Concat", "Dropout", "LeakyReLU", "_copy", "amp_cast"),
    *("clip", "relu", "sigmoid", "tanh"),
    *(f"_contrib_{name}" for name in ("dequantize", "quantize_v2", "requantize")),
    *(f"_{name}_scalar" for name in ("div", "minus", "mul", "plus", "power", "rdiv", "rminus")),
    *(f"elemwise_{name}" for name in ("add", "div", "mul", "sub")),
    *(f"broadcast_{name}" for name in ("add", "div", "mul", "sub")),
    *BATCH_NORM_OPERATORS,
}


def infer(
    lowering: Lowering,
    norms: list[Norm],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, Any],
) -> None:
    """Find rank and dtype of each norm's input, and check that the parameters fit."""
    graph, values = lowering.graph, lowering.values
    sources = [norm.node.inputs[0] for norm in norms]
    part = graph.symbol([*graph.heads, *sources])
    types, found = types_and_shapes(part, values, shapes, dtypes)
    ranks = ranks_of(graph) if found is None else {}
    unsteady = graph.without_rank()
    for i, norm in enumerate(norms, start=len(graph.heads)):
        norm.dtype = types[i] or norm.dtype
        shape = found[i] if found else None
        norm.rank = len(shape) if shape else ranks.get(norm.node.inputs[0].node)
        _check(norm, shape)
        if norm.node.inputs[0].node in unsteady:  # what is right for these shapes is not for others
            norm.rank, norm.why_no_rank = None, RANK_VARIES


def types_and_shapes(
    symbol: Any,
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, Any],
) -> tuple[Sequence[np.dtype[Any] | None], list[tuple[int, ...]] | None]:
    """Return dtypes and shapes of a symbol's outputs; None where they are not known.

    Raises
    ------
    ValueError
        If the parameters or the shapes do not match the symbol.
    """
    try:
        _, types = infer_types(symbol, values, dtypes) if values else ([], [None] * len(symbol))
        return types, _shapes(symbol, values, shapes)
    except (mx.MXNetError, ValueError) as error:
        raise ValueError(
            "the parameters or the shapes of the inputs do not match the symbol: "
            f"{first_line(error.__cause__ or error)}"
        ) from error


def _shapes(
    symbol: Any, values: Mapping[str, Any], given: Mapping[str, tuple[int, ...]]
) -> list[tuple[int, ...]] | None:
    """Return the shapes of a symbol's outputs; None if those of its inputs are not all known."""
    shapes = complete_shapes(symbol, values, given)
    if not all(is_complete(shapes.get(name)) for name in symbol.list_inputs()):
        return None
    _, found, _ = symbol.infer_shape_partial(**{n: shapes[n] for n in symbol.list_inputs()})
    return list(found)


def _check(norm: Norm, shape: tuple[int, ...] | None) -> None:
    name, channels = norm.node.name, len(norm.scale)
    if norm.rank is not None and not -norm.rank <= norm.axis < norm.rank:
        raise ValueError(
            f"axis={norm.axis} of {name!r} is out of range: its input has {norm.rank} axes"
        )
    if shape and shape[norm.axis] not in (-1, 0, channels):
        raise ValueError(
            f"{name!r} has parameters for {channels} channels, its input has shape {shape} and "
            f"axis={norm.axis}"
        )


def ranks_of(graph: Graph) -> dict[Node, int]:
    """Return the ranks that follow from the operators alone, where no shapes are known.

    MXNet's own inference fails on lengths that are not known yet, in Pooling for one.
    """
    ranks: dict[Node, int] = {}
    order = graph.nodes()
    for node in order:
        if node.op in _SPATIAL and node.integers("kernel"):
            ranks[node.inputs[0].node] = 2 + len(node.integers("kernel"))
    for node in reversed(order):  # from a convolution back to the input of the graph
        if node in ranks and node.op in _SAME_RANK:
            ranks.setdefault(node.inputs[0].node, ranks[node])
    for node in order:
        if node.op in _SPATIAL and node.integers("kernel"):
            ranks[node] = 2 + len(node.integers("kernel"))
        elif node.op == "Flatten" or (node.op == "FullyConnected" and node.flag("flatten", True)):
            ranks[node] = 2
        elif node.op in _SAME_RANK | _SPATIAL:
            known = [ranks[source.node] for source in node.inputs if source.node in ranks]
            if known:
                ranks.setdefault(node, known[0])
    return ranks
