"""An array of any rank with its channels apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mxnet as mx
import numpy as np

from .arrays import Array, is_symbol
from .kernels import alone, alone_of_any_rank, distinct
from .state import alike


class ChannelView:
    """An array of any rank seen as one of rank 2 or 3, with its channels apart.

    With L positions before the channel axis and S after it, each channel has m = L * S elements.
    `values` has shape (L, C * S), a row per sample and the channels side by side. A graph outside
    of np_shape sees (L, C, S), which takes fewer nodes: `dot` multiplies arrays of any rank. The
    two maps between elements and channels, `mean` and `broadcast`, are products with rows and
    columns of ones: matrix products are the fastest reductions and broadcasts that MXNet has on a
    CPU, forward and backward, by an order of magnitude.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    x : NDArray or Symbol, float32 or float64, rank >= 2
    axis : int
        The channel axis of `x`; negative counts from the end.

    Attributes
    ----------
    x : NDArray or Symbol
        The array itself.
    values : NDArray or Symbol, shape (L, C * S) or (L, C, S)
        The elements of `x`.
    m : NDArray or Symbol, shape (1,)
        How many elements a channel has; 0 in an empty batch.
    """

    values: Array
    m: Array
    _has_rank_3 = False

    def __init__(self, F: Any, x: Array, axis: int) -> None:
        self._F = F
        self.x = x
        self._axis = axis
        if is_symbol(x):
            self._infer(axis)
        else:
            self._measure(axis % x.ndim)

    def _measure(self, axis: int) -> None:
        """Take the lengths from an array."""
        F, x = self._F, self.x
        L, C, S = (int(np.prod(n)) for n in (x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]))
        self._channels = (C, S)
        self.values = reshape(F, x, (L, C * S))
        self._ones_L = F.ones((1, L), ctx=x.ctx, dtype=x.dtype)
        self._ones_S = F.ones((1, S), ctx=x.ctx, dtype=x.dtype)
        self.m = F.full((1,), L * S, ctx=x.ctx, dtype=x.dtype)
        self._divisor = F.full((1,), max(L * S, 1), ctx=x.ctx, dtype=x.dtype)

    def _infer(self, axis: int) -> None:
        """Let a graph find the lengths when it runs: no rank and no length is known now."""
        F = self._F
        if mx.util.is_np_shape():
            self._samples = _channels_second(F, distinct(alone_of_any_rank(F, self.x)), axis)
            # A copy in plain layout: batch_dot fails on what oneDNN laid out in five dimensions.
            self.values = F.stack(self._samples.flatten(), axis=1).flatten()
            by_channel = self._by_channel(_ones_along(F, self.values, 1))
            channels, positions = (_ones_along(F, by_channel, axis) for axis in (0, 1))
        else:
            self._has_rank_3 = True
            self._samples_first = axis == -1 or _is_dense(self.x)
            self._samples = self.values = _channels_in_the_middle(F, self.x, axis)
            channels, positions = (_ones_along(F, self.values, axis) for axis in (1, 2))
        self._any_C, self._ones_S = channels, positions.reshape((1, -1))
        self._ones_L = _ones_along(F, self.values, 0).reshape((1, -1))
        # Not F.sum, which on a GPU divides by a length of 0.
        L, S = (self._product(v, v, transpose_b=True) for v in (self._ones_L, self._ones_S))
        self.m = F.BlockGrad(F.elemwise_mul(L, S).reshape((-1,)))
        self._divisor = F.maximum(self.m, 1)

    def _product(self, a: Array, b: Array, **transposed: bool) -> Array:
        """Multiply two matrices, in full precision and where there is nothing to sum up too.

        `dot` divides by the length it sums over, which under np_shape can be 0. Of the operators
        that do not, `batch_dot` is the one that a GPU does not compute in TF32.
        """
        F = self._F
        if not mx.util.is_np_shape() or (not is_symbol(a) and a.size and b.size):
            return F.dot(a, b, **transposed)
        a, b = (F.expand_dims(alone(matrix), axis=0) for matrix in (a, b))
        return alone(F.batch_dot(a, b, **transposed).reshape((-3, 0)))

    def _by_channel(self, row: Array) -> Array:
        """Cut a row of C * S features into a matrix, shape (C, S)."""
        if not is_symbol(row):
            return reshape(self._F, row, self._channels)
        first, rest = {"lhs_begin": 0, "lhs_end": 1}, {"rhs_begin": 1, "rhs_end": None}
        return self._F.reshape_like(row.reshape((-1,)), self._samples, **first, **rest).flatten()

    def _be_matrix(self) -> None:
        """See a symbol as of shape (L, C * S), for a view that multiplies matrices."""
        if self._has_rank_3:
            self._has_rank_3 = False
            # From x itself: MXNet cannot reorder three axes of what oneDNN laid out in five.
            self._samples = _channels_second(self._F, _at_least_rank_2(self.x), self._axis)
            self.values = self._samples.flatten()

    def shaped(self, vector: Array) -> Array:
        """Return `vector`; a graph infers from this that its shape is (C,)."""
        return alike(self._F, vector, self._any_C) if is_symbol(vector) else vector

    def mean(self, values: Array) -> Array:
        """Average what is like `values` over each channel; shape (C,). Of nothing it is 0."""
        F, L, S = self._F, self._ones_L, self._ones_S
        if not self._has_rank_3:
            row = self._by_channel(self._product(L, values))
            total = self._product(row, S, transpose_b=True)
        elif self._samples_first:
            total = F.dot(F.dot(L, values), S, transpose_b=True)
        else:
            total = F.dot(L, F.dot(values, S, transpose_b=True))
        return F.broadcast_div(total.reshape((-1,)), self._divisor)

    def broadcast(self, vector: Array) -> Array:
        """Write a value per channel, shape (C,), beside each element; shaped as `values` is."""
        F, L, S = self._F, self._ones_L, self._ones_S
        if not self._has_rank_3:
            row = self._product(vector.reshape((-1, 1)), S).reshape((1, -1))
            return self._product(L, row, transpose_a=True)
        table = vector.reshape((1, -1, 1))
        if self._samples_first:
            return F.dot(L, F.dot(table, S), transpose_a=True)
        return F.dot(F.dot(L, table, transpose_a=True), S)

    def reshape_back(self, values: Array, attributes: Mapping[str, str] | None = None) -> Array:
        """Give what is like `values` the shape of `x` again, in memory of its own.

        In a graph the last node gets the `attributes`.
        """
        if is_symbol(values):
            return self._F.reshape_like(values, self.x, attr=dict(attributes or {}))
        if not values.size:
            return values.reshape_like(self.x)
        # Not NDArray.reshape, which shares memory: max pooling behind such a view computes its
        # gradient from a workspace that it never wrote (docs/builtin-defects.md).
        return self._F.reshape(values, shape=self.x.shape)


def _ones_along(F: Any, values: Array, axis: int) -> Array:
    """Return ones, as many as a symbol's axis is long, in its dtype."""
    return F.contrib.arange_like(values, axis=axis, start=1.0, step=0.0)


