"""Sums, means, extremes and norms along axes."""

from __future__ import annotations

from .._emitter import Emitter
from .registry import translates

_REDUCTIONS = {
    "mean": "ReduceMean",
    "max": "ReduceMax",
    "min": "ReduceMin",
    "sum": "ReduceSum",
    "prod": "ReduceProd",
}


@translates(*_REDUCTIONS)
def reduction(t: Emitter) -> str:
    """Reduce along some axes, or along all but these."""
    return _reduced(t, _REDUCTIONS[t.node.op], t.attributes.flag("exclude"))


@translates("norm")
def norm(t: Emitter) -> str:
    """Return the length of vectors: Euclidean, or the sum of absolute values."""
    op = {1: "ReduceL1", 2: "ReduceL2"}.get(t.attributes.integer("ord"))
    if op is None:
        raise ValueError(f"ord must be 1 or 2, got {t.attributes.text('ord')}")
    return _reduced(t, op, False)


def _reduced(t: Emitter, op: str, exclude: bool) -> str:
    (x,) = t.inputs
    rank = t.tensors[0].rank
    axes = {axis % rank for axis in t.attributes.integers("axis") or range(rank)}
    if exclude and t.attributes.integers("axis"):
        axes = set(range(rank)) - axes
    if t.out.dtype != t.dtype:
        x = t.cast(x, t.out.dtype)
    if not axes:
        return t.add("Identity", x)
    keepdims = t.attributes.flag("keepdims")
    y = t.reduce(op, x, sorted(axes), keepdims)
    if not keepdims and len(axes) == rank and t.out.shape == (1,):
        return t.reshape(y, (1,))  # MXNet has no scalars
    return y
