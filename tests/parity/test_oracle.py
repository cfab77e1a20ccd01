"""The oracle itself: numeric gradients, identities, published numbers, MXNet where right."""

from scratchbn.parity.oracle import OracleBatchNorm, as_channels, batch_moments, reduced_axes

import mxnet as mx
import numpy as np
import pytest
from helpers import numeric_gradient
from hypothesis import given
from hypothesis import strategies as st
from mxnet import autograd
from mxnet.gluon import nn

SHAPES = {2: (5, 3), 3: (4, 3, 2), 4: (3, 2, 2, 3), 5: (2, 3, 2, 1, 2), 6: (2, 2, 1, 3, 1, 2)}
AXES = [(rank, axis) for rank in SHAPES for axis in range(-rank, rank)]
A = np.array([[1.0, 7], [5, 4], [6, 10]])
B = np.array([1.0, 6, 5, 7, 4, 3, 2, 5, 6, 3, 2, 4, 5, 3, 2, 5]).reshape(2, 2, 2, 2)


def random_oracle(rng, channels, **options):
    return OracleBatchNorm(
        gamma=rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels),
        beta=rng.normal(size=channels),
        running_mean=rng.normal(size=channels),
        running_var=rng.uniform(0.5, 2, channels),
        **options,
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("rank", "axis"), AXES)
def test_gradients_equal_central_differences(rng, rank, axis, training, relu):
    x = rng.normal(size=SHAPES[rank]) * 2 + 1
    dy = rng.normal(size=x.shape)
    oracle = random_oracle(rng, x.shape[axis], axis=axis, momentum=1.0, relu=relu)
    take = oracle.train_step if training else oracle.infer_step
    step = take(x, dy)

    def loss():
        return (take(x, dy).y * dy).sum()

    np.testing.assert_allclose(step.dx, numeric_gradient(loss, x), atol=2e-8, rtol=2e-6)
    np.testing.assert_allclose(
        step.dgamma, numeric_gradient(loss, oracle.gamma), atol=2e-8, rtol=2e-6
    )
    np.testing.assert_allclose(
        step.dbeta, numeric_gradient(loss, oracle.beta), atol=2e-8, rtol=2e-6
    )


@given(
    rank=st.integers(2, 5),
    data=st.data(),
    offset=st.floats(-1e3, 1e3),
    spread=st.floats(1e-2, 1e3),
    seed=st.integers(0, 2**16),
)
def test_identities_of_the_training_gradient(rank, data, offset, spread, seed):
    """The output is standardized; dx sums to zero and is orthogonal to the normalized data."""
    rng = np.random.default_rng(seed)
    shape = tuple(data.draw(st.integers(2, 4)) for _ in range(rank))
    axis = data.draw(st.integers(-rank, rank - 1))
    x = rng.normal(offset, spread, size=shape)
    dy = rng.normal(size=shape)
    oracle = OracleBatchNorm.fresh(shape[axis], axis=axis, epsilon=0.0)
    step = oracle.train_step(x, dy)
    axes = reduced_axes(rank, axis)
    size = np.abs(dy).sum() / x.std(axis=axes)  # dx cancels to rounding when m is 2
    np.testing.assert_allclose(step.y.mean(axis=axes), 0, atol=1e-8)
    np.testing.assert_allclose(step.y.var(axis=axes), 1, rtol=1e-8)
    np.testing.assert_allclose(step.dx.sum(axis=axes) / size, 0, atol=1e-9)
    np.testing.assert_allclose((step.dx * step.y).sum(axis=axes) / size, 0, atol=1e-9)


def test_golden_cells_of_the_tutorial():
    """Numbers printed in the notebook of the tutorial this library grew from."""
    np.testing.assert_allclose(
        OracleBatchNorm.fresh(2).train(A),
        [[-1.3887286, 0], [0.46290955, -1.2247438], [0.9258191, 1.2247438]],
        atol=1e-6,
    )
    first = [
        -1.637844,
        0.881916,
        0.377964,
        1.385868,
        0.30779248,
        -0.51298743,
        -1.3337674,
        1.1285723,
    ]
    second = [
        0.881916,
        -0.62994,
        -1.1338919,
        -0.12598799,
        1.1285723,
        -0.51298743,
        -1.3337674,
        1.1285723,
    ]
    actual = OracleBatchNorm.fresh(2).train(B)
    np.testing.assert_allclose(actual.reshape(2, -1), [first, second], atol=1e-5)


