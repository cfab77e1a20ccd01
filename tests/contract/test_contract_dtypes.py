"""Clause 6 of the contract: dtypes of data and parameters, and what is computed in which."""

from scratchbn import ScratchBatchNorm
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from contract_cases import every_mode, snapshot
from helpers import (
    BLOCK_MODES,
    CLOSE,
    STATE,
    array,
    check_step,
    in_mode,
    infer,
    take_step,
    train_forward,
)
from mxnet import autograd
from mxnet.gluon import nn

SHAPE = (6, 3, 4, 5)

# By a stock operator, and by the compiled one.
WRONG_TYPE = "expected float32, got float16|Provided = float16, inferred type = float32"


@pytest.mark.parametrize(
    ("casts", "expected"),
    [
        (["float16"], "float32"),
        (["float32"], "float32"),
        (["float64"], "float64"),
        (["float64", "float16"], "float32"),
        (["float16", "float64"], "float64"),
        ([np.float16], "float32"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_parameter_dtypes_follow_casts(device, casts, expected, when, momentum):
    layer = ScratchBatchNorm(in_channels=3, momentum=momentum)
    net = nn.HybridSequential()
    net.add(layer)
    if when == "after":
        net.initialize(ctx=device)
    for dtype in casts:
        net.cast(dtype)
    if when == "before":
        net.initialize(ctx=device)
    assert {np.dtype(getattr(layer, name).dtype).name for name in STATE} == {expected}
    assert {getattr(layer, name).data().dtype.__name__ for name in STATE} == {expected}


@every_mode
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("training", [True, False])
def test_every_dtype_equals_the_oracle(build, rng, mode, dtype, training):
    subject = build(mode, SHAPE, dtype=dtype)
    for _ in range(2):
        x = (rng.normal(size=SHAPE) * 2 + 1).astype(dtype)
        dy = rng.normal(size=SHAPE).astype(dtype)
        expected = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        actual = take_step(subject, x, dy, record_train=training)
        check_step(actual, expected, dtype)
        subject.check_statistics()
    out = subject(subject.array(x))
    assert np.dtype(out.dtype) == np.dtype(dtype)
    state_dtype = "float64" if dtype == "float64" else "float32"
    assert {np.dtype(subject.value(name).dtype).name for name in STATE} == {state_dtype}


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_deferred_float16(device, rng, mode):
    layer = ScratchBatchNorm(momentum=0.0)
    layer.initialize(ctx=device)
    layer.cast("float16")
    net = in_mode(layer, mode)
    x = rng.normal(size=(64, 3)).astype("float16")
    with autograd.record():
        y = net(array(x, device, "float16"))
    mx.nd.waitall()
    assert y.dtype == np.float16
    assert layer.running_mean.data().dtype == np.float32
    exact = x.astype("float64")
    np.testing.assert_allclose(layer.running_mean.data().asnumpy(), exact.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(layer.running_var.data().asnumpy(), exact.var(axis=0), rtol=1e-5)


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_float16_made_inside_the_net(device, backend, rng, mode):
    """Whoever casts inside a graph casts the layer too; one that was not refuses clearly.

    The kernel for GPUs has its statistics in float32, and takes float16 as it comes.
    """
    takes_float16 = device.device_type == "gpu" and backend == "native"
    layer = ScratchBatchNorm(in_channels=3, momentum=0.0)
    layer.initialize(ctx=device)
    net = nn.HybridSequential()
    net.add(nn.HybridLambda(lambda F, data: F.cast(data, dtype="float16")), layer)
    x = (rng.normal(size=SHAPE) * 100 + 1e4).astype("float16")
    oracle = OracleBatchNorm.fresh(3, momentum=0.0)
    net = in_mode(net, mode)
    if mode != "eager" and not takes_float16:
        with pytest.raises(mx.MXNetError, match=WRONG_TYPE):
            net(array(x, device, "float32"))
            mx.nd.waitall()
        layer.cast("float16")
        net.hybridize()
    with autograd.record():
        y = net(array(x, device, "float32"))
    mx.nd.waitall()
    assert y.dtype == np.float16
    np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float16"])
    np.testing.assert_allclose(layer.running_var.data().asnumpy(), oracle.running_var, rtol=1e-4)


@pytest.mark.parametrize("mode", BLOCK_MODES)
@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float16")])
def test_one_layer_takes_float16_and_float32(device, rng, mode, dtypes):
    """Both go with float32 parameters; the graph of an outer net keeps the dtype of its trace."""
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    oracle = OracleBatchNorm.fresh(3)
    for k, dtype in enumerate(dtypes):
        x = rng.normal(size=SHAPE).astype(dtype)
        expected = oracle.infer(x)
        if mode == "nested" and k == 1 and dtype == "float16":
            with pytest.raises(mx.MXNetError, match=WRONG_TYPE):
                net(array(x, device, dtype))
            continue
        y = net(array(x, device, dtype))
        mx.nd.waitall()
        dtype = dtypes[0] if mode == "nested" else dtype
        assert y.dtype == np.dtype(dtype)
        np.testing.assert_allclose(y.asnumpy(), expected, **CLOSE["float16"])


@every_mode
@pytest.mark.parametrize("mean", [0.0, 30.0, 1e4, -2e4])
def test_float16_statistics_are_computed_in_float32(build, rng, mode, mean):
    """Sums over these data overflow float16, and its 11 bits lose their spread at a mean of 1e4."""
    shape = (32, 2, 16, 16)
    subject = build(mode, shape, dtype="float16", momentum=0.0)
    x = (rng.normal(size=shape) * 100 + mean).astype("float16")
    y = train_forward(subject, x)
    expected = subject.oracle.train(x)
    mean, var = subject.statistics()
    np.testing.assert_allclose(mean, subject.oracle.running_mean, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(var, subject.oracle.running_var, rtol=1e-5)
    np.testing.assert_allclose(y.astype("float64"), expected, rtol=2e-3, atol=4e-3)


@every_mode
def test_float16_inference_at_a_large_mean(build, rng, mode):
    """`x * scale + shift` in float16 would cancel; the affine map has to run in float32."""
    values = {"running_mean": [1e4, -2e4], "running_var": [1e4, 1e4]}
    subject = build(mode, (32, 2), dtype="float16", values=values)
    x = (rng.normal(size=(32, 2)) * 100 + [1e4, -2e4]).astype("float16")
    y = infer(subject, x).astype("float64")
    np.testing.assert_allclose(y, subject.oracle.infer(x), rtol=2e-3, atol=4e-3)


@every_mode
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-8])
def test_epsilon_is_not_rounded_to_float16(build, rng, mode, training, epsilon):
    """1e-8 is 0 in float16 and 1e-5 is 1.0014e-5: each shifts nearly every rounded output."""
    shape = (256, 2)
    deviation = np.float64(np.float16(np.sqrt(epsilon) / 8))
    values = {
        "gamma": [1.0, 1.7],
        "beta": [0.0, 0.0],
        "running_mean": [0.0, 0.0],
        "running_var": [0.0, 0.0],
    }
    subject = build(mode, shape, dtype="float16", epsilon=epsilon, values=values)
    x = (rng.choice([-1, 1], size=shape) * deviation * rng.uniform(0.5, 4, size=shape)).astype(
        "float16"
    )
    if training:
        x[128:] = -x[:128]  # an exact mean of zero
    y = train_forward(subject, x) if training else infer(subject, x)
    oracle = subject.oracle.train(x) if training else subject.oracle.infer(x)
    agree = (y == oracle.astype("float16")).mean()
    assert agree > 0.97, f"{agree:.0%} of the outputs are correctly rounded"


@every_mode
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.3, None])
def test_float64_statistics_are_exact_to_rounding(build, rng, mode, momentum):
    """Integers whose sums are exact leave nothing but the rounding of the update itself."""
    shape = (8, 3, 4, 4)
    values = {"running_mean": [1.1, 2.3, 0.7], "running_var": [0.3, 1.9, 5.3]}
    subject = build(mode, shape, momentum=momentum, values=values)
    exact = [np.longdouble(values["running_mean"]), np.longdouble(values["running_var"])]
    for step in range(1, 4):
        x = rng.integers(1, 100, size=shape).astype("float64")
        train_forward(subject, x)
        new = np.longdouble(1) / step if momentum is None else 1 - np.longdouble(momentum)
        moments = np.longdouble(x).mean(axis=(0, 2, 3)), np.longdouble(x).var(axis=(0, 2, 3))
        exact = [old + new * (moment - old) for old, moment in zip(exact, moments)]
        for actual, expected in zip(subject.statistics(), exact):
            np.testing.assert_array_less(np.abs(actual - expected) / expected, 1e-15)


@every_mode
@pytest.mark.parametrize("training", [True, False])
def test_float64_epsilon_is_exact(build, rng, mode, training):
    """The built-in reads epsilon as float32, wrong by 2.5e-8; a variance of zero shows it."""
    values = {
        "running_mean": np.zeros(3),
        "running_var": np.zeros(3),
        "gamma": np.ones(3),
        "beta": np.zeros(3),
    }
    subject = build(mode, (8, 3), values=values)
    x = rng.choice([-1e-6, 1e-6], size=(8, 3))
    step = take_step(subject, x, np.ones((8, 3)), record_train=training)
    oracle = subject.oracle.train(x) if training else subject.oracle.infer(x)
    np.testing.assert_allclose(step.y, oracle, rtol=1e-12)


def test_an_imported_symbol_keeps_its_dtype(build, rng):
    """Cast the net and export it again; the parameters of a cast symbol stay float32."""
    subject = build("exported", SHAPE, dtype="float32")
    subject.net.cast("float16")
    dtypes = {name: np.dtype(subject.parameter(name).dtype).name for name in STATE}
    assert set(dtypes.values()) == {"float32"}
    before = subject.statistics()
    subject.dtype = "float16"
    with pytest.raises(mx.MXNetError, match=WRONG_TYPE):
        infer(subject, rng.normal(size=SHAPE).astype("float16"))
    assert all(map(np.array_equal, subject.statistics(), before))


def test_a_trained_layer_keeps_its_values_through_casts(build, rng):
    subject = build("eager", SHAPE, dtype="float32")
    before = snapshot(subject.layer)
    subject.layer.cast("float16")
    subject.layer.cast("float64")
    after = snapshot(subject.layer)
    for name in STATE:
        np.testing.assert_array_equal(before[name].astype("float64"), after[name])


def test_hybridized_cast_clears_the_graph(build, rng):
    subject = build("hybrid", SHAPE, dtype="float32")
    infer(subject, np.ones(SHAPE))
    subject.net.cast("float64")
    subject.dtype = "float64"
    x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
    subject.check_statistics(rtol=1e-12)
