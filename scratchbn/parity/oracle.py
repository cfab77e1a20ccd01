"""Batch normalization in float64 NumPy: the reference every test compares with.

The formulas follow Ioffe and Szegedy (2015), algorithms 1 and 2; the gradients are derived by hand.
Nothing here imports MXNet or another part of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["OracleBatchNorm", "Step", "as_channels", "batch_moments", "reduced_axes"]


@dataclass(frozen=True)
class Step:
    """Output and gradients of one call.

    Attributes
    ----------
    y, dx : numpy.ndarray
        Output and gradient of the data, of the data's shape.
    dgamma, dbeta : numpy.ndarray, shape (channels,)
        Zero where `scale` or `center` is False.
    """

    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray


def reduced_axes(rank: int, axis: int) -> tuple[int, ...]:
    """Return every axis but the channel axis.

    Parameters
    ----------
    rank, axis : int
        `axis` may be negative.

    Returns
    -------
    tuple of int
        Ascending, none negative.

    Examples
    --------
    >>> reduced_axes(4, 1)
    (0, 2, 3)
    """
    return tuple(i for i in range(rank) if i != axis % rank)


def as_channels(vector: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Reshape a vector so that it broadcasts along the channel axis.

    Parameters
    ----------
    vector : numpy.ndarray, shape (channels,)
    rank, axis : int
        Of the array to broadcast with.

    Returns
    -------
    numpy.ndarray
        A view, with one element along every other axis.
    """
    shape = [1] * rank
    shape[axis % rank] = -1
    return np.reshape(vector, shape)


