"""Running statistics without their initial values: exact from the first batch, in every mode."""

from scratchbn import to_builtin
from scratchbn.debiased import DebiasedBatchNorm
from scratchbn.deploy import export_inference
from scratchbn.parity.oracle import batch_moments

import mxnet as mx
import numpy as np
import pytest
from helpers import CLOSE, MODES, array, check_step, infer, take_step, train_forward
from mxnet import autograd
from mxnet.gluon import nn


def debiased(momentum, values):
    """The weighted average by its definition."""
    weights = np.array([momentum ** (len(values) - 1 - b) for b in range(len(values))])
    return (weights[:, None] * np.array(values)).sum(axis=0) / weights.sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("momentum", [0.9, 0.999, 1e-3])
def test_running_statistics_are_the_weighted_average(mode, momentum, build, rng):
    subject = build(mode, (6, 3, 2), layer_class=DebiasedBatchNorm, momentum=momentum)
    moments = []
    for _ in range(4):
        x, dy = rng.normal(1, 2, (6, 3, 2)), rng.normal(size=(6, 3, 2))
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        moments.append(batch_moments(x))
        for name, values in zip(("running_mean", "running_var"), zip(*moments)):
            expected = debiased(momentum, values)
            np.testing.assert_allclose(subject.value(name), expected, rtol=1e-10, atol=1e-12)
            setattr(subject.oracle, name, expected)
        np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])
    assert subject.value("num_batches") == 4


@pytest.mark.parametrize("mode", ["eager", "hybrid", "exported"])
def test_the_first_batch_replaces_the_initial_values(mode, build, rng):
    """In float32, a residue of the initial 1 would dwarf a variance of 1e-12."""
    subject = build(mode, (64, 3), layer_class=DebiasedBatchNorm, momentum=0.99, dtype="float32")
    x = rng.normal(0, 1e-6, (64, 3)).astype("f4")
    train_forward(subject, x)
    np.testing.assert_allclose(subject.value("running_var"), batch_moments(x)[1], rtol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_a_batch_that_is_not_finite_does_not_count(mode, build, rng):
    subject = build(mode, (6, 3), layer_class=DebiasedBatchNorm)
    x = rng.normal(size=(6, 3))
    train_forward(subject, np.where(x > 1, np.inf, x) + np.inf)
    train_forward(subject, x)
    mean, variance = batch_moments(x)
    np.testing.assert_allclose(subject.value("running_mean"), mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(subject.value("running_var"), variance, rtol=1e-10)
    assert subject.value("num_batches") == 1


def test_files_fold_it_and_repr_rebuilds_it(device, rng, tmp_path):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), DebiasedBatchNorm(momentum=0.5), nn.Dense(2))
    net.initialize(mx.init.Normal(0.5), ctx=device)
    net.hybridize()
    x = array(rng.normal(size=(5, 2, 6, 6)), device, "float32")
    with autograd.train_mode():
        net(x)
    mx.nd.waitall()
    report = export_inference(net, tmp_path / "served", x)
    assert (len(report.folded), len(report.kept)) == (1, 0)
    assert repr(eval(repr(net[1]))) == repr(net[1])
    assert "momentum=0.5" in repr(net[1])
    assert len(to_builtin(net, report=True)[1].skipped) == 1


@pytest.mark.parametrize(
    ("momentum", "error"), [(0, ValueError), (1, ValueError), (None, TypeError), ("1", TypeError)]
)
def test_bad_momentum(momentum, error):
    with pytest.raises(error, match="momentum must be"):
        DebiasedBatchNorm(momentum=momentum)
