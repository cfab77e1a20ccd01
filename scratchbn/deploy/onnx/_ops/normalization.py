"""Normalizations that are computed from the data: over layers, groups, vectors."""

from __future__ import annotations

from .._emitter import Emitter
from .registry import translates


@translates("LayerNorm")
def layer_norm(t: Emitter) -> str:
    """Normalize along one axis; scale and shift along it."""
    x, gamma, beta = t.inputs
    rank = t.tensors[0].rank
    axis = t.attributes.integer("axis") % rank
    normal = _normalized(t, x, [axis])
    scaled = t.add("Mul", normal, t.per_channel(gamma, axis, rank))
    return t.add("Add", scaled, t.per_channel(beta, axis, rank))


@translates("InstanceNorm")
def instance_norm(t: Emitter) -> str:
    """Normalize each channel of each image; scale and shift per channel."""
    x, gamma, beta = t.inputs
    rank = t.tensors[0].rank
    normal = _normalized(t, x, list(range(2, rank)))
    scaled = t.add("Mul", normal, t.per_channel(gamma, 1, rank))
    return t.add("Add", scaled, t.per_channel(beta, 1, rank))


@translates("GroupNorm")
def group_norm(t: Emitter) -> str:
    """Normalize groups of channels; MXNet scales and shifts per group."""
    x, gamma, beta = t.inputs
    shape, groups = t.tensors[0].shape, t.attributes.integer("num_groups")
    grouped = t.reshape(x, (shape[0], groups, _rest(t, groups)))
    normal = _normalized(t, grouped, [2])
    scaled = t.add("Mul", normal, t.per_channel(gamma, 1, 3))
    return t.reshape(t.add("Add", scaled, t.per_channel(beta, 1, 3)), shape)


def _rest(t: Emitter, groups: int) -> int:
    total = 1
    for length in t.tensors[0].shape[1:]:
        if length is None:
            raise ValueError("the lengths that are normalized must not depend on the batch")
        total *= length
    return total // groups


def _normalized(t: Emitter, x: str, axes: list[int]) -> str:
    """Subtract the mean along axes and divide by the standard deviation."""
    centred = t.add("Sub", x, t.reduce("ReduceMean", x, axes))
    variance = t.reduce("ReduceMean", t.add("Mul", centred, centred), axes)
    total = t.add("Add", variance, t.constant(t.attributes.number("eps")))
    return t.add("Div", centred, t.add("Sqrt", total))


@translates("L2Normalization")
def l2_normalization(t: Emitter) -> str:
    """Divide by the length of vectors: across channels, space, or all of an example."""
    (x,) = t.inputs
    rank = t.tensors[0].rank
    axes = {"channel": [1], "spatial": list(range(2, rank)), "instance": list(range(1, rank))}
    squares = t.reduce("ReduceSum", t.add("Mul", x, x), axes[str(t.attributes.text("mode"))])
    total = t.add("Add", squares, t.constant(t.attributes.number("eps")))
    return t.add("Div", x, t.add("Sqrt", total))
