"""Clause 3 of the contract: the running average, and the batches that leave it."""

import mxnet as mx
import numpy as np
import pytest
from contract_cases import every_mode
from helpers import CLOSE, check_step, infer, take_step, train_forward
from training_batches import SHAPE, assert_bits_equal, batch


@every_mode
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.99, 1.0, None])
def test_momentum(build, rng, mode, momentum):
    subject = build(mode, SHAPE, momentum=momentum)
    before = subject.statistics()
    for _ in range(4):
        x = batch(rng)
        train_forward(subject, x)
        subject.oracle.train(x)
        subject.check_statistics(rtol=1e-12)
        infer(subject, batch(rng))
    if momentum == 1.0:
        assert_bits_equal(subject.statistics(), before)


@every_mode
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_momentum_zero_replaces(build, rng, mode, dtype):
    """Old statistics of any size leave no trace."""
    values = {"running_mean": [1e6, -1e12, 1e20], "running_var": [1e6, 1e12, 1e20]}
    subject = build(mode, SHAPE, momentum=0.0, values=values, dtype=dtype)
    x = batch(rng).astype(dtype)
    train_forward(subject, x)
    subject.oracle.train(x)
    subject.check_statistics(rtol=1e-12 if dtype == "float64" else 1e-5)


@every_mode
def test_first_batch_of_a_cumulative_average_replaces(build, rng, mode):
    values = {"running_mean": [1e6, -1e12, 1e20], "running_var": [1e6, 1e12, 1e20]}
    subject = build(mode, SHAPE, momentum=None, values=values)
    x = batch(rng)
    train_forward(subject, x)
    subject.oracle.train(x)
    subject.check_statistics(rtol=1e-12)


@every_mode
def test_cumulative_average_weighs_batches_alike(build, rng, mode):
    subject = build(mode, SHAPE, momentum=None)
    batches = [batch(rng, (n, 3, 4, 5)) for n in (2, 9, 5, 1, 3)]
    for x in batches:
        train_forward(subject, x)
        infer(subject, x * 3)
    mean = np.mean([x.mean(axis=(0, 2, 3)) for x in batches], axis=0)
    var = np.mean([x.var(axis=(0, 2, 3)) for x in batches], axis=0)
    np.testing.assert_allclose(subject.statistics()[0], mean, rtol=1e-12)
    np.testing.assert_allclose(subject.statistics()[1], var, rtol=1e-12)


@every_mode
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0, None])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_batch_with_nonfinite_statistics_leaves_them(build, rng, mode, momentum, bad):
    """1e200 is finite itself; its square is not."""
    subject = build(mode, SHAPE, momentum=momentum)
    good = batch(rng)
    train_forward(subject, good)
    subject.oracle.train(good)
    before = subject.statistics()
    spoiled = batch(rng)
    spoiled[2, 1, 0, 0] = bad
    y = train_forward(subject, spoiled)
    assert_bits_equal(subject.statistics(), before)
    expected = subject.oracle.train(spoiled)
    np.testing.assert_allclose(y[:, [0, 2]], expected[:, [0, 2]], **CLOSE["float64"])
    good = batch(rng)
    train_forward(subject, good)
    subject.oracle.train(good)
    subject.check_statistics(rtol=1e-12)


@every_mode
def test_a_variance_too_large_for_float32_leaves_the_statistics(build, mode):
    subject = build(mode, (2, 2), dtype="float32")
    before = subject.statistics()
    train_forward(subject, np.array([[1e30, 1], [-1e30, 2]], np.float32))
    assert_bits_equal(subject.statistics(), before)


@every_mode
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_value_per_channel_keeps_statistics_finite(build, rng, mode, momentum):
    """m/(m-1) has no value at m = 1: the statistics it would spoil stay as they were."""
    subject = build(mode, (1, 3), momentum=momentum, unbiased_variance=True)
    before = subject.statistics()
    x, dy = rng.normal(size=(1, 3)), rng.normal(size=(1, 3))
    check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
    assert_bits_equal(subject.statistics(), before)


@every_mode
@pytest.mark.parametrize("momentum", [0.0, 0.9, None])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0, 5)])
def test_an_empty_batch_leaves_the_statistics(build, rng, mode, momentum, shape):
    with mx.util.np_shape(True):
        full = tuple(max(n, 2) for n in shape)
        subject = build(mode, full, momentum=momentum)
        x = rng.normal(size=full)
        train_forward(subject, x)
        subject.oracle.train(x)
        before = subject.statistics()
        assert train_forward(subject, np.zeros(shape)).shape == shape
        assert infer(subject, np.zeros(shape)).shape == shape
        assert_bits_equal(subject.statistics(), before)
        x = rng.normal(size=full)
        train_forward(subject, x)
        subject.oracle.train(x)
        subject.check_statistics(rtol=1e-12)
