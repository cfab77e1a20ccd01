"""The paper, line by line: Ioffe & Szegedy, "Batch Normalization", 2015.

Every function is pure: arrays in, arrays out. ``F`` is ``mxnet.nd`` or ``mxnet.sym``, so a formula
is written once and serves eager code and graphs alike. https://arxiv.org/abs/1502.03167 has:

====================  ===============================================  ===========================
in the paper          formula                                          here
====================  ===============================================  ===========================
Algorithm 1           all of it, as one writes it on first reading     :func:`pure_batch_norm`
Algorithm 1, line 1   mu = 1/m sum(x_i)                                :func:`batch_mean`
Algorithm 1, line 2   sigma^2 = 1/m sum((x_i - mu)^2)                  :func:`batch_variance`
Algorithm 1, line 3   xhat_i = (x_i - mu) / sqrt(sigma^2 + epsilon)    :func:`scale_and_shift`,
                                                                       :func:`inverse_std`
Algorithm 1, line 4   y_i = gamma xhat_i + beta                        :func:`scale_and_shift`
Algorithm 2, line 10  Var[x] = m/(m-1) E[sigma^2]                      :func:`unbiased_variance`
Algorithm 2, line 11  lines 3 and 4 with E[x] and Var[x]               :func:`scale_and_shift`
section 3.1           moving averages of mu and sigma^2                :func:`running_average`
====================  ===============================================  ===========================
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ._graph.arrays import Array
from ._graph.kernels import alone, unfused
from ._graph.mode import Mode, Select
from ._graph.view import ChannelView

__all__ = [
    "ChannelView",
    "Statistics",
    "all_finite",
    "batch_mean",
    "batch_norm",
    "batch_variance",
    "cumulative_average",
    "inverse_std",
    "moments",
    "pure_batch_norm",
    "running_average",
    "scale_and_shift",
    "statistics",
    "unbiased_variance",
]


def pure_batch_norm(x: Array, gamma: Array, beta: Array, epsilon: float = 1e-5) -> Array:
    """Algorithm 1, for `x` of shape (N, C) or (N, C, H, W) and `gamma`, `beta` of shape (C,).

    Examples
    --------
    >>> from mxnet import nd
    >>> A = nd.array([[1, 7], [5, 4], [6, 10]])
    >>> print(pure_batch_norm(A, gamma=nd.ones(2), beta=nd.zeros(2)).asnumpy().round(4))
    [[-1.3887  0.    ]
     [ 0.4629 -1.2247]
     [ 0.9258  1.2247]]
    """
    if x.ndim not in (2, 4):
        raise ValueError(f"x must have shape (N, C) or (N, C, H, W), got {x.shape}")
    over = (0,) if x.ndim == 2 else (0, 2, 3)
    gamma, beta = (v.reshape((1, -1) + (1,) * (x.ndim - 2)) for v in (gamma, beta))

    mean = x.mean(axis=over, keepdims=True)  # line 1
    variance = ((x - mean) ** 2).mean(axis=over, keepdims=True)  # line 2
    x_hat = (x - mean) / (variance + epsilon).sqrt()  # line 3
    return gamma * x_hat + beta  # line 4


# Below is the same for any shape, as a graph can compute it, and in a form that keeps its digits:
# next to a mean of 1e5 a float32 has two digits left. So a mean is held in two floats, high + low:
# `high` is the mean as one float can hold it, x - high is exact where it matters, and `low` is the
# mean of that, what rounding lost. A `view` says how the elements of x belong to the channels:
# `view.values` is x with its channels apart, `view.mean` is the paper's 1/m sum, `view.broadcast`
# writes a value per channel beside each element.


class Statistics(NamedTuple):
    """What a batch is normalized with.

    Attributes
    ----------
    mean, variance : NDArray or Symbol, shape (C,)
        Of the batch, or the running ones.
    centred : NDArray or Symbol, shaped as ``view.values`` is
        ``x - high``, the batch minus the high part of the mean.
    low : NDArray or Symbol, shape (C,)
        ``mean - high``, the low part of the mean.
    """

    mean: Array
    variance: Array
    centred: Array
    low: Array


def batch_mean(view: ChannelView, values: Array) -> Array:
    """Algorithm 1, line 1: ``mu = 1/m sum(x_i)``, of what is like ``view.values``; shape (C,)."""
    return view.mean(values)


def batch_variance(F: Any, view: ChannelView, centred: Array, low: Array) -> Array:
    """Algorithm 1, line 2: ``sigma^2 = 1/m sum((x_i - mu)^2)``, the biased variance; shape (C,).

    With x - high for x - mu, where mu = high + low: ``1/m sum((x_i - high)^2) - low^2``.
    """
    return F.maximum(view.mean(F.square(alone(centred))) - F.square(low), 0)


def statistics(
    F: Any, view: ChannelView, running_mean: Array, running_var: Array, select: Select
) -> Statistics:
    """Choose what to normalize with: lines 1 and 2 in training, else the running statistics.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    view : ChannelView
        The batch.
    running_mean, running_var : NDArray or Symbol, shape (C,)
        The choice in inference.
    select : Select
        ``select(batch, running)`` returns ``batch()`` in training and `running` otherwise.

    Returns
    -------
    Statistics
        `high` is a constant to the gradient: ``(x - high) - low`` is ``x - mu`` whatever it is.
        So is the x it is the mean of; else MXNet would add zeros of x's size to x's gradient.
    """
    high = F.BlockGrad(select(lambda: batch_mean(view, F.BlockGrad(view.values)), running_mean))
    centred = alone(view.values - view.broadcast(high))
    low = select(lambda: batch_mean(view, centred), F.zeros_like(high))
    variance = select(lambda: batch_variance(F, view, centred, low), running_var)
    return Statistics(high + low, variance, centred, low)


def inverse_std(F: Any, variance: Array, epsilon: float) -> Array:
    """``1 / sqrt(sigma^2 + epsilon)`` of line 3, shape (C,).

    With epsilon 0 a channel of variance 0 gets the factor 0: it is normalized to 0 and passes no
    gradient, where the formula alone would give NaN. What is no variance gives NaN.
    """
    if epsilon > 0:
        return F.rsqrt(unfused(unfused(variance) + epsilon))
    constant = variance == 0
    safe = F.where(constant, F.ones_like(variance), variance)
    return F.where(constant, F.zeros_like(variance), F.rsqrt(safe))


def scale_and_shift(
    F: Any, view: ChannelView, batch: Statistics, gamma: Array, beta: Array, epsilon: float
) -> Array:
    """Algorithm 1, lines 3 and 4: ``y_i = gamma xhat_i + beta``; like ``view.values``.

    ``gamma / sqrt(sigma^2 + epsilon)`` is one number per channel and comes first, so that the
    elements are multiplied once; the low part of mu is subtracted with beta::

        xhat = (x - high - low) / sqrt(sigma^2 + epsilon)
        y    = gamma xhat + beta
             = (x - high) factor - (low factor - beta)

    The last sign is minus because MXNet's executors cannot add to the matrix of a Conv3D's output.
    """
    factor = F.broadcast_mul(gamma, inverse_std(F, batch.variance, epsilon))
    scaled = alone(alone(batch.centred) * view.broadcast(factor))
    return scaled - view.broadcast(batch.low * factor - beta)


def batch_norm(
    F: Any,
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    *,
    axis: int = 1,
    epsilon: float = 1e-5,
    training: bool | Select = True,
) -> tuple[Array, Array, Array]:
    """Normalize `x`: Algorithm 1 in training, Algorithm 2, line 11, in inference.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``, whichever the arrays belong to.
    x : NDArray or Symbol, float32 or float64, rank >= 2
        The batch.
    gamma, beta, running_mean, running_var : NDArray or Symbol, shape (C,)
        Scale, shift, and what to normalize with in inference; all of `x`'s dtype.
    axis : int
        The channel axis of `x`; negative counts from the end.
    epsilon : float
        Added to the variance, in units of `x` squared.
    training : bool or Select
        Whether to normalize with the statistics of the batch; a graph chooses when it runs.

    Returns
    -------
    y : NDArray or Symbol
        Of `x`'s shape and dtype.
    mean, variance : NDArray or Symbol, shape (C,)
        What `x` was normalized with. In training: the mean and the biased variance of the batch.

    Examples
    --------
    >>> from mxnet import nd
    >>> x = nd.array([[1, 7], [5, 4], [6, 10]])
    >>> one, zero = nd.ones(2), nd.zeros(2)
    >>> y, mean, variance = batch_norm(nd, x, one, zero, zero, one, training=True)
    >>> print(y.asnumpy().round(4))
    [[-1.3887  0.    ]
     [ 0.4629 -1.2247]
     [ 0.9258  1.2247]]
    >>> y, _, _ = batch_norm(nd, x, one, zero, zero, one, epsilon=0, training=False)
    >>> print(y.asnumpy())
    [[ 1.  7.]
     [ 5.  4.]
     [ 6. 10.]]
    """
    select = Mode(training).select if isinstance(training, bool) else training
    view = ChannelView(F, x, axis)
    batch = statistics(F, view, running_mean, running_var, select)
    y = scale_and_shift(F, view, batch, gamma, beta, epsilon)
    return view.reshape_back(y), batch.mean, batch.variance


def moments(F: Any, x: Array, axis: int = 1) -> tuple[Array, Array]:
    """Return the mean and the biased variance of each channel: Algorithm 1, lines 1 and 2.

    Examples
    --------
    >>> from mxnet import nd
    >>> mean, variance = moments(nd, nd.array([[1, 7], [5, 4], [6, 10]]))
    >>> print(mean.asnumpy(), variance.asnumpy().round(4))
    [4. 7.] [4.6667 6.    ]
    """
    batch = statistics(F, ChannelView(F, x, axis), None, None, Mode(training=True).select)
    return batch.mean, batch.variance


def unbiased_variance(F: Any, variance: Array, m: Array) -> Array:
    """Algorithm 2, line 10: ``m / (m - 1)`` times the biased variance of m elements; shape (C,).

    With m = 1, of shape (1,), there is no unbiased estimate, and the result is not finite.
    """
    return F.broadcast_mul(variance, m / (m - 1))


def running_average(running: Array, batch: Array, momentum: float) -> Array:
    """``momentum * running + (1 - momentum) * batch``, the exponential moving average; shape (C,).

    Examples
    --------
    >>> from mxnet import nd
    >>> running_average(nd.array([1.0]), nd.array([2.0]), momentum=0.75).asscalar()
    1.25
    """
    return unfused(running * momentum) + unfused(batch * (1 - momentum))


def cumulative_average(F: Any, running: Array, batch: Array, count: Array) -> Array:
    """Return the plain mean of ``count + 1`` statistics, given that of the first `count`, (1,).

    Examples
    --------
    >>> from mxnet import nd
    >>> cumulative_average(nd, nd.array([1.0]), nd.array([4.0]), nd.array([2.0])).asscalar()
    2.0
    """
    newest = 1 / (count + 1)
    return F.broadcast_mul(running, 1 - newest) + F.broadcast_mul(batch, newest)


def all_finite(F: Any, *statistics: Array) -> Array:
    """Return 1 if no element of arrays of shape (C,) is infinite or NaN, else 0; shape (1,).

    Examples
    --------
    >>> from mxnet import nd
    >>> all_finite(nd, nd.array([1.0, 2.0]), nd.array([3.0, float("inf")])).asscalar()
    0.0
    """
    return F.BlockGrad(F.multi_all_finite(*statistics, num_arrays=len(statistics)))
