"""Non-maximum suppression, class by class if asked for.

ONNX's own operator takes scores per class, where MXNet's takes the class as a column. The greedy
choice is a recurrence: each box, from the best on, drops the later ones that it covers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from .._emitter import Emitter
from .registry import translates

_LOWEST = float(np.finfo(np.float32).min)


@translates("_contrib_box_nms")
def box_nms(t: Emitter) -> str:
    """Sort boxes by score, keep the best of those that overlap, and fill the rest with -1."""
    *lead, boxes, width = t.tensors[0].shape
    if boxes is None or width is None or None in lead[1:]:
        raise ValueError("the number of boxes must not depend on the batch")
    if t.dtype != np.float32:
        raise ValueError(f"boxes must be float32, got {t.dtype}")
    topk = t.attributes.integer("topk")
    count = min(topk, boxes) if topk > 0 else boxes
    data = t.add("Reshape", t.inputs[0], t.integers([-1, boxes, width]))

    key = _sort_key(t, data)
    best = t.add("TopK", key, t.integers([count]), outputs=2, axis=1)
    rows = _rows(t, data, f"{best}_1", width)
    valid = t.cast(t.add("Greater", best, t.constant(_LOWEST)), "float32")
    kept = _greedy(t, _covers(t, rows, count), valid, count)

    # Kept boxes first, in their order.
    order = t.add("Mul", kept, t.constant(2 * count))
    order = t.add("Sub", order, t.constant(np.arange(count)))
    order = t.add("TopK", order, t.integers([count]), outputs=2, axis=1)
    result = _rows(t, _converted(t, rows, width), f"{order}_1", width)
    is_kept = t.add("Greater", order, t.constant(0))
    is_kept = t.add("Reshape", is_kept, t.integers([-1, count, 1]))
    result = t.add("Where", is_kept, result, t.constant(-1))
    if count < boxes:
        pads = t.integers([0, 0, 0, 0, boxes - count, 0])
        result = t.add("Pad", result, pads, t.constant(-1), mode="constant")
    return t.reshape(result, t.out.shape)


def _column(t: Emitter, data: str, start: int, stop: int | None = None) -> str:
    stop = start + 1 if stop is None else stop
    return t.add("Slice", data, t.integers([start]), t.integers([stop]), t.integers([2]))


def _rows(t: Emitter, data: str, numbers: str, width: int) -> str:
    """Take rows of each example; `numbers` is (batch, count)."""
    numbers = t.add("Reshape", numbers, t.integers([0, 0, 1]))
    numbers = t.add("Expand", numbers, t.integers([1, 1, width]))
    return t.add("GatherElements", data, numbers, axis=1)


def _sort_key(t: Emitter, data: str) -> str:
    """Return the scores, with the lowest number in place of boxes that do not take part."""
    score = _column(t, data, t.attributes.integer("score_index"))
    takes_part = t.add("Greater", score, t.constant(t.attributes.number("valid_thresh")))
    kind = t.attributes.integer("id_index")
    if kind >= 0:
        background = t.constant(t.attributes.integer("background_id"))
        other = t.add("Not", t.add("Equal", _column(t, data, kind), background))
        takes_part = t.add("And", takes_part, other)
    key = t.add("Where", takes_part, score, t.constant(_LOWEST))
    return t.add("Reshape", key, t.integers([0, -1]))


def _covers(t: Emitter, rows: str, count: int) -> str:
    """Return (batch, count, count): 1 where a box overlaps a later one too far."""
    start = t.attributes.integer("coord_start")
    a, b, c, d = (_column(t, rows, start + i) for i in range(4))
    if t.attributes.text("in_format") == "center":
        a, b, c, d = _corners(t, a, b, c, d)
    across = {corner: t.add("Transpose", corner, perm=[0, 2, 1]) for corner in (a, b, c, d)}
    zero = t.constant(0)

    def length(low: str, high: str) -> str:
        top = t.add("Min", high, across[high])
        return t.add("Max", t.add("Sub", top, t.add("Max", low, across[low])), zero)

    def side(low: str, high: str) -> str:
        return t.add("Max", t.add("Sub", high, low), zero)

    common = t.add("Mul", length(a, c), length(b, d))
    area = t.add("Mul", side(a, c), side(b, d))
    both = t.add("Add", area, t.add("Transpose", area, perm=[0, 2, 1]))
    overlap = t.add("Div", common, t.add("Sub", both, common))
    covers = t.add("Greater", overlap, t.constant(t.attributes.number("overlap_thresh")))
    covers = t.add("And", covers, t.constant(np.triu(np.ones((count, count)), 1), bool))
    kind = t.attributes.integer("id_index")
    if kind >= 0 and not t.attributes.flag("force_suppress"):
        classes = _column(t, rows, kind)
        same = t.add("Equal", classes, t.add("Transpose", classes, perm=[0, 2, 1]))
        covers = t.add("And", covers, same)
    return t.cast(covers, "float32")


def _corners(t: Emitter, x: str, y: str, width: str, height: str) -> tuple[str, ...]:
    half = t.constant(0.5)
    across, down = t.add("Mul", width, half), t.add("Mul", height, half)
    corners = [("Sub", x, across), ("Sub", y, down), ("Add", x, across), ("Add", y, down)]
    return tuple(t.add(*corner) for corner in corners)


def _converted(t: Emitter, rows: str, width: int) -> str:
    """Write the coordinates in the form of the output."""
    source, target = t.attributes.text("in_format"), t.attributes.text("out_format")
    if source == target:
        return rows
    start = t.attributes.integer("coord_start")
    a, b, c, d = (_column(t, rows, start + i) for i in range(4))
    if target == "corner":
        new = _corners(t, a, b, c, d)
    else:
        half = t.constant(0.5)
        new = (
            t.add("Mul", t.add("Add", a, c), half),
            t.add("Mul", t.add("Add", b, d), half),
            t.add("Sub", c, a),
            t.add("Sub", d, b),
        )
    parts = [_column(t, rows, 0, start)] if start else []
    parts += new
    parts += [_column(t, rows, start + 4, width)] if start + 4 < width else []
    return t.add("Concat", *parts, axis=2)


def _greedy(t: Emitter, covers: str, valid: str, count: int) -> str:
    """Go through the boxes: one that is still kept drops those that it covers."""

    def info(name: str, shape: list[int | None]) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    # Names in the body must be none of the graph around it.
    kept, row, this, is_kept, dropped, lost, left = (f":body:{i}" for i in range(7))
    body = helper.make_graph(
        [
            helper.make_node("MatMul", [kept, this], [is_kept]),
            helper.make_node("Mul", [is_kept, row], [dropped]),
            helper.make_node("Mul", [kept, dropped], [lost]),
            helper.make_node("Sub", [kept, lost], [left]),
        ],
        "keep_or_drop",
        [info(kept, [None, count]), info(row, [None, count]), info(this, [count, 1])],
        [info(left, [None, count])],
    )
    each = t.constant(np.eye(count)[:, :, None])
    attrs: dict[str, Any] = {"num_scan_inputs": 2, "scan_input_axes": [1, 0]}
    return t.add("Scan", valid, covers, each, body=body, **attrs)
