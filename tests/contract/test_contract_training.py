"""Clauses 1 and 4 of the contract: training moves statistics; gradients follow the forward."""

import itertools

from scratchbn import ScratchBatchNorm
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from contract_cases import both_layers, every_mode
from helpers import CLOSE, check_step, infer, take_step, train_forward
from mxnet import autograd
from training_batches import SHAPE, assert_bits_equal, batch


def test_golden_cells_of_the_tutorial(device):
    layer = ScratchBatchNorm()
    layer.initialize(ctx=device)
    cells = mx.nd.array([[1, 7], [5, 4], [6, 10]], ctx=device)
    with autograd.record():
        y = layer(cells)
    expected = [[-1.3887286, 0], [0.46290955, -1.2247438], [0.9258191, 1.2247438]]
    np.testing.assert_allclose(y.asnumpy(), expected, atol=1e-5)
    layer = ScratchBatchNorm()
    layer.initialize(ctx=device)
    cells = mx.nd.array([1, 6, 5, 7, 4, 3, 2, 5, 6, 3, 2, 4, 5, 3, 2, 5], ctx=device)
    with autograd.record():
        y = layer(cells.reshape((2, 2, 2, 2)))
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
    np.testing.assert_allclose(y.asnumpy().reshape(2, -1), [first, second], atol=1e-5)


# Clause 1: training mode


@every_mode
@both_layers
@pytest.mark.parametrize("unbiased", [False, True])
def test_training_steps_equal_the_oracle(build, rng, mode, layer_class, unbiased):
    subject = build(mode, SHAPE, layer_class=layer_class, unbiased_variance=unbiased)
    for _ in range(3):
        x, dy = batch(rng), rng.normal(size=SHAPE)
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics(rtol=1e-12)
    x, dy = batch(rng), rng.normal(size=SHAPE)
    np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])


@every_mode
def test_statistics_move_in_the_forward_without_backward(build, rng, mode):
    subject = build(mode, SHAPE)
    for _ in range(3):
        x = batch(rng)
        with autograd.record():
            y = subject(subject.array(x))
        y.wait_to_read()
        np.testing.assert_allclose(y.asnumpy(), subject.oracle.train(x), **CLOSE["float64"])
        subject.check_statistics(rtol=1e-12)


@every_mode
def test_statistics_move_before_backward_is_called(build, rng, mode):
    subject = build(mode, SHAPE)
    x, dy = batch(rng), rng.normal(size=SHAPE)
    data = subject.array(x)
    data.attach_grad()
    with autograd.record():
        y = subject(data)
    subject.oracle.train(x)
    subject.check_statistics(rtol=1e-12)
    moved = subject.statistics()
    y.backward(subject.array(dy))
    assert_bits_equal(subject.statistics(), moved)


@every_mode
@pytest.mark.parametrize("backwards", [1, 2, 3])
def test_statistics_move_once_whatever_the_number_of_backwards(build, rng, mode, backwards):
    subject = build(mode, SHAPE)
    x, dy = batch(rng), rng.normal(size=SHAPE)
    check_step(take_step(subject, x, dy, backwards=backwards), subject.oracle.train_step(x, dy))
    subject.check_statistics(rtol=1e-12)


@every_mode
def test_train_mode_without_recording_trains(build, rng, mode):
    subject = build(mode, SHAPE)
    for _ in range(2):
        x = batch(rng)
        np.testing.assert_allclose(
            train_forward(subject, x), subject.oracle.train(x), **CLOSE["float64"]
        )
        subject.check_statistics(rtol=1e-12)


@every_mode
def test_statistics_move_with_every_gradient_switched_off(build, rng, mode):
    subject = build(mode, SHAPE)
    subject.net.collect_params().setattr("grad_req", "null")
    for _ in range(2):
        x = batch(rng)
        with autograd.record():
            y = subject(subject.array(x))
        np.testing.assert_allclose(y.asnumpy(), subject.oracle.train(x), **CLOSE["float64"])
        subject.check_statistics(rtol=1e-12)


