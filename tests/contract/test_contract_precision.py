"""Clause 9 of the contract: numerical care."""

import numpy as np
import pytest
from contract_cases import every_mode
from helpers import CLOSE, take_step, train_forward
from mxnet import autograd


@every_mode
@pytest.mark.parametrize("mean", [1e5, -1e5, 1e4])
def test_large_means_lose_nothing_visible_in_float32(build, rng, mode, mean):
    shape = (64, 2, 8, 8)
    subject = build(
        mode, shape, dtype="float32", momentum=0.0, values={"gamma": [1.0, 1.0], "beta": [0.0, 0.0]}
    )
    x = (rng.normal(size=shape) + mean).astype("float32")
    dy = rng.normal(size=shape).astype("float32")
    step, expected = take_step(subject, x, dy), subject.oracle.train_step(x, dy)
    running_mean, running_var = subject.statistics()
    # Neighbouring float32 numbers are 0.008 apart at 1e5. A plain float32 mean is several of them
    # off and shifts the output by hundredths; one pass, E[x^2] - E[x]^2, is wrong by hundreds.
    np.testing.assert_allclose(running_mean, subject.oracle.running_mean, rtol=1e-7)
    np.testing.assert_allclose(running_var, subject.oracle.running_var, rtol=1e-5)
    np.testing.assert_allclose(step.y.std(axis=(0, 2, 3)), 1, atol=2e-5)
    np.testing.assert_allclose(step.y, expected.y, atol=1e-4)
    np.testing.assert_allclose(step.dx, expected.dx, atol=1e-4)


@every_mode
@pytest.mark.parametrize("value", [1 / 3, 1e3 / 3, -1e4 / 7])
def test_a_constant_channel_has_no_variance(build, mode, value):
    """Nothing but the rounding of its mean, seven digits in, and never a negative variance."""
    subject = build(mode, (50, 2, 7), dtype="float32", momentum=0.0)
    y = train_forward(subject, np.full((50, 2, 7), value, np.float32))
    _, var = subject.statistics()
    rounding = 2e-7 * abs(value)
    assert (var >= 0).all()
    assert (var <= rounding**2).all()
    allowed = rounding / np.sqrt(subject.oracle.epsilon) * np.abs(subject.oracle.gamma) + 1e-6
    assert (np.abs(y - subject.oracle.beta[:, None]) <= allowed[:, None]).all()


@every_mode
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e18])
def test_extreme_scales_in_float32(build, rng, mode, scale):
    """Squares of 1e18 fit float32 barely; a sum of squares over the batch must fit as well."""
    subject = build(mode, (16, 3), dtype="float32", momentum=0.0, epsilon=1e-30)
    x = (rng.normal(size=(16, 3)) * scale).astype("float32")
    y = train_forward(subject, x)
    expected = subject.oracle.train(x)
    np.testing.assert_allclose(subject.statistics()[1], subject.oracle.running_var, rtol=1e-5)
    if scale > 1e-18:  # below, epsilon matters and is itself near the smallest float32
        np.testing.assert_allclose(y, expected, **CLOSE["float32"])


@pytest.mark.parametrize("mode", ["eager", "hybrid", "exported"])
@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
def test_large_reductions_keep_five_digits(build, mode, mean):
    """Four million values per channel: a naive float32 sum would stop growing."""
    shape = (4, 2, 1024, 1024)
    rng = np.random.default_rng(7)
    subject = build(mode, shape, dtype="float32", momentum=0.0)
    x = rng.standard_normal(size=shape, dtype="float32")
    x += np.float32(mean)
    with autograd.train_mode():
        subject(subject.array(x))
    exact = [(np.mean(c, dtype="float64"), np.var(c, dtype="float64")) for c in (x[:, 0], x[:, 1])]
    running_mean, running_var = subject.statistics()
    np.testing.assert_allclose(running_var, [e[1] for e in exact], rtol=1e-5)
    np.testing.assert_allclose(running_mean, [e[0] for e in exact], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_large_reductions_in_the_gradient(build, mode):
    """dgamma and dbeta are sums over a million values too."""
    shape = (2, 2, 1024, 1024)
    rng = np.random.default_rng(8)
    subject = build(mode, shape, dtype="float32")
    x = rng.standard_normal(size=shape, dtype="float32")
    dy = rng.standard_normal(size=shape, dtype="float32") + np.float32(1)
    step, expected = take_step(subject, x, dy), subject.oracle.train_step(x, dy)
    np.testing.assert_allclose(step.dbeta, expected.dbeta, rtol=1e-5)
    np.testing.assert_allclose(step.dgamma, expected.dgamma, rtol=1e-5, atol=0.05)
    np.testing.assert_allclose(step.dx, expected.dx, rtol=1e-3, atol=1e-4)
