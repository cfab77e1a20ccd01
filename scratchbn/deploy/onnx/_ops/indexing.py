"""Rows taken by number, where numbers out of range mean what they mean in MXNet."""

from __future__ import annotations

from .._emitter import Emitter
from .registry import translates


@translates("Embedding")
def embedding(t: Emitter) -> str:
    """Take rows of a matrix; a number out of range takes the first or the last."""
    numbers, weight = t.inputs
    return t.add("Gather", weight, _clipped(t, numbers, t.tensors[1].shape[0]))


@translates("take")
def take(t: Emitter) -> str:
    """Take slices along an axis."""
    x, numbers = t.inputs
    axis = t.attributes.integer("axis")
    length = t.tensors[0].shape[axis]
    mode = t.attributes.text("mode")
    if mode == "clip":
        numbers = _clipped(t, numbers, length)
    elif mode == "wrap" and length is not None:
        whole = t.cast(numbers, "int64")
        numbers = t.add("Mod", whole, t.constant(length, "int64"))
    else:
        raise ValueError(f"mode={mode!r} is not supported")
    return t.add("Gather", x, numbers, axis=axis)


def _clipped(t: Emitter, numbers: str, length: int | None) -> str:
    if length is None:
        raise ValueError("the length that is indexed must not depend on the batch")
    whole = t.cast(numbers, "int64")
    return t.add("Clip", whole, t.constant(0, "int64"), t.constant(length - 1, "int64"))