def test_moments_along_every_axis_equal_flattened_channels(rng):
    for rank, axis in AXES:
        x = rng.normal(size=SHAPES[rank])
        rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
        mean, var = batch_moments(x, axis)
        np.testing.assert_allclose(mean, rows.mean(axis=1), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(var, rows.var(axis=1), rtol=1e-14)
        assert as_channels(mean, rank, axis).shape[axis] == x.shape[axis]


def test_running_average_is_exponential(rng):
    batches = [rng.normal(size=(6, 3)) for _ in range(3)]
    oracle = OracleBatchNorm.fresh(3, momentum=0.8)
    for batch in batches:
        oracle.train(batch)
    weights = [0.2 * 0.8**2, 0.2 * 0.8, 0.2]
    mean = sum(w * b.mean(axis=0) for w, b in zip(weights, batches))
    var = 0.8**3 + sum(w * b.var(axis=0) for w, b in zip(weights, batches))
    np.testing.assert_allclose(oracle.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(oracle.running_var, var, rtol=1e-13)


def test_cumulative_average_weighs_batches_alike(rng):
    batches = [rng.normal(size=(n, 3)) for n in (2, 7, 4)]
    oracle = random_oracle(rng, 3, momentum=None)
    for batch in batches:
        oracle.train(batch)
    np.testing.assert_allclose(
        oracle.running_mean, np.mean([b.mean(axis=0) for b in batches], axis=0)
    )
    np.testing.assert_allclose(
        oracle.running_var, np.mean([b.var(axis=0) for b in batches], axis=0)
    )


def test_unbiased_variance_is_stored_and_not_used(rng):
    x = rng.normal(size=(5, 3))
    biased, unbiased = (
        OracleBatchNorm.fresh(3, momentum=0.0, unbiased_variance=flag) for flag in (False, True)
    )
    np.testing.assert_array_equal(biased.train(x), unbiased.train(x))
    np.testing.assert_allclose(unbiased.running_var, x.var(axis=0, ddof=1))
    np.testing.assert_allclose(biased.running_var, x.var(axis=0))


@pytest.mark.parametrize("momentum", [0.0, 0.9, None])
@pytest.mark.parametrize("bad", ["nan", "inf", "empty"])
def test_a_batch_without_finite_statistics_is_skipped(rng, momentum, bad):
    oracle = random_oracle(rng, 3, momentum=momentum)
    before = oracle.running_mean.copy(), oracle.running_var.copy()
    x = np.zeros((0, 3)) if bad == "empty" else rng.normal(size=(4, 3))
    if bad != "empty":
        x[1, 2] = float(bad)
    step = oracle.train_step(x, np.ones_like(x))
    np.testing.assert_array_equal(oracle.running_mean, before[0])
    np.testing.assert_array_equal(oracle.running_var, before[1])
    assert oracle.batches == 0
    assert step.y.shape == x.shape == step.dx.shape
    assert step.dgamma.shape == step.dbeta.shape == (3,)


def test_ignored_scale_and_center(rng):
    x, dy = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    oracle = random_oracle(rng, 3, scale=False, center=False)
    step = oracle.train_step(x, dy)
    np.testing.assert_allclose(step.y.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(step.y.std(axis=0), 1, rtol=1e-4)
    np.testing.assert_array_equal(step.dgamma, 0)
    np.testing.assert_array_equal(step.dbeta, 0)


@pytest.mark.parametrize("axis", [1, 3, -1])
@pytest.mark.parametrize("use_global_stats", [False, True])
def test_agrees_with_the_built_in_layer(device, rng, axis, use_global_stats):
    """MXNet keeps its momentum in float32, so its float64 statistics are compared at 1e-6."""
    x, dy = rng.normal(size=(4, 3, 5, 3)), rng.normal(size=(4, 3, 5, 3))
    oracle = random_oracle(rng, 3, axis=axis, use_global_stats=use_global_stats)
    layer = nn.BatchNorm(axis=axis, use_global_stats=use_global_stats, in_channels=3)
    layer.initialize(ctx=device)
    layer.cast("float64")
    for name in ("gamma", "beta", "running_mean", "running_var"):
        getattr(layer, name).set_data(mx.nd.array(getattr(oracle, name), dtype="float64"))
    data = mx.nd.array(x, dtype="float64", ctx=device)
    data.attach_grad()
    with autograd.record():
        y = layer(data)
    y.backward(mx.nd.array(dy, dtype="float64", ctx=device))
    step = oracle.train_step(x, dy)
    # The built-in reads epsilon as float32: 1e-5 arrives with a relative error of 2.5e-8.
    close = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(y.asnumpy(), step.y, **close)
    np.testing.assert_allclose(data.grad.asnumpy(), step.dx, **close)
    np.testing.assert_allclose(layer.gamma.grad().asnumpy(), step.dgamma, **close)
    np.testing.assert_allclose(layer.beta.grad().asnumpy(), step.dbeta, **close)
    np.testing.assert_allclose(layer.running_mean.data().asnumpy(), oracle.running_mean, **close)
    np.testing.assert_allclose(layer.running_var.data().asnumpy(), oracle.running_var, **close)
    np.testing.assert_allclose(layer(data).asnumpy(), oracle.infer(x), **close)
