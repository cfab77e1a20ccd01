"""Digits that are lost."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..parity.oracle import OracleBatchNorm
from .case import Bench, Outcome, defect
from .measuring import batch, numbers, off, percent, statistics


def numerics(
    bench: Bench, x: np.ndarray, dy: np.ndarray, dtype: str = "float32", **options: Any
) -> tuple[float, float, float]:
    """Return errors of a training step: output (absolute), input gradient, batch variance."""
    x, dy = x.astype(dtype), dy.astype(dtype)
    layer = bench.layer(x.shape[1], dtype, momentum=0.0, **options)
    y, dx = bench.step(bench.net(layer), x, dy, dtype=dtype)
    oracle = OracleBatchNorm.fresh(x.shape[1], momentum=0.0, **options)
    exact = oracle.train_step(x, dy)
    return (
        np.abs(y - exact.y).max(),
        off(dx, exact.dx),
        off(statistics(layer)[1], oracle.running_var),
    )


@defect("float32, mean 1e5, standard deviation 1: output, gradient and variance")
def large_mean(bench: Bench) -> Outcome:
    """Sums over a channel run in plain float32, which loses the mean, and with it the variance."""
    shape = (16, 3, 64, 64)
    x, dy = batch(shape, 1e5, 1), batch(shape, 0, 1, seed=1)
    y, dx, var = numerics(bench, x, dy)
    text = f"output off by {y:.2g}, gradient {percent(dx)}, variance {percent(var)}"
    # float32 rounds a mean of 1e5 to 1/128, and the output with it.
    return Outcome(y < 0.01 and dx < 1e-3 and var < 1e-3, y > 1 and var > 1, text)


@defect("float32, 4 million elements per channel, mean 3, standard deviation 2")
def large_reduction(bench: Bench) -> Outcome:
    """Sums over a channel run in plain float32."""
    shape = (4, 1, 1024, 1024)
    y, dx, var = numerics(bench, batch(shape), batch(shape, 0, 1, seed=1))
    text = f"output off by {y:.2g}, gradient {percent(dx)}, variance {percent(var)}"
    return Outcome(y < 2e-5 and dx < 2e-5 and var < 1e-5, y > 1e-3 and var > 1e-3, text)


@defect("Running variance rebuilt from 1/std: standard deviation 1e-5, epsilon 1e-3")
def small_variance(bench: Bench) -> Outcome:
    """The variance is computed back from 1/sqrt(variance + epsilon), where epsilon swallowed it."""
    x = batch((64, 4, 8, 8), 0, 1e-5)
    var = numerics(bench, x, x, epsilon=1e-3)[2]
    return Outcome(var < 1e-5, var > 0.2, f"variance {percent(var)} off")


@defect("Running variance of a constant channel, momentum 0: negative")
def negative_variance(bench: Bench) -> Outcome:
    """The variance is computed back from 1/sqrt(variance + epsilon), with its rounding."""
    layer = bench.layer(2, momentum=0.0)
    bench.step(bench.net(layer), np.full((8, 2), 0.5))
    var = statistics(layer)[1]
    text = f"running variance {numbers(var)}"
    return Outcome(bool((var == 0).all()), bool((var < 0).all()), text)


@defect("float16: the input gradient where most of it cancels (loss = y * y)", 8509, 9916)
def float16_gradient(bench: Bench) -> Outcome:
    """The gradient's parts are rounded to float16 before they cancel."""
    x = batch((64, 4, 16, 16), 0, 1)
    dy = OracleBatchNorm.fresh(4).train(x.astype("float16")).astype("float16")
    dx = numerics(bench, x, dy, "float16")[1]
    return Outcome(dx < 0.01, dx > 0.5, f"gradient {percent(dx)} off")


@defect("float16: epsilon is rounded to float16, 1e-8 to 0; a constant channel")
def float16_epsilon(bench: Bench) -> Outcome:
    """The type of epsilon is that of the data."""
    layer = bench.layer(2, "float16", epsilon=1e-8)
    y, dx = bench.step(bench.net(layer), [[1, 1], [1, 2], [1, 3]], dtype="float16")
    text = f"output {numbers(y[:, 0])}, gradient {numbers(dx[:, 0])}"
    exact = not y[:, 0].any() and not dx[:, 0].any()
    return Outcome(exact, bool(np.isnan(y[:, 0]).all()), text)


@defect("float64: the statistics are averaged with a float32 momentum")
def float64_statistics(bench: Bench) -> Outcome:
    """The operator holds momentum in float32: 0.9 is 0.899999976, an error of 2e-8 a step."""
    layer, x = bench.layer(3, "float64"), batch()
    bench.step(bench.net(layer), x, dtype="float64")
    oracle = OracleBatchNorm.fresh(3)
    oracle.train(x)
    error = off(statistics(layer)[0], oracle.running_mean)
    return Outcome(error < 1e-14, error > 1e-8, f"running mean {error:.1g} off, relative")