@every_mode
@pytest.mark.parametrize(
    ("gamma_req", "beta_req", "data_req"),
    [reqs for reqs in itertools.product(["null", "write"], repeat=3) if "write" in reqs],
)
def test_any_combination_of_gradients(build, rng, mode, gamma_req, beta_req, data_req):
    subject = build(mode, SHAPE)
    subject.parameter("gamma").grad_req = gamma_req
    subject.parameter("beta").grad_req = beta_req
    x, dy = batch(rng), rng.normal(size=SHAPE)
    data = subject.array(x)
    if data_req != "null":
        data.attach_grad(data_req)
    with autograd.record():
        y = subject(data)
    y.backward(subject.array(dy))
    step = subject.oracle.train_step(x, dy)
    if data_req != "null":
        np.testing.assert_allclose(data.grad.asnumpy(), step.dx, **CLOSE["float64"])
    for name, req in (("gamma", gamma_req), ("beta", beta_req)):
        if req != "null":
            np.testing.assert_allclose(
                subject.gradient(name), getattr(step, "d" + name), **CLOSE["float64"]
            )
    subject.check_statistics(rtol=1e-12)


@every_mode
def test_statistics_follow_the_order_of_calls(build, rng, mode):
    subject = build(mode, SHAPE, momentum=0.3)
    batches = [batch(rng) * scale for scale in (1, 10, 100)]
    for x in batches:
        with autograd.record():
            subject(subject.array(x))
        subject.oracle.train(x)
    subject.check_statistics(rtol=1e-12)
    wrong = OracleBatchNorm.fresh(3, momentum=0.3)
    for x in reversed(batches):
        wrong.train(x)
    assert not np.allclose(subject.statistics()[0], wrong.running_mean, rtol=1e-2)


@every_mode
def test_the_mode_is_chosen_at_every_call(build, rng, mode):
    """A graph traced in one mode must run in the other, back and forth."""
    subject = build(mode, SHAPE)
    for training in (False, True, False, False, True, True, False):
        x, dy = batch(rng), rng.normal(size=SHAPE)
        expected = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        actual = take_step(subject, x, dy, record_train=training, backward_train=training)
        check_step(actual, expected)
        subject.check_statistics(rtol=1e-12)


@every_mode
def test_normalizes_with_the_biased_variance(build, mode):
    """Two values are one biased standard deviation from their mean; unbiased they would be 0.71."""
    values = {"gamma": [1.0], "beta": [0.0]}
    subject = build(mode, (2, 1), values=values, unbiased_variance=True, epsilon=1e-12)
    y = train_forward(subject, np.array([[-3.0], [5.0]]))
    np.testing.assert_allclose(y, [[-1], [1]], rtol=1e-9)


# Clause 4: the gradient follows the recorded forward


@every_mode
@both_layers
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_gradient_follows_the_mode_of_the_recorded_forward(
    build, rng, mode, layer_class, recorded, backward
):
    subject = build(mode, SHAPE, layer_class=layer_class)
    for _ in range(2):
        x, dy = batch(rng), rng.normal(size=SHAPE)
        expected = (subject.oracle.train_step if recorded else subject.oracle.infer_step)(x, dy)
        actual = take_step(subject, x, dy, record_train=recorded, backward_train=backward)
        check_step(actual, expected)
        subject.check_statistics(rtol=1e-12)


@every_mode
@pytest.mark.parametrize("recorded", [True, False])
def test_gradient_ignores_the_scope_backward_is_called_in(build, rng, mode, recorded):
    subject = build(mode, SHAPE)
    x, dy = batch(rng), rng.normal(size=SHAPE)
    data = subject.array(x)
    data.attach_grad()
    with autograd.record(train_mode=recorded):
        y = subject(data)
    with autograd.predict_mode() if recorded else autograd.train_mode():
        y.backward(subject.array(dy), train_mode=not recorded)
    expected = (subject.oracle.train_step if recorded else subject.oracle.infer_step)(x, dy)
    np.testing.assert_allclose(data.grad.asnumpy(), expected.dx, **CLOSE["float64"])
    subject.check_statistics(rtol=1e-12)


@every_mode
def test_mode_scopes_inside_a_recording(build, rng, mode):
    """`predict_mode()` inside `record()` is how parts of a net are frozen for a step."""
    subject = build(mode, SHAPE)
    before = subject.statistics()
    x, dy = batch(rng), rng.normal(size=SHAPE)
    data = subject.array(x)
    data.attach_grad()
    with autograd.record(), autograd.predict_mode():
        y = subject(data)
    y.backward(subject.array(dy))
    np.testing.assert_allclose(
        data.grad.asnumpy(), subject.oracle.infer_step(x, dy).dx, **CLOSE["float64"]
    )
    assert_bits_equal(subject.statistics(), before)
