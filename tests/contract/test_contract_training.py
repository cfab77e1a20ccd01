"""Clauses 1 to 4 of the contract: when statistics move, and which gradient follows."""

import itertools

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import (
    CLOSE,
    MODES,
    check_step,
    infer,
    take_step,
    train_forward,
)
from mxnet import autograd

SHAPE = (6, 3, 4, 5)
every_mode = pytest.mark.parametrize("mode", MODES)
both_layers = pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])


def batch(rng, shape=SHAPE):
    channels = rng.uniform(-3, 3, size=(1, shape[1]) + (1,) * (len(shape) - 2))
    return rng.normal(size=shape) * 1.7 + channels


def assert_bits_equal(actual, expected):
    for a, e in zip(actual, expected):
        assert a.tobytes() == e.tobytes(), f"{a} != {e}"


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


# Clause 2: inference


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


# Clause 3: the running average


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