def batch_moments(x: np.ndarray, axis: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the biased variance of every channel.

    Parameters
    ----------
    x : numpy.ndarray
    axis : int
        The channel axis.

    Returns
    -------
    mean, variance : numpy.ndarray, shape (channels,)
        In float64; NaN if `x` is empty.
    """
    x = np.asarray(x, np.float64)
    axes = reduced_axes(x.ndim, axis)
    channels = x.shape[axis]
    if x.size == 0:
        return np.full(channels, np.nan), np.full(channels, np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = x.mean(axis=axes)
        deviation = x - as_channels(mean, x.ndim, axis)
        return mean, (deviation**2).mean(axis=axes)


@dataclass
class OracleBatchNorm:
    """A float64 batch normalization with the options and the state of the layer.

    `running = momentum * running + (1 - momentum) * batch`; `momentum=None` keeps the average of
    all batches, each with the same weight. A batch with any statistic that is not finite leaves the
    running statistics of every channel alone, and does not count.

    Attributes
    ----------
    gamma, beta, running_mean, running_var : numpy.ndarray, shape (channels,)
        Copied on construction.
    axis, momentum, epsilon, center, scale, use_global_stats, unbiased_variance
        As of ScratchBatchNorm.
    relu : bool
        Whether ``max(y, 0)`` follows.
    batches : int
        How many have been averaged.

    Examples
    --------
    >>> oracle = OracleBatchNorm.fresh(1, momentum=0.5)
    >>> oracle.train(np.array([[1.0], [3.0]])).round(3).tolist()
    [[-1.0], [1.0]]
    >>> oracle.running_mean.tolist(), oracle.running_var.tolist()
    ([1.0], [1.0])
    """

    gamma: np.ndarray
    beta: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    axis: int = 1
    momentum: float | None = 0.9
    epsilon: float = 1e-5
    center: bool = True
    scale: bool = True
    use_global_stats: bool = False
    unbiased_variance: bool = False
    relu: bool = False
    batches: int = 0

    def __post_init__(self) -> None:
        for name in ("gamma", "beta", "running_mean", "running_var"):
            setattr(self, name, np.array(getattr(self, name), np.float64))

    @classmethod
    def fresh(cls, channels: int, **options: Any) -> OracleBatchNorm:
        """Return a layer as constructed: gamma 1, beta 0, running mean 0, running variance 1.

        Parameters
        ----------
        channels : int
        **options
            Attributes.

        Returns
        -------
        OracleBatchNorm
        """
        ones, zeros = np.ones(channels), np.zeros(channels)
        return cls(gamma=ones, beta=zeros, running_mean=zeros, running_var=ones, **options)

    def train_step(self, x: np.ndarray, dy: np.ndarray) -> Step:
        """Take a training call and its backward; the running statistics move.

        Parameters
        ----------
        x, dy : numpy.ndarray
            The data, and the gradient of the output.

        Returns
        -------
        Step
        """
        if self.use_global_stats:
            return self.infer_step(x, dy)
        x = np.asarray(x, np.float64)
        mean, var = batch_moments(x, self.axis)
        self._update(mean, var, x.size // max(x.shape[self.axis], 1))
        return self._step(x, np.asarray(dy, np.float64), mean, var, through_statistics=True)

    def infer_step(self, x: np.ndarray, dy: np.ndarray) -> Step:
        """Take an inference call and its backward; the running statistics are constants and stay.

        Parameters
        ----------
        x, dy : numpy.ndarray
            The data, and the gradient of the output.

        Returns
        -------
        Step
        """
        x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
        return self._step(x, dy, self.running_mean, self.running_var, through_statistics=False)

    def train(self, x: np.ndarray) -> np.ndarray:
        """Return the output of a training call; the running statistics move.

        Parameters
        ----------
        x : numpy.ndarray

        Returns
        -------
        numpy.ndarray
        """
        return self.train_step(x, np.zeros(np.shape(x))).y

    def infer(self, x: np.ndarray) -> np.ndarray:
        """Return the output of an inference call.

        Parameters
        ----------
        x : numpy.ndarray

        Returns
        -------
        numpy.ndarray
        """
        return self.infer_step(x, np.zeros(np.shape(x))).y

    def _update(self, mean: np.ndarray, var: np.ndarray, count: int) -> None:
        if self.unbiased_variance:
            with np.errstate(divide="ignore", invalid="ignore"):
                var = var * (np.float64(count) / np.float64(count - 1))
        if not (np.isfinite(mean).all() and np.isfinite(var).all()):
            return
        self.batches += 1
        keep = 1 - 1 / self.batches if self.momentum is None else self.momentum
        self.running_mean = mean if keep == 0 else keep * self.running_mean + (1 - keep) * mean
        self.running_var = var if keep == 0 else keep * self.running_var + (1 - keep) * var

    def _step(
        self,
        x: np.ndarray,
        dy: np.ndarray,
        mean: np.ndarray,
        var: np.ndarray,
        through_statistics: bool,
    ) -> Step:
        rank, axes = x.ndim, reduced_axes(x.ndim, self.axis)

        def wide(vector: np.ndarray) -> np.ndarray:
            return as_channels(vector, rank, self.axis)

        gamma = self.gamma if self.scale else np.ones_like(self.gamma)
        beta = self.beta if self.center else np.zeros_like(self.beta)
        with np.errstate(invalid="ignore", over="ignore"):
            inverse_std = 1 / np.sqrt(var + self.epsilon)
            x_hat = (x - wide(mean)) * wide(inverse_std)
            z = wide(gamma) * x_hat + wide(beta)
            dz = np.where(z > 0, dy, 0.0) if self.relu else dy
            dgamma, dbeta = (dz * x_hat).sum(axis=axes), dz.sum(axis=axes)
            dx = dz
            if through_statistics and x.size:
                count = x.size // x.shape[self.axis]
                dx = dz - wide(dbeta / count) - x_hat * wide(dgamma / count)
            dx = wide(gamma * inverse_std) * dx
        y = np.where(z > 0, z, 0.0) if self.relu else z
        return Step(
            y=y,
            dx=dx,
            dgamma=dgamma if self.scale else np.zeros_like(dgamma),
            dbeta=dbeta if self.center else np.zeros_like(dbeta),
        )
