"""The formulas one by one, against NumPy in float64, and the layer against the paper as written."""

from scratchbn import ScratchBatchNorm, functional

# isort: split
from scratchbn.parity.oracle import batch_moments

import mxnet as mx
import numpy as np
import pytest
from helpers import random_values, set_values
from mxnet import autograd, nd

SHAPES = [(6, 3), (4, 3, 5, 2)]
ANY_SHAPE = [*SHAPES, (4, 3, 7), (2, 3, 2, 3, 2), (1, 3), (5, 3, 1, 1)]


def float64(values):
    return nd.array(np.asarray(values), dtype="float64")


def view_of(x, axis=1):
    return functional.ChannelView(nd, float64(x), axis)


# Algorithm 1 as written


@pytest.mark.parametrize("backend", ["portable", "native"], indirect=True)
@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_computes_the_paper_as_written(shape, hybridize, backend, rng):
    """Output and all three gradients in training, of the layer and of five lines."""
    values = random_values(rng, 3)
    layer = ScratchBatchNorm(epsilon=1e-3, in_channels=3)
    layer.initialize()
    layer.cast("float64")
    set_values(layer, values)
    if hybridize:
        layer.hybridize()
    x, dy = float64(rng.normal(2, 3, shape)), float64(rng.normal(size=shape))
    gamma, beta = float64(values["gamma"]), float64(values["beta"])
    for array in (x, gamma, beta):
        array.attach_grad()
    with autograd.record():
        written = functional.pure_batch_norm(x, gamma, beta, epsilon=1e-3)
    written.backward(dy)
    gradients = [array.grad.asnumpy() for array in (x, gamma, beta)]
    x.attach_grad()
    with autograd.record():
        y = layer(x)
    y.backward(dy)
    np.testing.assert_allclose(y.asnumpy(), written.asnumpy(), rtol=1e-11, atol=1e-12)
    found = (x.grad, layer.gamma.grad(), layer.beta.grad())
    for actual, expected in zip(found, gradients):
        np.testing.assert_allclose(actual.asnumpy(), expected, rtol=1e-9, atol=1e-11)


def test_as_written_refuses_other_shapes():
    one = nd.ones(3)
    for shape in ((3,), (2, 3, 4), (2, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match=r"x must have shape \(N, C\) or \(N, C, H, W\)"):
            functional.pure_batch_norm(nd.ones(shape), one, one)


# Lines 1 and 2


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", ANY_SHAPE)
def test_mean_and_variance(shape, axis, rng):
    x = rng.normal(3, 2, shape)
    mean, variance = functional.moments(nd, float64(x), axis)
    expected_mean, expected_variance = batch_moments(x, axis)
    np.testing.assert_allclose(mean.asnumpy(), expected_mean, rtol=1e-13)
    np.testing.assert_allclose(variance.asnumpy(), expected_variance, rtol=1e-12, atol=1e-14)


def test_the_mean_is_held_in_two_parts(rng):
    """In float32 at a mean of 1e5: high + low is closer to the mean than a float32 can be."""
    x = (1e5 + rng.normal(size=(4096, 2))).astype("float32")
    view = functional.ChannelView(nd, nd.array(x), 1)
    batch = functional.statistics(nd, view, None, None, lambda batch, running: batch())
    mean, variance = batch_moments(x.astype("float64"))
    high = (x - batch.centred.asnumpy())[0].astype("float64")
    assert np.ptp(x - batch.centred.asnumpy(), axis=0).max() == 0, "x - high is exact"
    both = high + batch.low.asnumpy()
    assert np.abs(both - mean).max() < 1e-4 < np.spacing(np.float32(1e5))
    np.testing.assert_allclose(batch.variance.asnumpy(), variance, rtol=1e-5)


def test_the_variance_of_a_constant_is_0_and_never_negative(rng):
    for value in (0.1, 1e5, -3e-5):
        view = functional.ChannelView(nd, nd.full((7, 3, 2), value), 1)
        batch = functional.statistics(nd, view, None, None, lambda batch, running: batch())
        assert (batch.variance.asnumpy() >= 0).all()
        np.testing.assert_allclose(batch.variance.asnumpy(), 0, atol=1e-12 * value**2)


def test_inference_takes_the_running_statistics(rng):
    x, mean, variance = rng.normal(size=(4, 3)), rng.normal(size=3), rng.uniform(1, 2, 3)
    running = float64(mean), float64(variance)
    batch = functional.statistics(nd, view_of(x), *running, lambda batch, running: running)
    np.testing.assert_array_equal(batch.mean.asnumpy(), mean)
    np.testing.assert_array_equal(batch.variance.asnumpy(), variance)
    np.testing.assert_array_equal(batch.centred.asnumpy(), x - mean)
    assert not batch.low.asnumpy().any()


# Lines 3 and 4


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3, 0.5])
def test_inverse_std(epsilon, rng):
    variance = rng.uniform(0, 3, 5)
    found = functional.inverse_std(nd, float64(variance), epsilon).asnumpy()
    np.testing.assert_allclose(found, 1 / np.sqrt(variance + epsilon), rtol=1e-12)


