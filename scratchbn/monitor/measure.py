"""What is measured of one call of a norm layer."""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np

from .. import functional
from .._graph.arrays import to_classic
from .._net import channel_axis

Array = Any

SATURATION = 4.0
"""An output beyond it counts as saturated: a sigmoid passes on less than 7.1% of its largest
gradient there. For a tanh that is so beyond 2."""


class MeasuredBatch:
    """What is kept of one call of a layer: arrays of shape (C,), computed asynchronously."""

    def __init__(self, layer: Any, x: Array, y: Array) -> None:
        axis = channel_axis(layer)
        x, y = (_as_float(to_classic(values)) for values in (x, y))
        self.count = x.size // x.shape[axis]  # elements per channel
        self.mean, self.variance = functional.moments(mx.nd, x, axis)
        outputs = functional.ChannelView(mx.nd, y, axis)
        self.positive = outputs.mean(outputs.values > 0)
        self.saturated = outputs.mean(outputs.values.abs() > SATURATION)


def _as_float(values: Array) -> Array:
    return values.astype("float32") if np.dtype(values.dtype) == np.float16 else values
