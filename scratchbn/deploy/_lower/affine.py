"""One scale and one shift per channel, and the operators that it can be moved past."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..._graph.nodes import Node
from .state import Obstacle

SCALARS = {"_plus_scalar", "_minus_scalar", "_rminus_scalar", "_mul_scalar", "_div_scalar"}


@dataclass(frozen=True)
class Affine:
    """A scale and a shift for each channel of an array, on `axis`; `rank` is its, if known."""

    scale: np.ndarray
    shift: np.ndarray
    axis: int
    rank: int | None

    def after(self, factor: float, term: float) -> Affine:
        """Return what this is on x if it is on ``factor * x + term``."""
        return Affine(self.scale * factor, self.scale * term + self.shift, self.axis, self.rank)

    def part(self, start: int, stop: int) -> Affine:
        """Return this for some of the channels."""
        return Affine(self.scale[start:stop], self.shift[start:stop], self.axis, self.rank)

    def has_axis(self, axis: int) -> bool:
        """Tell whether an axis of the array is that of the channels."""
        rank = self.rank
        return self.axis == axis if rank is None else self.axis % rank == axis % rank


def arithmetic(node: Node) -> tuple[float, float]:
    """Return the factor and the term of an operator with a scalar."""
    scalar = node.number("scalar", 1)
    if node.op == "_div_scalar" and scalar == 0:
        raise Obstacle(f"{node.name} divides by 0")
    return {
        "_plus_scalar": lambda: (1.0, scalar),
        "_minus_scalar": lambda: (1.0, -scalar),
        "_rminus_scalar": lambda: (-1.0, scalar),
        "_mul_scalar": lambda: (scalar, 0.0),
        "_div_scalar": lambda: (1 / scalar, 0.0),
    }[node.op]()


def keeps_channels(node: Node) -> bool:
    """Tell whether a reshape keeps axis 1, given that it has as many channels after as before.

    As many channels after flattening as before are those of a map of 1 by 1.
    """
    if node.op == "Flatten":
        return True
    if node.op != "Reshape" or node.flag("reverse", False):
        return False
    first, second, *rest = (*node.integers("shape"), None, None)[:-2] or (None, None)
    ones = all(length == 1 for length in rest)
    dense = node.inputs[0].node.op == "FullyConnected" and node.inputs[0].node.flag("flatten", True)
    kept = first == 0 and second == 0
    flattened = first == 0 and second is not None and (second == -1 or second > 0) and ones
    of_dense = dense and first == -1 and second is not None and second > 0 and ones
    return kept or flattened or of_dense
