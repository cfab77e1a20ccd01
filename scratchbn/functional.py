"""The paper, formula by formula.

Every function here is pure: arrays in, arrays out, no state. ``F`` is ``mxnet.nd`` or
``mxnet.sym``, so each formula is written once and serves eager code and graphs alike. The names
are those of Ioffe & Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167:

=====================  ================================================  ==========================
in the paper           formula                                           here
=====================  ================================================  ==========================
Algorithm 1, line 1    mu = 1/m sum(x_i)                                 :func:`batch_mean`
Algorithm 1, line 2    sigma^2 = 1/m sum((x_i - mu)^2)                   :func:`batch_variance`
Algorithm 1, line 3    xhat_i = (x_i - mu) / sqrt(sigma^2 + epsilon)     :func:`inverse_std`
Algorithm 1, line 4    y_i = gamma xhat_i + beta                         :func:`scale_and_shift`
Algorithm 2, line 10   Var[x] = m/(m-1) E[sigma^2]                       :func:`unbiased_variance`
section 3.1            moving averages of mu and sigma^2                 :func:`running_average`
=====================  ================================================  ==========================

Start with :func:`pure_batch_norm`, which is all of Algorithm 1 in one place, then read
:func:`batch_norm`, which composes the formulas above for training and inference. A
:class:`~scratchbn._graph.ChannelView` stands for the two sums of the paper: ``view.mean`` is
``1/m sum`` over everything but the channel, ``view.spread`` writes a per-channel value next to
every element of its channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ._graph import ChannelView, Select, selector

__all__ = [
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

Array = Any  # mxnet.nd.NDArray or mxnet.sym.Symbol: mxnet has no type information


def pure_batch_norm(X: Array, gamma: Array, beta: Array, eps: float = 1e-5) -> Array:
    """Normalize a batch as one writes it down on first reading: Algorithm 1 and nothing else.

    Parameters
    ----------
    X : NDArray, shape (N, C) or (N, C, H, W)
        A batch of feature vectors or of feature maps.
    gamma, beta : NDArray, shape (C,)
        Scale and shift, of X's dtype.
    eps : float
        Added to the variance, in units of X squared.

    Returns
    -------
    NDArray
        Of X's shape and dtype.

    Raises
    ------
    ValueError
        If X has neither 2 nor 4 axes.

    Notes
    -----
    Source: Algorithm 1 of https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> from mxnet import nd
    >>> A = nd.array([[1, 7], [5, 4], [6, 10]])
    >>> print(pure_batch_norm(A, gamma=nd.ones(2), beta=nd.zeros(2)).asnumpy().round(4))
    [[-1.3887  0.    ]
     [ 0.4629 -1.2247]
     [ 0.9258  1.2247]]
    """
    if X.ndim not in (2, 4):
        raise ValueError(f"X must have shape (N, C) or (N, C, H, W), got {X.shape}")
    over = 0 if X.ndim == 2 else (0, 2, 3)
    channel = (1, -1) if X.ndim == 2 else (1, -1, 1, 1)
    mean = X.mean(axis=over, keepdims=True)
    variance = ((X - mean) ** 2).mean(axis=over, keepdims=True)
    X_hat = (X - mean) / (variance + eps).sqrt()
    return gamma.reshape(channel) * X_hat + beta.reshape(channel)


def batch_mean(view: ChannelView, values: Array) -> Array:
    """Algorithm 1, line 1: ``mu = 1/m sum(x_i)``.

    Parameters
    ----------
    view : ChannelView
        How to find the m elements of each of the C channels.
    values : NDArray or Symbol, shape (L, C * S)
        ``view.values``, or any matrix of that shape.

    Returns
    -------
    NDArray or Symbol, shape (C,)
    """
    return view.mean(values)


def batch_variance(F: Any, view: ChannelView, shifted: Array, rest: Array) -> Array:
    """Algorithm 1, line 2: ``sigma^2 = 1/m sum((x_i - mu)^2)``, the biased variance.

    The squares are taken after the mean is subtracted, as far as it could be: with `shifted` =
    x - s and `rest` = mu - s, where s is mu but for rounding, the formula reads
    ``1/m sum((x_i - s)^2) - (mu - s)^2``.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    view : ChannelView
        How to find the m elements of each of the C channels.
    shifted : NDArray or Symbol, shape (L, C * S)
    rest : NDArray or Symbol, shape (C,)

    Returns
    -------
    NDArray or Symbol, shape (C,)
        Not negative.
    """
    return F.maximum(view.mean(F.square(shifted)) - F.square(rest), 0)


def moments(F: Any, x: Array, axis: int = 1) -> tuple[Array, Array]:
    """Return the mean and the biased variance of each channel: Algorithm 1, lines 1 and 2.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``, whichever `x` belongs to.
    x : NDArray or Symbol, float32 or float64, rank >= 2
        The batch.
    axis : int
        The channel axis of `x`; negative counts from the end.

    Returns
    -------
    mean, variance : NDArray or Symbol, shape (C,)

    Examples
    --------
    >>> from mxnet import nd
    >>> mean, variance = moments(nd, nd.array([[1, 7], [5, 4], [6, 10]]))
    >>> print(mean.asnumpy(), variance.asnumpy().round(4))
    [4. 7.] [4.6667 6.    ]
    """
    batch = statistics(F, ChannelView(F, x, axis), None, None, selector(True))
    return batch.mean, batch.variance


def inverse_std(F: Any, variance: Array, epsilon: float) -> Array:
    """``1 / sqrt(sigma^2 + epsilon)``, the factor of Algorithm 1, line 3.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    variance : NDArray or Symbol, shape (C,)
        ``sigma^2``, not negative.
    epsilon : float
        Not negative. With 0, a channel of variance 0 gets the factor 0: it is normalized to 0
        and passes no gradient, where the formula alone would give NaN.

    Returns
    -------
    NDArray or Symbol, shape (C,)
    """
    if epsilon > 0:
        return F.rsqrt(variance + epsilon)
    varies = variance > 0
    return F.where(
        varies,
        F.rsqrt(F.where(varies, variance, F.ones_like(variance))),
        F.zeros_like(variance),
    )


class Statistics(NamedTuple):
    """What a batch is normalized with.

    Attributes
    ----------
    mean, variance : NDArray or Symbol, shape (C,)
        Of the batch, or the running ones.
    shifted : NDArray or Symbol, shape (L, C * S)
        ``x - s``, where s is the mean as float32 or float64 can hold it.
    rest : NDArray or Symbol, shape (C,)
        ``mean - s``, what rounding left: with values around 1e5 it is where the precision is.
    """

    mean: Array
    variance: Array
    shifted: Array
    rest: Array


def statistics(
    F: Any, view: ChannelView, running_mean: Array, running_var: Array, select: Select
) -> Statistics:
    """Choose what to normalize with: Algorithm 1, lines 1 and 2, or the running statistics.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    view : ChannelView
        The batch.
    running_mean, running_var : NDArray or Symbol, shape (C,)
        The choice in inference.
    select : Select
        Makes the choice.

    Returns
    -------
    Statistics

    Notes
    -----
    The shift s is a constant to the gradient: ``(x - s) - (mu - s)`` is ``x - mu`` whatever s is.
    """
    s = F.BlockGrad(select(lambda: batch_mean(view, view.values), running_mean))
    shifted = view.values - view.spread(s)
    rest = select(lambda: batch_mean(view, shifted), F.zeros_like(s))
    variance = select(lambda: batch_variance(F, view, shifted, rest), running_var)
    return Statistics(s + rest, variance, shifted, rest)


def scale_and_shift(
    F: Any, view: ChannelView, batch: Statistics, gamma: Array, beta: Array, epsilon: float
) -> Array:
    """Algorithm 1, lines 3 and 4: ``y_i = gamma (x_i - mu) / sqrt(sigma^2 + epsilon) + beta``.

    ``gamma / sqrt(sigma^2 + epsilon)`` is one number per channel and is computed first, so that
    the elements are multiplied once; what the shift left of mu is subtracted from beta.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    view : ChannelView
        How to find the elements of each channel.
    batch : Statistics
        Of the batch in `view`.
    gamma, beta : NDArray or Symbol, shape (C,)
        Scale and shift.
    epsilon : float
        Added to the variance.

    Returns
    -------
    NDArray or Symbol, shape (L, C * S)
    """
    factor = gamma * inverse_std(F, batch.variance, epsilon)
    return batch.shifted * view.spread(factor) + view.spread(beta - batch.rest * factor)


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
    gamma, beta : NDArray or Symbol, shape (C,)
        Scale and shift, of `x`'s dtype.
    running_mean, running_var : NDArray or Symbol, shape (C,)
        What to normalize with in inference, of `x`'s dtype.
    axis : int
        The channel axis of `x`; negative counts from the end.
    epsilon : float
        Added to the variance, in units of `x` squared.
    training : bool or Select
        True: normalize with the statistics of the batch. False: with the running ones. In a
        graph the choice is made when it runs, by a :data:`~scratchbn._graph.Select`.

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
    select = selector(training) if isinstance(training, bool) else training
    view = ChannelView(F, x, axis)
    batch = statistics(F, view, running_mean, running_var, select)
    y = scale_and_shift(F, view, batch, gamma, beta, epsilon)
    return view.restore(y), batch.mean, batch.variance


def unbiased_variance(F: Any, variance: Array, m: Array) -> Array:
    """Algorithm 2, line 10: ``m / (m - 1)`` times the biased variance.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    variance : NDArray or Symbol, shape (C,)
        The biased variance of m elements.
    m : NDArray or Symbol, shape (1,)
        How many elements each channel has (``ChannelView.m``). With m = 1 there is no unbiased
        estimate, and the result is not finite.

    Returns
    -------
    NDArray or Symbol, shape (C,)
    """
    return F.broadcast_mul(variance, m / (m - 1))


def running_average(running: Array, batch: Array, momentum: float) -> Array:
    """``momentum * running + (1 - momentum) * batch``, the exponential moving average.

    Parameters
    ----------
    running, batch : NDArray or Symbol, shape (C,)
        The average so far, and the newest statistic.
    momentum : float
        Between 0 and 1: how much of the average is kept.

    Returns
    -------
    NDArray or Symbol, shape (C,)

    Examples
    --------
    >>> from mxnet import nd
    >>> running_average(nd.array([1.0]), nd.array([2.0]), momentum=0.75).asscalar()
    1.25
    """
    return running * momentum + batch * (1 - momentum)


def cumulative_average(F: Any, running: Array, batch: Array, count: Array) -> Array:
    """Return the plain mean of ``count + 1`` statistics, given that of the first `count`.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    running, batch : NDArray or Symbol, shape (C,)
        The mean of the first `count` statistics, and the next one.
    count : NDArray or Symbol, shape (1,)
        How many statistics `running` is the mean of.

    Returns
    -------
    NDArray or Symbol, shape (C,)

    Examples
    --------
    >>> from mxnet import nd
    >>> cumulative_average(nd, nd.array([1.0]), nd.array([4.0]), nd.array([2.0])).asscalar()
    2.0
    """
    newest = 1 / (count + 1)
    return F.broadcast_mul(running, 1 - newest) + F.broadcast_mul(batch, newest)


def all_finite(F: Any, *statistics: Array) -> Array:
    """Return 1 if no element of any of the arrays is infinite or NaN, else 0.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    *statistics : NDArray or Symbol, shape (C,)

    Returns
    -------
    NDArray or Symbol, shape (1,)

    Examples
    --------
    >>> from mxnet import nd
    >>> all_finite(nd, nd.array([1.0, 2.0]), nd.array([3.0, float("inf")])).asscalar()
    0.0
    """
    finite = [v - v == 0 for v in statistics]  # inf - inf and nan - nan are nan
    together = finite[0]
    for more in finite[1:]:
        together = together * more
    return F.min(together, axis=0, keepdims=True)
