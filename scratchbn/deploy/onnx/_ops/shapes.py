"""What only changes shapes: the result's is known, all but the batch."""

from __future__ import annotations

from .._emitter import Emitter
from .registry import translates


@translates("Reshape", "reshape_like", "expand_dims", "squeeze")
def reshape(t: Emitter) -> str:
    """Give an array the shape that was inferred for the result."""
    return t.reshape(t.inputs[0], t.out.shape)


@translates("Crop")
def crop(t: Emitter) -> str:
    """Cut a rectangle out of an image, at an offset or from its middle."""
    start = [0, 0]
    ends = []
    offset = t.attributes.integers("offset") or (0, 0)
    for i, (length, size) in enumerate(zip(t.tensors[0].shape[2:], t.out.shape[2:])):
        if length is None or size is None:
            raise ValueError("the lengths that are cropped must not depend on the batch")
        start[i] = (length - size) // 2 if t.attributes.flag("center_crop") else offset[i]
        ends.append(start[i] + size)
    return t.add("Slice", t.inputs[0], t.integers(start), t.integers(ends), t.integers([2, 3]))
