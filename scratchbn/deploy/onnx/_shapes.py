"""Shapes and types of all that a graph computes, and which lengths follow the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import mxnet as mx
import numpy as np

from ..._graph.nodes import Graph, Node
from ..._text import first_line

Shape = tuple[int, ...]
Place = tuple[Node, int]

_RESHAPES = {"Reshape", "reshape_like", "_np_reshape", "_npx_reshape"}


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


@dataclass(frozen=True)
class Inference:
    """A graph whose shapes and types are to be inferred; `symbol` has `places` as outputs."""

    symbol: Any
    places: list[Place]
    values: Mapping[str, Any]

    def shapes(self, inputs: Mapping[str, Shape]) -> dict[Place, Shape]:
        """Return all shapes; ValueError if the graph cannot run on such inputs."""
        known = {name: value.shape for name, value in self.values.items()} | dict(inputs)
        try:
            _, found, _ = self.symbol.infer_shape(**{k: known[k] for k in self._names()})
        except mx.MXNetError as error:
            raise ValueError(
                f"the graph cannot run on {dict(inputs)}: {first_line(error)}"
            ) from error
        if found is None:
            raise ValueError(f"the shapes in the graph cannot be inferred from {dict(inputs)}")
        shapes = dict(zip(self.places, found))
        for (node, number), shape in shapes.items():
            # MXNet does not check this, and would read beyond the array.
            if node.op in _RESHAPES and number == 0:
                before = shapes[node.inputs[0].node, node.inputs[0].number]
                if prod(before) != prod(shape):
                    raise ValueError(
                        f"node {node.name!r} ({node.op}) cannot give {before} the shape {shape}"
                    )
        return shapes

    def types(self, inputs: Mapping[str, Any]) -> dict[Place, np.dtype[Any]]:
        """Return all types, from those of the inputs."""
        arrays = {**self.values, **inputs}
        try:
            _, found, _ = self.symbol.infer_type(**{k: arrays[k].dtype for k in self._names()})
        except mx.MXNetError as error:
            raise ValueError(f"the types in the graph do not fit: {first_line(error)}") from error
        if found is None:
            raise ValueError("the types in the graph cannot be inferred from those of its inputs")
        return {place: np.dtype(dtype) for place, dtype in zip(self.places, found)}

    def tensors(
        self, inputs: Mapping[str, Any], others: list[dict[str, Shape]]
    ) -> dict[Place, Tensor]:
        """Return shapes and types.

        `others` are further shapes that the inputs may have: lengths that differ there are None.
        """
        types = self.types(inputs)
        first = self.shapes({name: array.shape for name, array in inputs.items()})
        more = [self.shapes(other) for other in others]
        for (node, number), shape in first.items():
            if any(len(shapes[node, number]) != len(shape) for shapes in more):
                raise ValueError(
                    f"node {node.name!r} ({node.op}) has another number of axes on another batch, "
                    "which only dynamic_batch=False can leave out"
                )
        return {
            place: Tensor(_common(shape, [shapes[place] for shapes in more]), types[place])
            for place, shape in first.items()
        }

    def _names(self) -> list[str]:
        names: list[str] = self.symbol.list_inputs()
        return names


def _common(shape: Shape, others: list[Shape]) -> tuple[int | None, ...]:
    return tuple(
        length if all(other[axis] == length for other in others) else None
        for axis, length in enumerate(shape)
    )