def _is_dense(x: Array) -> bool:
    """Tell whether a symbol is known to have rank 2. A hint: either order of products is right."""
    attributes = x.list_attr()
    return "num_hidden" in attributes and attributes.get("flatten", "True") == "True"


def _channels_in_the_middle(F: Any, x: Array, axis: int) -> Array:
    """Merge the axes of a symbol to (L, C, S), whatever its rank; an error if it is 1."""
    if axis == 1:
        return distinct(x.reshape(shape=(0, 0, -1)))
    return _channels_second(F, _at_least_rank_2(x), axis).reshape(shape=(0, 0, -1))


def _at_least_rank_2(x: Array) -> Array:
    """Return a symbol itself; there is an error, when shapes are known, if its rank is 1."""
    return distinct(x.reshape(shape=(0, 0, -2)))


def _channels_second(F: Any, x: Array, axis: int) -> Array:
    """Merge or add leading axes until the channel axis is the second, whatever the rank."""
    if axis < 0:
        return x.reshape(shape=(-1,) + (0,) * -axis, reverse=True)
    if axis == 0:
        return F.expand_dims(x, axis=0)
    for i in range(axis - 1):
        apart = i and mx.util.is_np_shape()
        x = (alone_of_any_rank(F, x) if apart else x).reshape(shape=(-3, -2))
    return x


def reshape(F: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """Give an array, empty or not, another shape."""
    # NDArray.reshape shares the memory, but takes a length of 0 to mean "as before".
    if x.size:
        return x.reshape(shape)
    return F.reshape_like(x, F.zeros(shape, ctx=x.ctx, dtype=x.dtype))
