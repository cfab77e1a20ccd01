"""The variants against exact identities and a float64 oracle, in every mode."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from scratchbn.parity.oracle import Step, batch_moments
from scratchbn.variants import BatchRenorm, GhostBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import BLOCK_MODES, MODES, check_step, infer, take_step, train_forward
from variant_layers import EXACT, VARIANTS, data, of

UNLIMITED = 1e30
SHAPES = [((12, 3), 1), ((12, 3, 2, 2), 1), ((12, 2, 2, 3), -1), ((12, 2, 3, 2), 2)]


def chunks_of(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def ghost_step(oracle, x, dy, size):
    """What a ghost layer should do: batch normalization of each chunk by a layer of its own."""
    pieces = list(zip(chunks_of(x, size), chunks_of(dy, size)))
    steps = [deepcopy(oracle).train_step(*piece) for piece in pieces]
    weights = [len(piece) / len(x) for piece, _ in pieces]
    moments = [batch_moments(piece, oracle.axis) for piece, _ in pieces]
    mean, variance = (sum(w * pair[i] for w, pair in zip(weights, moments)) for i in (0, 1))
    oracle.running_mean = 0.9 * oracle.running_mean + 0.1 * mean
    oracle.running_var = 0.9 * oracle.running_var + 0.1 * variance
    return Step(
        y=np.concatenate([s.y for s in steps]),
        dx=np.concatenate([s.dx for s in steps]),
        dgamma=sum(s.dgamma for s in steps),
        dbeta=sum(s.dbeta for s in steps),
    )


def renorm_step(oracle, x, dy, r_max, d_max):
    """Algorithm 1 of the batch renormalization paper; r and d are constants to the gradient."""
    mean, variance = batch_moments(x, oracle.axis)
    sigma = np.sqrt(oracle.running_var + oracle.epsilon)
    r = np.clip(np.sqrt(variance + oracle.epsilon) / sigma, 1 / r_max, r_max)
    d = np.clip((mean - oracle.running_mean) / sigma, -d_max, d_max)
    # gamma (xhat r + d) + beta is batch normalization with another gamma and beta.
    plain = replace(oracle, gamma=oracle.gamma * r, beta=oracle.beta + oracle.gamma * d)
    step = plain.train_step(x, dy)
    oracle.running_mean, oracle.running_var = plain.running_mean, plain.running_var
    return replace(step, dgamma=step.dgamma * r + step.dbeta * d)


# --- ghost batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [12, 100])
def test_one_ghost_batch_is_batch_normalization(mode, size, build, rng):
    subject = build(mode, (12, 3, 2), layer_class=of(GhostBatchNorm, size), unbiased_variance=True)
    for _ in range(3):
        x, dy = data(rng, (12, 3, 2))
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("size", [4, 5])
def test_each_ghost_batch_is_normalized_by_itself(mode, shape, axis, size, build, rng):
    subject = build(mode, shape, layer_class=of(GhostBatchNorm, size), axis=axis)
    for _ in range(2):
        x, dy = data(rng, shape)
        check_step(take_step(subject, x, dy), ghost_step(subject.oracle, x, dy, size))
        subject.check_statistics()


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_a_ghost_layer_takes_batches_of_any_size(mode, build, rng):
    subject = build(mode, (8, 3, 2), layer_class=of(GhostBatchNorm, 4))
    for n in (8, 3, 9, 1):
        x, dy = data(rng, (n, 3, 2))
        check_step(take_step(subject, x, dy), ghost_step(subject.oracle, x, dy, 4))
        subject.check_statistics()


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_the_unbiased_variance_of_ghost_batches_is_pooled(mode, build, rng):
    subject = build(
        mode,
        (10, 3, 2),
        layer_class=of(GhostBatchNorm, 4),
        unbiased_variance=True,
        momentum=0.0,
    )
    x, _ = data(rng, (10, 3, 2))
    train_forward(subject, x)
    squares = sum(
        ((c - c.mean(axis=(0, 2), keepdims=True)) ** 2).sum(axis=(0, 2)) for c in chunks_of(x, 4)
    )
    np.testing.assert_allclose(subject.value("running_var"), squares / (10 * 2 - 3), **EXACT)
    np.testing.assert_allclose(subject.value("running_mean"), x.mean(axis=(0, 2)), **EXACT)


def test_ghost_chunks_of_samples_without_elements_move_nothing():
    mx.npx.set_np()
    layer = GhostBatchNorm(3, in_channels=3)
    layer.initialize()
    x = mx.np.zeros((4, 3, 0))
    x.attach_grad()
    with mx.autograd.record():
        y = layer(x)
    y.backward()
    assert y.shape == x.grad.shape == (4, 3, 0)
    for name, value in {"running_mean": 0, "running_var": 1}.items():
        assert (getattr(layer, name).data().asnumpy() == value).all()
    for name in ("gamma", "beta"):
        assert (getattr(layer, name).grad().asnumpy() == 0).all()


# --- batch renormalization ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
def test_renormalization_without_room_is_batch_normalization(mode, epsilon, build, rng):
    subject = build(mode, (6, 3, 2), layer_class=of(BatchRenorm, 1, 0), epsilon=epsilon)
    for _ in range(3):
        x, dy = data(rng, (6, 3, 2))
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("limits", [(1.5, 0.2), (UNLIMITED, UNLIMITED)])
def test_renormalization_follows_the_paper(mode, shape, axis, limits, build, rng):
    subject = build(mode, shape, layer_class=of(BatchRenorm, *limits), axis=axis)
    for _ in range(3):
        x, dy = data(rng, shape)
        check_step(take_step(subject, x, dy), renorm_step(subject.oracle, x, dy, *limits))
        subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
def test_unlimited_renormalization_trains_as_it_infers(mode, build, rng):
    subject = build(mode, (6, 3, 2), layer_class=of(BatchRenorm, UNLIMITED, UNLIMITED))
    for _ in range(3):
        x, dy = data(rng, (6, 3, 2))
        by_running = subject.oracle.infer_step(x, dy)
        step = take_step(subject, x, dy)
        np.testing.assert_allclose(step.y, by_running.y, **EXACT)
        # Not its gradient: r and d are constants to it, and mu_B and sigma_B are not.
        assert np.abs(step.dx - by_running.dx).max() > 0.1
        subject.oracle.train(x)


@pytest.mark.parametrize("mode", BLOCK_MODES)  # an exported graph keeps its limits
def test_limits_may_change_during_training(mode, build, rng):
    subject = build(mode, (6, 3), layer_class=of(BatchRenorm, 1, 0))
    for limits in ((1, 0), (1.5, 0.2), (3, 5)):
        subject.layer.r_max, subject.layer.d_max = limits
        if mode != "eager":
            subject.net.hybridize()
        x, dy = data(rng, (6, 3))
        check_step(take_step(subject, x, dy), renorm_step(subject.oracle, x, dy, *limits))
        subject.check_statistics()


# --- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_is_batch_normalization(mode, variant, build, rng):
    subject = build(mode, (8, 3, 2), layer_class=of(*variant))
    x = rng.normal(1, 2, (7, 3, 2))
    before = subject.statistics()
    np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **EXACT)
    x[0] = np.nan
    np.testing.assert_allclose(infer(subject, x)[1:], subject.oracle.infer(x)[1:], **EXACT)
    for old, new in zip(before, subject.statistics()):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("mode", ["eager", "hybrid", "exported"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(mode, dtype, variant, build, rng):
    subject = build(mode, (8, 3, 4), layer_class=of(*variant), dtype=dtype)
    expected = {GhostBatchNorm: ghost_step, BatchRenorm: renorm_step}[variant[0]]
    x, dy = (v.astype(dtype) for v in data(rng, (8, 3, 4)))
    actual = take_step(subject, x, dy)
    check_step(actual, expected(subject.oracle, x, dy, *variant[1:]), dtype)
    subject.check_statistics()


def test_a_batch_that_is_not_finite_moves_nothing(build, rng):
    for cls, *arguments in VARIANTS:
        for mode in ("eager", "hybrid"):
            subject = build(mode, (8, 3), layer_class=of(cls, *arguments))
            before = subject.statistics()
            x, _ = data(rng, (8, 3))
            x[5, 1] = np.inf
            train_forward(subject, x)
            for old, new in zip(before, subject.statistics()):
                np.testing.assert_array_equal(old, new)
