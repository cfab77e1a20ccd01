"""The state that the passes share: the graph, the parameters' values, and the report so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mxnet as mx
import numpy as np

from ..._graph.nodes import Graph, Node, Output
from .._report import Outcome

STYLES = ("dwconv", "affine", "batchnorm")


class Obstacle(Exception):
    """The reason why a norm cannot be folded."""


@dataclass
class Norm:
    """A batch normalization in inference, of C channels on `axis`, as ``scale * x + shift``.

    `scale` and `shift` are float64. `original` has the attributes and parameters for a BatchNorm
    node, unless two norms were merged. `rank` is that of its input.
    """

    node: Node
    axis: int
    scale: np.ndarray
    shift: np.ndarray
    original: tuple[dict[str, str], dict[str, np.ndarray]] | None
    dtype: np.dtype[Any]
    relu: bool = False
    rank: int | None = None
    why_no_rank: str = "the rank of its input is unknown: give the input shapes"

    def channel_axis(self) -> int:
        """Return the axis counted from the start if the rank is known."""
        return self.axis if self.rank is None else self.axis % self.rank

    def with_relu(self, source: Output) -> Output:
        """Return `source` behind the relu of this norm."""
        node = Node("Activation", self.node.name, {"act_type": "relu"}, [source])
        return Output(node)


@dataclass
class Lowering:
    """A graph on its way to its inference form; `variables` are known once it is simplified.

    `outputs` are the names of the nodes that were its heads.
    """

    graph: Graph
    values: dict[str, Any]
    outputs: list[str]
    folded: list[Outcome] = field(default_factory=list)
    kept: list[Outcome] = field(default_factory=list)
    variables: dict[str, Node] = field(default_factory=dict)

    def value(self, name: str) -> np.ndarray:
        """Return a parameter as float64."""
        value: np.ndarray = self.values[name].asnumpy()
        return value.astype(np.float64)

    def variable(self, name: str, array: Any) -> Output:
        """Return a variable of that value; it gets another name if that one has another value."""
        unique, count = name, 0
        while unique in self.variables and not _same(self.values.get(unique), array):
            count += 1
            unique = f"{name}_{count}"
        node = self.variables.setdefault(unique, Node("null", unique))
        self.values[unique] = array
        return Output(node)


def rounded(value: np.ndarray, dtype: Any) -> Any:
    """Return an NDArray, or None if finite values overflow its dtype."""
    with np.errstate(over="ignore"):
        array = value.astype(dtype)
    if (np.isfinite(value) & ~np.isfinite(array)).any():
        return None
    return mx.nd.array(array, ctx=mx.cpu(), dtype=array.dtype)


def _same(one: Any, other: Any) -> bool:
    return (
        one is not None
        and one.shape == other.shape
        and one.dtype == other.dtype
        and np.array_equal(one.asnumpy(), other.asnumpy(), equal_nan=True)
    )
