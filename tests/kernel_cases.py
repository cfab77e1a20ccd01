"""The kernel against float64 NumPy, over every way it walks an array; also run as a program.

As a program it takes part in tests of other builds and other numbers of threads, which a process
chooses once.
"""

from __future__ import annotations

import sys

import scratchbn

# isort: split
import mxnet as mx
import numpy as np
from mxnet import autograd

# (shape, axis): rows, with tails and few channels; columns, with narrow and wide tiles.
SHAPES = [
    ((4, 3), 1),
    ((64, 20, 24, 24), 1),
    ((5, 50, 5, 5), 1),
    ((3, 1, 50, 60), 1),
    ((1, 2, 4099), 1),
    ((2, 3, 4, 5, 6), 2),
    ((256, 512), 1),
    ((8, 16, 16, 64), -1),
    ((5000, 7), 1),
    ((2, 1300), 1),
    ((9, 300, 3), 1),
    ((7, 5, 3, 5), 1),
    ((6, 2, 3), 0),
    ((2, 3), 1),
]
ONE_VALUE_PER_CHANNEL = [((1, 3), 1), ((1, 700), 1), ((1, 5, 1, 1), 1), ((1, 1), 1), ((40, 1), 0)]
CLOSE = {"float32": 2e-5, "float64": 1e-11}


def expected(x, dy, state, axis, relu, training):
    """Return y, dx, dgamma, dbeta and the batch statistics, from the formulas of the paper."""
    x, dy = (np.moveaxis(a.astype(np.float64), axis, -1) for a in (x, dy))
    over = tuple(range(x.ndim - 1))
    gamma, beta, mean, var = (state[k] for k in ("gamma", "beta", "running_mean", "running_var"))
    if training:
        mean, var = x.mean(axis=over), x.var(axis=over)
    inverse_std = 1 / np.sqrt(var + 1e-5)
    x_hat = (x - mean) * inverse_std
    y = gamma * x_hat + beta
    if relu:
        dy, y = np.where(y > 0, dy, 0), np.maximum(y, 0)
    dx = gamma * inverse_std * dy
    if training:
        dx -= gamma * inverse_std * (dy.mean(axis=over) + x_hat * (dy * x_hat).mean(axis=over))
    back = [np.moveaxis(a, -1, axis) for a in (y, dx)]
    return (*back, (dy * x_hat).sum(axis=over), dy.sum(axis=over), mean, var)


def largest_error(shape, axis, dtype, relu, training, hybrid, mean=0.0):
    """Run one step natively and return the largest error, relative to the largest value."""
    rng = np.random.default_rng(len(shape) + sum(shape))
    channels = shape[axis]
    kind = scratchbn.ScratchBatchNormReLU if relu else scratchbn.ScratchBatchNorm
    layer = kind(axis=axis, in_channels=channels)
    layer.initialize()
    layer.cast(dtype)
    state = {
        "gamma": rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels),
        "beta": rng.normal(size=channels),
        "running_mean": rng.normal(mean, 1, channels),
        "running_var": rng.uniform(0.5, 2, channels),
    }
    for name, value in state.items():
        getattr(layer, name).set_data(mx.nd.array(value, dtype=dtype))
        state[name] = getattr(layer, name).data().asnumpy().astype(np.float64)
    if hybrid:
        layer.hybridize(static_alloc=True)
    x = mx.nd.array(rng.normal(mean, 2, shape), dtype=dtype)
    dy = mx.nd.array(rng.normal(size=shape), dtype=dtype)
    x.attach_grad()
    want = expected(x.asnumpy(), dy.asnumpy(), state, axis, relu, training)
    if relu:  # elements at the kink, where rounding decides, take no part
        linear = expected(x.asnumpy(), dy.asnumpy(), state, axis, False, training)[0]
        dy = mx.nd.array(np.where(np.abs(linear) < 1e-3, 0, dy.asnumpy()), dtype=dtype)
        want = expected(x.asnumpy(), dy.asnumpy(), state, axis, relu, training)
    with scratchbn.use_backend("native"), autograd.record(train_mode=training):
        y = layer(x)
    y.backward(dy, train_mode=training)
    *want, batch_mean, batch_var = want
    keep = 0.9 if training else 1.0
    want.append(keep * state["running_mean"] + (1 - keep) * batch_mean)
    want.append(keep * state["running_var"] + (1 - keep) * batch_var)
    parameters = (layer.running_mean.data(), layer.running_var.data())
    got = [y, x.grad, layer.gamma.grad(), layer.beta.grad(), *parameters]
    return max(np.abs(g.asnumpy() - w).max() / max(1, np.abs(w).max()) for g, w in zip(got, want))


def exact_zeros(shape, axis, dtype, relu, hybrid):
    """Return the gradients of x and gamma for equal elements, and equal gradients, in a channel."""
    rng = np.random.default_rng(sum(shape) + axis)
    channels = shape[axis]
    kind = scratchbn.ScratchBatchNormReLU if relu else scratchbn.ScratchBatchNorm
    layer = kind(axis=axis, in_channels=channels, beta_initializer="ones")
    layer.initialize()
    layer.cast(dtype)
    layer.gamma.set_data(mx.nd.array(rng.normal(size=channels), dtype=dtype))
    if hybrid:
        layer.hybridize(static_alloc=True)
    one = [channels if i == axis % len(shape) else 1 for i in range(len(shape))]
    x, dy = (
        mx.nd.array(np.broadcast_to(rng.normal(3, 10, one), shape), dtype=dtype) for _ in range(2)
    )
    x.attach_grad()
    with scratchbn.use_backend("native"), autograd.record():
        y = layer(x)
    y.backward(dy)
    return x.grad.asnumpy(), layer.gamma.grad().asnumpy()


def main():
    """Print the largest error over tolerance of all cases; a 0 that is none is infinite."""
    worst = 0.0
    for shape, axis in SHAPES + ONE_VALUE_PER_CHANNEL:
        for dtype in CLOSE:
            for gradient in exact_zeros(shape, axis, dtype, relu=False, hybrid=True):
                worst = np.inf if gradient.any() else worst
    for shape, axis in SHAPES:
        for dtype, tolerance in CLOSE.items():
            for relu in (False, True):
                for training in (False, True):
                    error = largest_error(shape, axis, dtype, relu, training, hybrid=True)
                    worst = max(worst, error / tolerance)
    print(worst)
    return 0


if __name__ == "__main__":
    sys.exit(main())
