"""Shapes and types of all that a graph computes, and which lengths follow the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mxnet as mx
import numpy as np

from ..._text import first_line
from .._ir import Graph, Node

Shape = tuple[int, ...]
Place = tuple[Node, int]


@dataclass(frozen=True)
class Tensor:
    """What is known of one output of a node; a length that follows the batch is None."""

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)


def places_of(graph: Graph) -> list[Place]:
    """Return the outputs that are used, each after those that it is computed from."""
    used = {(output.node, output.number) for output in graph.used()}
    order = {node: i for i, node in enumerate(graph.nodes())}
    return sorted(used, key=lambda place: (order[place[0]], place[1]))


def tensors_of(
    graph: Graph,
    symbol: Any,
    places: list[Place],
    values: Mapping[str, Any],
    inputs: Mapping[str, Any],
    others: list[dict[str, Shape]],
) -> dict[Place, Tensor]:
    """Infer shapes and types of `places`, which are the outputs of `symbol`.

    `others` are further shapes that the inputs may have: lengths that differ there are None.
    """
    named = set(symbol.list_inputs())
    dtypes = {k: v.dtype for k, v in {**values, **inputs}.items() if k in named}
    shapes = [_shapes(symbol, values, {k: v.shape for k, v in inputs.items()})]
    shapes += [_shapes(symbol, values, other) for other in others]
    try:
        _, types, _ = symbol.infer_type(**dtypes)
    except mx.MXNetError as error:
        raise ValueError(f"the types in the graph do not fit: {first_line(error)}") from error
    if types is None:
        raise ValueError("the types in the graph cannot be inferred from those of its inputs")
    tensors = {}
    for place, dtype, first, *more in zip(places, types, *shapes):
        lengths = zip(first, *more)
        shape = tuple(n if all(m == n for m in rest) else None for n, *rest in lengths)
        tensors[place] = Tensor(shape, np.dtype(dtype))
    return tensors


def _shapes(symbol: Any, values: Mapping[str, Any], inputs: Mapping[str, Shape]) -> list[Shape]:
    known = {name: value.shape for name, value in values.items()} | dict(inputs)
    try:
        _, shapes, _ = symbol.infer_shape(**{k: known[k] for k in symbol.list_inputs()})
    except mx.MXNetError as error:
        raise ValueError(f"the graph cannot run on {dict(inputs)}: {first_line(error)}") from error
    if shapes is None:
        raise ValueError(f"the shapes in the graph cannot be inferred from {dict(inputs)}")
    return list(shapes)
