"""Clause 2 of the contract: inference, and training by global statistics, leave the statistics."""

import mxnet as mx
import numpy as np
import pytest
from contract_cases import both_layers, every_mode
from helpers import CLOSE, check_step, infer, take_step, train_forward
from mxnet import autograd
from training_batches import SHAPE, assert_bits_equal, batch


@every_mode
@both_layers
def test_inference_equals_the_oracle(build, rng, mode, layer_class):
    subject = build(mode, SHAPE, layer_class=layer_class)
    before = [subject.value(name) for name in ("gamma", "beta", "running_mean", "running_var")]
    for _ in range(3):
        x, dy = batch(rng), rng.normal(size=SHAPE)
        np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])
        step = take_step(subject, x, dy, record_train=False, backward_train=False)
        check_step(step, subject.oracle.infer_step(x, dy))
    after = [subject.value(name) for name in ("gamma", "beta", "running_mean", "running_var")]
    assert_bits_equal(after, before)


@every_mode
@pytest.mark.parametrize("momentum", [0.0, 0.9, None])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_inference_changes_nothing_whatever_the_data(build, rng, mode, momentum, bad):
    subject = build(mode, SHAPE, momentum=momentum)
    before, x = subject.statistics(), batch(rng)
    clean = infer(subject, x)
    spoiled = x.copy()
    spoiled[2, 1, 0, 0] = bad
    y = infer(subject, spoiled)
    assert_bits_equal(subject.statistics(), before)
    untouched = spoiled == x
    assert_bits_equal([y[untouched]], [clean[untouched]])
    assert_bits_equal([infer(subject, x)], [clean])
    data = subject.array(spoiled)
    data.attach_grad()
    with autograd.record(train_mode=False):
        y = subject(data)
    y.backward(train_mode=False)
    assert_bits_equal(subject.statistics(), before)


@every_mode
@pytest.mark.parametrize("use_global_stats", [False, True])
@pytest.mark.parametrize("special", [-0.0, 5e-324, 1e-310, 1e308, np.inf, np.nan])
def test_inference_keeps_every_bit_of_special_values(build, rng, mode, use_global_stats, special):
    """Statistics of 0, or spoiled ones from a file: reading them must not rewrite them."""
    values = {"running_mean": [special, 1.0, 2.0], "running_var": [1.0, special, abs(special)]}
    subject = build(mode, SHAPE, values=values, use_global_stats=use_global_stats)
    before = subject.statistics()
    assert np.array(special).tobytes() == before[0][:1].tobytes()
    infer(subject, batch(rng))
    with autograd.record(train_mode=use_global_stats):
        subject(subject.array(batch(rng)))
    assert_bits_equal(subject.statistics(), before)


@every_mode
def test_training_ignores_spoiled_running_statistics(build, rng, mode):
    """A NaN in the unselected branch must not reach the output or the gradients."""
    values = {"running_mean": [np.nan, np.inf, 1.0], "running_var": [1.0, np.nan, -5.0]}
    subject = build(mode, SHAPE, values=values)
    x, dy = batch(rng), rng.normal(size=SHAPE)
    check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))


@every_mode
def test_the_data_are_only_read(build, rng, mode):
    subject = build(mode, SHAPE)
    x, head = subject.array(batch(rng)), subject.array(rng.normal(size=SHAPE))
    before = x.asnumpy(), head.asnumpy()
    x.attach_grad()
    with autograd.record():
        y = subject(x)
    y.backward(head)
    y += 1
    mx.nd.waitall()
    assert_bits_equal((x.asnumpy(), head.asnumpy()), before)


@every_mode
def test_inference_on_bad_data_keeps_gradients_of_the_rest(build, rng, mode):
    """The batch statistics of a NaN batch must not leak through an unselected branch."""
    subject = build(mode, SHAPE)
    x, dy = batch(rng), rng.normal(size=SHAPE)
    x[2, 1, 0, 0] = np.nan
    step = take_step(subject, x, dy, record_train=False, backward_train=False)
    expected = subject.oracle.infer_step(x, dy)
    # In a graph the unselected variance gives the NaN element itself the gradient 0 * NaN.
    rest = np.isfinite(x)
    np.testing.assert_allclose(step.dx[rest], expected.dx[rest], **CLOSE["float64"])
    np.testing.assert_allclose(step.dgamma, expected.dgamma, **CLOSE["float64"])
    np.testing.assert_allclose(step.dbeta, expected.dbeta, **CLOSE["float64"])


@every_mode
def test_inference_on_a_constant_batch_without_epsilon(build, rng, mode):
    """The unused batch branch divides by zero here; nothing of it may show, in gradients either."""
    subject = build(mode, SHAPE, epsilon=1e-30)
    x, dy = np.full(SHAPE, 2.5), rng.normal(size=SHAPE)
    step = take_step(subject, x, dy, record_train=False, backward_train=False)
    check_step(step, subject.oracle.infer_step(x, dy))


@every_mode
@both_layers
def test_global_statistics_in_training(build, rng, mode, layer_class):
    subject = build(mode, SHAPE, layer_class=layer_class, use_global_stats=True)
    before = subject.statistics()
    for _ in range(2):
        x, dy = batch(rng), rng.normal(size=SHAPE)
        check_step(take_step(subject, x, dy), subject.oracle.infer_step(x, dy))
        assert_bits_equal(subject.statistics(), before)
    x[0, 0] = np.nan
    train_forward(subject, x)
    assert_bits_equal(subject.statistics(), before)