def test_inverse_std_of_nothing_is_0_without_epsilon():
    variance = float64([0, 4])
    variance.attach_grad()
    with autograd.record():
        factor = functional.inverse_std(nd, variance, 0)
    factor.backward()
    np.testing.assert_array_equal(factor.asnumpy(), [0, 0.5])
    np.testing.assert_allclose(variance.grad.asnumpy(), [0, -0.5 * 4**-1.5])


@pytest.mark.parametrize("epsilon", [0, 1e-5])
def test_inverse_std_of_what_is_no_variance_is_nan(epsilon):
    variance = float64([np.nan, -1, np.inf])
    found = functional.inverse_std(nd, variance, epsilon).asnumpy()
    np.testing.assert_array_equal(found, [np.nan, np.nan, 0])


@pytest.mark.parametrize("shape", ANY_SHAPE)
def test_scale_and_shift(shape, rng):
    x, gamma, beta = rng.normal(2, 3, shape), rng.normal(size=3), rng.normal(size=3)
    mean, variance = batch_moments(x)
    view = view_of(x)
    batch = functional.statistics(nd, view, None, None, lambda batch, running: batch())
    y = functional.scale_and_shift(nd, view, batch, float64(gamma), float64(beta), 1e-3)
    along = (1, -1, *[1] * (len(shape) - 2))
    x_hat = (x - mean.reshape(along)) / np.sqrt(variance.reshape(along) + 1e-3)
    expected = gamma.reshape(along) * x_hat + beta.reshape(along)
    found = view.reshape_back(y).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


# Algorithm 2 and the moving averages


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_either_mode(training, rng):
    x = rng.normal(2, 3, (5, 3, 2))
    arrays = [float64(v) for v in (rng.normal(size=3), rng.normal(size=3))]
    running = rng.normal(size=3), rng.uniform(1, 2, 3)
    y, mean, variance = functional.batch_norm(
        nd, float64(x), *arrays, *map(float64, running), training=training, epsilon=0.1
    )
    used = batch_moments(x) if training else running
    np.testing.assert_allclose(mean.asnumpy(), used[0], rtol=1e-12)
    np.testing.assert_allclose(variance.asnumpy(), used[1], rtol=1e-12)
    gamma, beta = (v.asnumpy().reshape(1, 3, 1) for v in arrays)
    mean, variance = (v.reshape(1, 3, 1) for v in used)
    expected = gamma * (x - mean) / np.sqrt(variance + 0.1) + beta
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", ANY_SHAPE)
def test_unbiased_variance(shape, rng):
    x = rng.normal(size=shape)
    view = view_of(x)
    m = x.size // 3
    assert view.m.asscalar() == m
    biased = float64(batch_moments(x)[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        unbiased = functional.unbiased_variance(nd, biased, view.m).asnumpy()
    if m == 1:
        assert not np.isfinite(unbiased).any()
        return
    expected = np.moveaxis(x, 1, 0).reshape(3, -1).var(axis=1, ddof=1)
    np.testing.assert_allclose(unbiased, expected, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.9, 1.0])
def test_running_average(momentum, rng):
    running, batch = rng.normal(size=3), rng.normal(size=3)
    found = functional.running_average(float64(running), float64(batch), momentum).asnumpy()
    np.testing.assert_allclose(found, momentum * running + (1 - momentum) * batch, rtol=1e-13)


def test_cumulative_average_is_the_mean_of_all(rng):
    values, average = rng.normal(size=(7, 3)), float64(np.full(3, 1e9))
    for count, value in enumerate(values):
        average = functional.cumulative_average(nd, average, float64(value), float64([count]))
    np.testing.assert_allclose(average.asnumpy(), values.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_all_finite(place, bad):
    arrays = [np.ones(3), np.ones(3)]
    assert functional.all_finite(nd, *map(float64, arrays)).asscalar() == 1
    arrays[place][1] = bad
    assert functional.all_finite(nd, *map(float64, arrays)).asscalar() == 0


# The same formulas in a graph


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", ANY_SHAPE)
def test_a_graph_computes_the_same(shape, axis, rng):
    channels = shape[axis]
    values = [rng.normal(size=shape), *(rng.uniform(1, 2, channels) for _ in range(4))]
    names = ["x", "gamma", "beta", "mean", "variance"]
    symbols = [mx.sym.var(name) for name in names]
    outputs = functional.batch_norm(mx.sym, *symbols, axis=axis, training=True)
    graph = mx.sym.Group(list(outputs))
    arguments = {n: float64(v) for n, v in zip(names, values) if n in graph.list_arguments()}
    found = graph.eval(ctx=mx.cpu(), **arguments)
    expected = functional.batch_norm(nd, *map(float64, values), axis=axis, training=True)
    for actual, e in zip(found, expected):
        np.testing.assert_allclose(actual.asnumpy(), e.asnumpy(), rtol=1e-12, atol=1e-13)
