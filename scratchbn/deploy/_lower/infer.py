"""Third pass: find the rank and dtype of each norm's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mxnet as mx
import numpy as np

from ..._net import BATCH_NORM_OPERATORS
from ..._text import first_line
from .._ir import Graph, Node
from .state import Lowering, Norm

_SPATIAL = {"Convolution", "Deconvolution", "Pooling"}
# Operators whose output has the rank of their first input.
_SAME_RANK = {
    *("Activation", "BlockGrad", "Cast", "Concat", "Dropout", "LeakyReLU", "_copy", "amp_cast"),
    *("clip", "relu", "sigmoid", "tanh"),
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
    part = graph.symbol([*graph.heads, *(norm.node.inputs[0] for norm in norms)])
    names = part.list_inputs()
    dtypes = {name: value.dtype for name, value in values.items()} | dict(dtypes)
    shapes = {name: value.shape for name, value in values.items()} | dict(shapes)
    found = None
    try:
        _, types, _ = part.infer_type_partial(**{n: dtypes[n] for n in names if n in dtypes})
        if all(min(shapes.get(name, (0,)), default=1) > 0 for name in names):
            _, found, _ = part.infer_shape_partial(**{n: shapes[n] for n in names})
    except mx.MXNetError as error:
        raise ValueError(
            "the parameters or the shapes of the inputs do not match the symbol: "
            f"{first_line(error)}"
        ) from error
    ranks = ranks_of(graph) if found is None else {}
    for i, norm in enumerate(norms, start=len(graph.heads)):
        norm.dtype = np.dtype(types[i]) if types and types[i] else norm.dtype
        shape = found[i] if found else None
        norm.rank = len(shape) if shape else ranks.get(norm.node.inputs[0].node)
        _check(norm, shape)


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
