"""Pooling. Windows may stick out of the padded input; each convention counts what it counts."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .._emitter import Emitter
from .layers import check_layout
from .registry import translates

_GLOBAL = {"max": "GlobalMaxPool", "avg": "GlobalAveragePool", "lp": "GlobalLpPool"}


@translates("Pooling")
def pooling(t: Emitter) -> str:
    """Pool, with the padding written out in full, so that no convention is left to the reader."""
    check_layout(t)
    kind = t.attributes.text("pool_type")
    power = {"p": t.attributes.integer("p_value")} if kind == "lp" else {}
    (x,) = t.inputs
    spatial = range(2, t.tensors[0].rank)
    if t.attributes.flag("global_pool"):
        if kind == "sum":
            return t.reduce("ReduceSum", x, list(spatial))
        return t.add(_GLOBAL[str(kind)], x, **power)
    if t.attributes.text("pooling_convention") == "same":
        raise ValueError("pooling_convention='same' is not supported")
    kernel = list(t.attributes.integers("kernel") or ())
    stride = list(t.attributes.integers("stride") or (1,) * len(kernel))
    pad = list(t.attributes.integers("pad") or (0,) * len(kernel))
    beyond = [_beyond(t, i, kernel[i], stride[i], pad[i]) for i in range(len(kernel))]
    attrs: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": stride,
        "pads": [*pad, *(p + b for p, b in zip(pad, beyond))],
    }
    if kind in ("max", "lp"):
        return t.add("MaxPool" if kind == "max" else "LpPool", x, **power, **attrs)
    if kind == "avg" and t.attributes.text("count_include_pad") == "False":
        return t.add("AveragePool", x, **attrs)
    y = t.add("AveragePool", x, count_include_pad=1, **attrs)
    if kind == "sum":
        return t.add("Mul", y, t.constant(prod(kernel)))
    if any(beyond):  # what is padded counts, what lies beyond does not
        share = np.ones(())
        for i, outside in enumerate(beyond):
            windows = np.full(int(t.out.shape[2 + i] or 0), 1.0)
            windows[-1] = kernel[i] / (kernel[i] - outside)
            share = np.multiply.outer(share, windows)
        y = t.add("Mul", y, t.constant(share))
    return y


def _beyond(t: Emitter, i: int, kernel: int, stride: int, pad: int) -> int:
    """Return how far the last window of an axis reaches beyond the padded input."""
    length, windows = t.tensors[0].shape[2 + i], t.out.shape[2 + i]
    if length is None or windows is None:
        raise ValueError("the lengths that are pooled must not depend on the batch")
    beyond = max(0, (windows - 1) * stride + kernel - length - 2 * pad)
    if beyond >= kernel:
        raise ValueError("its last window lies outside its input")
    return beyond


@translates("_contrib_AdaptiveAvgPooling2D")
def adaptive_average(t: Emitter) -> str:
    """Average over windows of unlike sizes, as products with a matrix from either side."""
    (x,) = t.inputs
    rows, columns = (
        _averages(length, count) for length, count in zip(t.tensors[0].shape[2:], t.out.shape[2:])
    )
    return t.add("MatMul", t.add("MatMul", t.constant(rows), x), t.constant(columns.T))


def _averages(length: int | None, count: int | None) -> np.ndarray:
    """Return the matrix that averages `length` values to `count`."""
    if length is None or count is None:
        raise ValueError("the lengths that are pooled must not depend on the batch")
    matrix = np.zeros((count, length))
    for i in range(count):
        start, end = i * length // count, -(-(i + 1) * length // count)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
