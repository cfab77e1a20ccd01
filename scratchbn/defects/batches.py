"""Batches that poison the running statistics."""

from __future__ import annotations

import numpy as np

from .case import Bench, Outcome, defect
from .measuring import batch, complaint, numpy_semantics, off, statistics, unpoisoned


def spoiled(value: float) -> np.ndarray:
    """Return a batch with one value put in."""
    x = batch((4, 3)).copy()
    x[0, 1] = value
    return x


@defect("An infinite value in one batch: running statistics inf and NaN for good")
def infinite_batch(bench: Bench) -> Outcome:
    """Nothing looks at the batch before it enters the running statistics."""
    layer = bench.layer(3)
    bench.step(bench.net(layer), spoiled(np.inf))
    return unpoisoned(layer)


@defect("A NaN in one batch: the same")
def nan_batch(bench: Bench) -> Outcome:
    """Nothing looks at the batch before it enters the running statistics."""
    layer = bench.layer(3)
    bench.step(bench.net(layer), spoiled(np.nan))
    return unpoisoned(layer)


@defect("A finite batch whose variance overflows float32 (one value of 1e30)")
def overflowing_batch(bench: Bench) -> Outcome:
    """Nothing looks at the batch before it enters the running statistics."""
    layer = bench.layer(3)
    bench.step(bench.net(layer), spoiled(1e30))
    return unpoisoned(layer)


@defect("momentum=1, which should never move them, and an infinite value")
def momentum_one(bench: Bench) -> Outcome:
    """The batch enters with a weight of 0, and 0 times infinity is NaN."""
    layer = bench.layer(3, momentum=1.0)
    bench.step(bench.net(layer), spoiled(np.inf))
    return unpoisoned(layer)


def empty(bench: Bench, dtype: str) -> Outcome:
    """Train on no data."""
    with numpy_semantics(array=False):
        layer = bench.layer(3, dtype)
        net = bench.net(layer)
        error = complaint(lambda: bench.step(net, np.zeros((0, 3)), dtype=dtype))
        return unpoisoned(layer, also=f"; {error}" if error else "")


@defect("An empty batch, float32")
def empty_batch(bench: Bench) -> Outcome:
    """The mean of nothing is 0/0."""
    return empty(bench, "float32")


@defect("An empty batch, float64")
def empty_batch_float64(bench: Bench) -> Outcome:
    """The mean of nothing is 0/0."""
    return empty(bench, "float64")


def constant(bench: Bench, dtype: str) -> Outcome:
    """Train on a channel of equal values, without epsilon."""
    layer, x = bench.layer(2, dtype, epsilon=0.0), batch((4, 2)).copy()
    x[:, 1] = 2
    y, dx = bench.step(bench.net(layer), x, dtype=dtype)
    seen = np.array([y[0, 1], dx[0, 1], statistics(layer)[1][1]])
    text = "output {:.3g}, gradient {:.3g}, running variance {:.3g}".format(*seen)
    return Outcome(off(seen, [0, 0, 0.9]) < 1e-6, not np.isfinite(seen).all(), text)


@defect("epsilon=0 and a constant channel, float32")
def zero_epsilon(bench: Bench) -> Outcome:
    """The data is zero once centred, 1/sqrt(0) is infinite, and their product is NaN."""
    return constant(bench, "float32")


@defect("epsilon=0 and a constant channel, float64")
def zero_epsilon_float64(bench: Bench) -> Outcome:
    """1/std is set to 0 there, and the variance computed back from it is 1/0."""
    return constant(bench, "float64")
