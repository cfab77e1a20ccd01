"""A step of a layer compared with the oracle's, within tolerances that are derived.

How far a result may be off is derived, not guessed. Let u be the unit roundoff of the arithmetic
and M the largest magnitude in a channel. A mean is known to some u M before it is refined, so the
normalized value of an element is known to about u (1 + kappa)^2 (1 + |xhat|), where
kappa = 4 u M / sqrt(variance + epsilon) compares that error with the unit it is measured in. The
tolerance is this with 1e-12 (float64) or 2e-6 (float32) for u, times what it is multiplied by in
each result. In float64 kappa is at most 1e-5 here: the promise of 1e-10 is tested with a margin.
"""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm, as_channels, batch_moments, reduced_axes

import numpy as np

LAYERS = (ScratchBatchNorm, ScratchBatchNormReLU)
RESULT = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-6}
STATISTIC = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-6}
# Data of float16 are computed with in float32.
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-24}


class Reference(OracleBatchNorm):
    """The oracle, on data shifted by the first element of each channel.

    Batch normalization does not notice a shift, and the difference of close numbers is exact. The
    oracle alone loses 1e-6 to a mean of 1e5 with a standard deviation of 1e-5, in float64.
    """

    def moments(self, x):
        """Mean and variance of each channel, and the shifted data with the mean they have."""
        first = tuple(slice(None if i == self.axis % x.ndim else 1) for i in range(x.ndim))
        shifted = x - x[first]
        mean, var = batch_moments(shifted, self.axis)
        return x[first].reshape(-1) + mean, var, shifted, mean

    def train_step(self, x, dy):
        if self.use_global_stats:
            return self.infer_step(x, dy)
        mean, var, shifted, shifted_mean = self.moments(x)
        self._update(mean, var, x.size // x.shape[self.axis])
        return self._step(shifted, dy, shifted_mean, var, through_statistics=True)


def rounded(values, dtype):
    return np.asarray(values).astype(dtype).astype(np.float64)


def rounding_of_mean(x, axis, dtype):
    """The error of a mean before it is refined, per channel."""
    return 4 * ROUNDOFF[dtype] * np.abs(x).max(axis=reduced_axes(x.ndim, axis))


def kappa(x, var, axis, epsilon, dtype):
    lost, scale = rounding_of_mean(x, axis, dtype), np.sqrt(var + epsilon)
    return np.divide(lost, scale, out=np.full_like(lost, np.inf), where=scale > 0)


def tolerances(oracle, x, dy, dtype, training):
    """Tolerances of y, dx, dgamma and dbeta, of the shapes of these."""
    axes = reduced_axes(x.ndim, oracle.axis)

    def wide(vector):
        return as_channels(vector, x.ndim, oracle.axis)

    learning = training and not oracle.use_global_stats
    mean, var = oracle.moments(x)[:2] if learning else (oracle.running_mean, oracle.running_var)
    lost = kappa(x, var, oracle.axis, oracle.epsilon, dtype) if learning else np.zeros_like(var)
    unit = wide(RESULT[dtype] * (1 + lost) ** 2)
    inverse_std = 1 / np.sqrt(var + oracle.epsilon)
    gamma = np.abs(oracle.gamma) if oracle.scale else np.ones_like(oracle.gamma)
    x_hat = np.abs(x - wide(mean)) * wide(inverse_std)
    largest = np.abs(dy).max(axis=axes, keepdims=True)
    return {
        "y": unit * wide(gamma) * (1 + x_hat) + RESULT[dtype] * wide(np.abs(oracle.beta)),
        "dx": unit * wide(gamma * inverse_std) * largest * (1 + x_hat),
        "dgamma": (unit * np.abs(dy) * (1 + x_hat)).sum(axis=axes),
        "dbeta": RESULT[dtype] * np.abs(dy).sum(axis=axes),
    }


def away_from_the_kink(oracle, x, dy, dtype, training):
    """Let no gradient come from elements where rounding decides whether a ReLU lets it pass."""
    if not oracle.relu:
        return dy
    linear = Reference(**{**vars(oracle), "relu": False})
    z = linear.train(x) if training else linear.infer(x)
    return np.where(np.abs(z) <= tolerances(oracle, x, dy, dtype, training)["y"], 0, dy)


def check(subject, x, dy, training, take):
    """Compare one step, `take(x, dy)`, with the oracle's; the largest error over tolerance."""
    oracle, dtype = subject.oracle, subject.dtype
    x = rounded(x, dtype)
    dy = away_from_the_kink(oracle, x, rounded(dy, dtype), dtype, training)
    allowed = tolerances(oracle, x, dy, dtype, training)
    before = oracle.running_mean
    expected = (oracle.train_step if training else oracle.infer_step)(x, dy)
    actual = take(x, dy)
    worst = 0.0
    for name, tolerance in allowed.items():
        e, a = getattr(expected, name), getattr(actual, name)
        if a is None:
            continue
        if dtype == "float16" and name in ("y", "dx"):
            tolerance = tolerance + 2.0**-10 * np.abs(e) + 2.0**-24
        assert a.shape == e.shape, name
        error = np.abs(a - e)
        assert (error <= tolerance).all(), (
            f"{name}: off by {error.max()}, {(error / tolerance).max()} times what is allowed"
        )
        worst = max(worst, (error[tolerance > 0] / tolerance[tolerance > 0]).max(initial=0))
    if training and not oracle.use_global_stats:
        check_moved_statistics(subject, x, before)
    return worst


def check_moved_statistics(subject, x, before):
    """Compare the statistics after a training step, then let the oracle go on from the layer's.

    So no step inherits the rounding of an earlier one, and what does not train must keep each bit.
    """
    oracle, unit = subject.oracle, STATISTIC[subject.dtype]
    lost = rounding_of_mean(x, oracle.axis, subject.dtype)
    axes = reduced_axes(x.ndim, oracle.axis)
    allowed = unit * (np.abs(x).max(axis=axes) + np.abs(before))
    mean, var = subject.statistics()
    assert (np.abs(mean - oracle.running_mean) <= allowed).all(), (mean, oracle.running_mean)
    allowed = 10 * unit * lost**2 + unit * oracle.running_var * (1 if unit < 1e-9 else 10)
    assert (np.abs(var - oracle.running_var) <= allowed).all(), (var, oracle.running_var)
    oracle.running_mean, oracle.running_var = mean.astype(np.float64), var.astype(np.float64)
