"""Two relatives of batch normalization, each made by overriding two methods of the layer.

Both are used like :class:`~scratchbn.ScratchBatchNorm`: eagerly, hybridized and exported. In
inference they are batch normalization, and their parameter files interchange with it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

from . import functional
from ._checks import check_integer, check_number
from ._graph.arrays import Array, is_symbol
from ._graph.kernels import alone, distinct, unfused
from ._graph.mode import Select
from ._graph.view import ChannelView, reshape
from ._options import Options
from .layer import ScratchBatchNorm

__all__ = ["BatchRenorm", "GhostBatchNorm"]


class _Chunks(ChannelView):
    """An array as a matrix whose rows belong to K chunks of samples, with C channels in each.

    A matrix of zeros and ones says which row belongs to which chunk; `mean` and `broadcast` are
    products with it. Vectors have shape (K * C,); `m` counts the elements behind each value.
    """

    def __init__(self, F: Any, view: ChannelView, size: int) -> None:
        self.__dict__.update(vars(view))
        self._be_matrix()
        row, sample = (distinct(F.contrib.arange_like(v, axis=0)) for v in (self.values, self.x))
        length = F.broadcast_div(*(self._count(F.ones_like(v)) for v in (row, sample)))  # (1, 1)
        first = F.slice(sample, begin=(0,), end=(None,), step=(size,)).reshape((-1, 1))
        first = F.broadcast_mul(first, length)  # row of each chunk
        row = row.reshape((1, -1))
        end = F.broadcast_add(first, size * length)
        member = F.broadcast_greater_equal(row, first) * F.broadcast_lesser(row, end)
        self._member = F.BlockGrad(member)  # shape (K, L)
        self._ones_K = F.ones_like(first)
        features = alone(F.contrib.arange_like(self.values, axis=1).reshape((1, -1)))
        rows = self._product(self._member, self._ones_L, transpose_b=True)
        self.number = self._count(self._ones_K.reshape((-1,))).reshape((-1,))
        self._share = F.broadcast_div(rows, self._product(self._ones_K, rows, transpose_a=True))
        self._by_feature = self._product(rows, F.ones_like(features))  # shape (K, C * S)
        self.m = self._sum(self._by_feature)

    def _count(self, ones: Array) -> Array:
        """Return the length of a vector of ones; shape (1, 1)."""
        ones = ones.reshape((1, -1))
        return self._product(ones, ones, transpose_b=True)

    def _sum(self, matrix: Array) -> Array:
        """Add what belongs to a channel in each row of a matrix, shape (K, C * S)."""
        if is_symbol(matrix):
            channels_first = {"lhs_begin": 1, "lhs_end": 2, "rhs_begin": 1, "rhs_end": None}
            matrix = self._F.reshape_like(matrix, self._samples, **channels_first)
            matrix = matrix.reshape((-3, -2)).flatten()
        else:
            C, S = self._channels
            matrix = reshape(self._F, matrix, (len(matrix) * C, S))
        return self._product(matrix, self._ones_S, transpose_b=True).reshape((-1,))

    def mean(self, matrix: Array) -> Array:
        total = self._sum(self._product(self._member, matrix))
        return total / self._F.maximum(self.m, 1)  # of nothing it is 0

    def broadcast(self, vector: Array) -> Array:
        by_channel = self._product(vector.reshape((-1, 1)), self._ones_S)
        by_feature = self._F.reshape_like(by_channel, self._by_feature)
        return self._product(self._member, by_feature, transpose_a=True)

    def repeat(self, vector: Array) -> Array:
        """Give every chunk the values of a vector, shape (C,)."""
        return self._product(self._ones_K, vector.reshape((1, -1))).reshape((-1,))

    def average(self, vector: Array, like: Array) -> Array:
        """Average over the chunks, by their size; of shape (C,), as `like` is."""
        table = self._product(self._ones_K, like.reshape((1, -1)))
        table = self._F.reshape_like(vector, table)
        return self._product(self._share, table, transpose_a=True).reshape((-1,))


class _GhostStatistics(NamedTuple):
    mean: Array
    variance: Array
    chunks: _Chunks
    of_chunks: functional.Statistics


def _check_channel_axis(value: Any) -> int:
    axis = check_integer("axis", value)
    if axis == 0:
        raise ValueError("axis must not be 0, the batch axis, got 0")
    return axis


class _GhostOptions(Options):
    checks: ClassVar = {
        **Options.checks,
        "axis": _check_channel_axis,
        "ghost_size": partial(check_integer, "ghost_size", least=1),
    }


class GhostBatchNorm(ScratchBatchNorm):
    """Batch normalization of every `ghost_size` samples by themselves.

    A large batch then has the noise of small ones. The chunks are samples 0 to ``ghost_size - 1``
    and so on; if the batch is no multiple of it, the last chunk is smaller. Inference is that of
    batch normalization and has no chunks.

    Parameters
    ----------
    ghost_size : int
        How many samples a chunk has, at least 1.
    **options
        Those of :class:`~scratchbn.ScratchBatchNorm`. `axis` must not be the batch axis, 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind or range given above.

    Notes
    -----
    The running statistics move once per batch, towards the averages over the chunks of their means
    and of their variances, where a smaller chunk has less weight. So `momentum` means what it does
    in batch normalization; normalizing one chunk after the other would move them K times. With
    ``unbiased_variance=True`` the variance is the sum of squares within the chunks over m - K, for
    m elements per channel in K chunks. A training batch with a value that is not finite gives NaN
    in all chunks.

    Source: Hoffer, Hubara & Soudry, "Train longer, generalize better", 2017,
    https://arxiv.org/abs/1705.08741, Algorithm 1.

    Examples
    --------
    >>> import mxnet as mx
    >>> layer = GhostBatchNorm(ghost_size=2, in_channels=1)
    >>> layer.initialize()
    >>> with mx.autograd.record():
    ...     y = layer(mx.nd.array([[1], [3], [50], [90]]))
    >>> print(y.asnumpy().round(3).ravel())
    [-1.  1. -1.  1.]
    """

    infers_as_batch_norm = True
    options_class = _GhostOptions

    def __init__(self, ghost_size: int, **options: Any) -> None:
        check_integer("ghost_size", ghost_size, least=1)
        super().__init__(**options)
        self.options["ghost_size"] = ghost_size

    def _check_input(self, x: Array) -> None:
        super()._check_input(x)
        if self.options.axis == -x.ndim:
            raise ValueError(f"axis={-x.ndim} is the batch axis of data of shape {x.shape}")
        if x.shape[0] == 0:
            raise ValueError(f"data must have at least 1 sample, got shape {x.shape}")

    def statistics(
        self,
        F: Any,
        view: ChannelView,
        running_mean: Array,
        running_var: Array,
        select: Select,
    ) -> Any:
        """Take the statistics of each chunk, and their averages for the running statistics."""
        chunks = _Chunks(F, view, self.options.ghost_size)
        kept = chunks.repeat(running_mean), chunks.repeat(running_var)
        of_chunks = functional.statistics(F, chunks, *kept, select)
        mean = chunks.average(of_chunks.mean, running_mean)
        variance = chunks.average(of_chunks.variance, running_var)
        if self.options.unbiased_variance:  # the layer then multiplies by m / (m - 1)
            variance = F.broadcast_mul(variance, (view.m - 1) / (view.m - chunks.number))
        return _GhostStatistics(mean, variance, chunks, of_chunks)

    def transform(
        self,
        F: Any,
        view: ChannelView,
        batch: Any,
        gamma: Array,
        beta: Array,
        epsilon: float,
    ) -> Array:
        """Normalize each chunk with its own statistics."""
        gamma, beta = batch.chunks.repeat(gamma), batch.chunks.repeat(beta)
        return super().transform(F, batch.chunks, batch.of_chunks, gamma, beta, epsilon)


class _RenormStatistics(NamedTuple):
    mean: Array
    variance: Array
    centred: Array
    low: Array
    r: Array
    d: Array


def _limit(name: str, least: float) -> Any:
    text = f"finite and at least {least}"
    return lambda value: check_number(name, value, least, math.inf, text)


class _RenormOptions(Options):
    checks: ClassVar = {
        **Options.checks,
        "r_max": _limit("r_max", 1),
        "d_max": _limit("d_max", 0),
    }


class BatchRenorm(ScratchBatchNorm):
    r"""Batch normalization that is corrected, within limits, towards the running statistics.

    .. math:: y = \gamma \left(\frac{x - \mu_B}{\sigma_B} r + d\right) + \beta, \quad
              r = \text{clip}(\sigma_B / \sigma, 1 / r_\text{max}, r_\text{max}), \quad
              d = \text{clip}((\mu_B - \mu) / \sigma, -d_\text{max}, d_\text{max})

    where :math:`\mu` and :math:`\sigma^2 - \epsilon` are the running statistics before the batch
    moves them. No gradient passes through r and d. Within the limits the output in training is what
    it is in inference, ``gamma * (x - mu) / sigma + beta``, which helps with small batches and
    batches that are not alike. Inference is that of batch normalization.

    Parameters
    ----------
    r_max : float, default 3
        Finite, at least 1. With 1, sigma_B stays as it is.
    d_max : float, default 5
        Finite, not negative. With 0, mu_B stays as it is.
    **options
        Those of :class:`~scratchbn.ScratchBatchNorm`.

    Attributes
    ----------
    r_max, d_max : float
        May be set during training.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind or range given above.

    Notes
    -----
    The limits are constants of a graph. The paper starts with 1 and 0, as the running statistics
    mean nothing at first, and widens them to 3 and 5. In a hybridized net, call ``net.hybridize()``
    again after setting them: it is traced anew, so set them every few hundred steps. An exported
    graph keeps those it was exported with.

    The paper keeps an average of the standard deviation; here it is that of the variance, so that
    inference is that of batch normalization. `unbiased_variance` touches what is kept, not sigma_B.

    Source: Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275, Algorithm 1.

    Examples
    --------
    >>> import mxnet as mx
    >>> layer = BatchRenorm(in_channels=1)  # with a running mean of 0 and a running variance of 1
    >>> layer.initialize()
    >>> with mx.autograd.record():
    ...     y = layer(mx.nd.array([[1], [2], [3]]))
    >>> print(y.asnumpy().round(3).ravel())
    [1. 2. 3.]
    """

    infers_as_batch_norm = True
    options_class = _RenormOptions

    def __init__(self, r_max: float = 3.0, d_max: float = 5.0, **options: Any) -> None:
        limits = {"r_max": r_max, "d_max": d_max}
        self.options_class(limits)
        super().__init__(**options)
        self.options.update(limits)

    @property
    def r_max(self) -> float:
        """The limit of r; see the class."""
        return self.options["r_max"]

    @r_max.setter
    def r_max(self, value: float) -> None:
        self.options["r_max"] = value

    @property
    def d_max(self) -> float:
        """The limit of d; see the class."""
        return self.options["d_max"]

    @d_max.setter
    def d_max(self, value: float) -> None:
        self.options["d_max"] = value

    def statistics(
        self,
        F: Any,
        view: ChannelView,
        running_mean: Array,
        running_var: Array,
        select: Select,
    ) -> Any:
        """Take the statistics of the batch, and r and d from them; in inference r = 1 and d = 0."""
        batch = super().statistics(F, view, running_mean, running_var, select)
        epsilon = self.options.epsilon
        factor = functional.inverse_std(F, running_var, epsilon)
        # Not F.clip, which rounds its limits to float32.
        sigma = F.sqrt(unfused(batch.variance + epsilon))
        r = F.minimum(F.broadcast_mul(sigma, factor), self.r_max)
        d = F.minimum(F.broadcast_mul(batch.mean - running_mean, factor), self.d_max)
        r, d = F.BlockGrad(F.maximum(r, 1 / self.r_max)), F.BlockGrad(F.maximum(d, -self.d_max))
        return _RenormStatistics(*batch, r, d)

    def transform(
        self,
        F: Any,
        view: ChannelView,
        batch: Any,
        gamma: Array,
        beta: Array,
        epsilon: float,
    ) -> Array:
        """Normalize, correct by r and d, scale and shift."""
        return super().transform(F, view, batch, gamma * batch.r, beta + gamma * batch.d, epsilon)
