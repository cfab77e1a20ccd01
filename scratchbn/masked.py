"""Batch normalization that leaves padded positions out: a variant whose batch has a mask."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import mxnet as mx
from mxnet.gluon import HybridBlock

from . import functional
from ._data import check_array
from ._graph.arrays import Array, is_symbol, to_classic
from ._graph.mode import Select
from ._graph.view import ChannelView
from .layer import ScratchBatchNorm

__all__ = ["MaskedBatchNorm"]

_here = threading.local()  # the mask of the call that this thread is in


class _ValidView(ChannelView):
    """A view whose padded elements are 0 and do not count; `m` has shape (C,)."""

    def __init__(self, F: Any, view: ChannelView, mask: Array, axis: int) -> None:
        self.__dict__.update(vars(view))
        mask = F.expand_dims(F.cast(mask, dtype="float32"), axis=axis)
        of_all = F.broadcast_like(mask, view.x)
        valid = F.where(of_all, F.ones_like(view.x), F.zeros_like(view.x))
        self._valid = F.BlockGrad(F.reshape_like(valid, view.values))
        self.values = self.cut(view.values)
        self._divisor = F.ones_like(view.m)
        self.m = super().mean(self._valid)
        self._divisor = F.maximum(self.m, 1)

    def cut(self, matrix: Array) -> Array:
        """Return a matrix with 0 in padded places, whatever is there, NaN included."""
        return self._F.where(self._valid, matrix, self._F.zeros_like(matrix))

    def mean(self, matrix: Array) -> Array:
        return super().mean(matrix * self._valid)


class _MaskedStatistics(NamedTuple):
    mean: Array
    variance: Array
    centred: Array
    low: Array
    m: Array
    view: _ValidView


class MaskedBatchNorm(ScratchBatchNorm):
    """Batch normalization of the positions of a batch that are not padding.

    ``layer(x, mask)`` takes mean, variance and gradients over the positions where `mask` is not 0,
    and returns 0 at the others, in inference too. What `x` holds there does not matter, NaN
    included. ``layer(x)`` is :class:`~scratchbn.ScratchBatchNorm`, which has the same arguments
    and Parameters.

    Notes
    -----
    `mask` has the shape of `x` without the channel axis, and any dtype: for `x` of shape
    (N, C, T) it is (N, T). Without a valid position a training batch leaves the running statistics
    as they are. An exported net has the mask as one of its inputs. ``recalibrate`` minds masks;
    ``scratchbn.monitor`` does not, and measures padding too.

    Examples
    --------
    >>> import mxnet as mx
    >>> layer = MaskedBatchNorm(in_channels=1)
    >>> layer.initialize()
    >>> x, mask = mx.nd.array([[[1, 3, 70]], [[1, 80, 90]]]), mx.nd.array([[1, 1, 0], [0, 0, 0]])
    >>> with mx.autograd.record():
    ...     y = layer(x, mask)
    >>> print(y.asnumpy().round(3).tolist())
    [[[-1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]]
    """

    _masks = False

    def forward(self, x: Array, mask: Array = None) -> Array:
        """Normalize a batch; raises as :meth:`ScratchBatchNorm.forward` does, for a mask too.

        Parameters
        ----------
        x : NDArray, np.ndarray or Symbol
            As of :class:`~scratchbn.ScratchBatchNorm`.
        mask : NDArray, np.ndarray or Symbol, optional
            0 where `x` is padding; of `x`'s shape without the channel axis.
        """
        check_array(x)
        if is_symbol(x):
            return super().forward(x) if mask is None else HybridBlock.forward(self, x, mask)
        if self._masks != (mask is not None) or x.dtype != self._traced_for:
            self._clear_cached_op()  # a graph has a mask or has none, and is for 16 bits or not
            self._masks, self._traced_for = mask is not None, x.dtype
        if mask is None:
            return super().forward(x)
        self._check_input(x)
        self._check_mask(x, mask)
        return HybridBlock.forward(self, x, mask)

    def _check_mask(self, x: Array, mask: Array) -> None:
        if not isinstance(mask, mx.nd.NDArray):
            raise TypeError(f"mask must be an array, got {mask!r}")
        axis = self.options.axis % x.ndim
        wanted = x.shape[:axis] + x.shape[axis + 1 :]
        if mask.shape != wanted:
            raise ValueError(
                f"mask must have the shape of data without its channel axis, {wanted} for data of "
                f"shape {x.shape} and axis={self.options.axis}; got {mask.shape}"
            )

    def infer_shape(self, x: Array, *mask: Array) -> None:
        """Take the number of channels from an input."""
        super().infer_shape(x)

    def hybrid_forward(self, F: Any, x: Array, *mask: Array, **parameters: Array) -> Array:
        """Normalize a batch; see :meth:`forward`."""
        _here.mask = to_classic(mask[0]) if mask else None
        try:
            return super().hybrid_forward(F, x, **parameters)
        finally:
            _here.mask = None

    def statistics(
        self, F: Any, view: ChannelView, running_mean: Array, running_var: Array, select: Select
    ) -> Any:
        """Take the statistics of the valid positions."""
        if _here.mask is None:
            return super().statistics(F, view, running_mean, running_var, select)
        valid = _ValidView(F, view, _here.mask, self.options.axis)
        batch = functional.statistics(F, valid, running_mean, running_var, select)
        return _MaskedStatistics(*batch, valid.m, valid)

    def transform(
        self, F: Any, view: ChannelView, batch: Any, gamma: Array, beta: Array, epsilon: float
    ) -> Array:
        """Normalize the valid positions, and write 0 into the others."""
        y = super().transform(F, view, batch, gamma, beta, epsilon)
        return batch.view.cut(y) if isinstance(batch, _MaskedStatistics) else y
