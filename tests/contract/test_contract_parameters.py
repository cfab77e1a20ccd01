"""Clauses 5 and 6 of the contract: unused gamma and beta, parameter files, and dtypes."""

import warnings

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import (
    BLOCK_MODES,
    CLOSE,
    MODES,
    STATE,
    array,
    check_step,
    in_mode,
    infer,
    random_values,
    set_values,
    take_step,
    train_forward,
)
from mxnet import autograd, gluon
from mxnet.gluon import nn

SHAPE = (6, 3, 4, 5)
every_mode = pytest.mark.parametrize("mode", MODES)

# By a stock operator, and by the compiled one.
WRONG_TYPE = "expected float32, got float16|Provided = float16, inferred type = float32"


def snapshot(layer):
    mx.nd.waitall()
    return {name: getattr(layer, name).data().asnumpy() for name in STATE}


# Clause 5: scale=False, center=False


@every_mode
@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
def test_unused_scale_and_center_count_as_one_and_zero(
    build, rng, mode, scale, center, layer_class
):
    subject = build(mode, SHAPE, layer_class=layer_class, scale=scale, center=center)
    for training in (True, False, True):
        x, dy = rng.normal(size=SHAPE) + 1, rng.normal(size=SHAPE)
        expected = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        data = subject.array(x)
        data.attach_grad()
        with autograd.record(train_mode=training):
            y = subject(data)
        y.backward(subject.array(dy))
        np.testing.assert_allclose(y.asnumpy(), expected.y, **CLOSE["float64"])
        np.testing.assert_allclose(data.grad.asnumpy(), expected.dx, **CLOSE["float64"])
        if scale:
            np.testing.assert_allclose(
                subject.gradient("gamma"), expected.dgamma, **CLOSE["float64"]
            )
        if center:
            np.testing.assert_allclose(subject.gradient("beta"), expected.dbeta, **CLOSE["float64"])
        subject.check_statistics(rtol=1e-12)


@every_mode
def test_nothing_of_an_unused_parameter_shows(build, rng, mode):
    """Multiplying by 0 would let a NaN through."""
    values = {"gamma": [np.nan, np.inf, 0.0], "beta": [np.inf, 1.0, np.nan]}
    subject = build(mode, SHAPE, scale=False, center=False, values=values)
    x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    data = subject.array(x)
    data.attach_grad()
    with autograd.record():
        y = subject(data)
    y.backward(subject.array(dy))
    step = subject.oracle.train_step(x, dy)
    np.testing.assert_allclose(y.asnumpy(), step.y, **CLOSE["float64"])
    np.testing.assert_allclose(data.grad.asnumpy(), step.dx, **CLOSE["float64"])
    np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])


@pytest.mark.parametrize("mode", BLOCK_MODES)
@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
def test_unused_parameters_are_never_written(build, rng, mode, scale, center):
    subject = build(mode, SHAPE, scale=scale, center=center)
    before = snapshot(subject.layer)
    trainer = gluon.Trainer(subject.net.collect_params(), "sgd", {"learning_rate": 0.1, "wd": 0.1})
    for _ in range(3):
        take_step(subject, rng.normal(size=SHAPE), rng.normal(size=SHAPE))
        trainer.step(1)
        infer(subject, rng.normal(size=SHAPE))
    after = snapshot(subject.layer)
    assert (after["gamma"].tobytes() == before["gamma"].tobytes()) == (not scale)
    assert (after["beta"].tobytes() == before["beta"].tobytes()) == (not center)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_the_four_parameters_exist_in_every_combination(scale, center):
    layer = ScratchBatchNorm(scale=scale, center=center, in_channels=3)
    structural = layer._collect_params_with_prefix()
    assert list(structural) == list(STATE)
    assert [p.name for p in structural.values()] == [layer.prefix + name for name in STATE]
    requests = {name: structural[name].grad_req for name in STATE}
    assert requests == {
        "gamma": "write" if scale else "null",
        "beta": "write" if center else "null",
        "running_mean": "null",
        "running_var": "null",
    }
    assert all(p.shape == (3,) for p in structural.values())


def test_statistics_stay_untrainable_when_asked_for_gradients():
    """`collect_params().setattr('grad_req', 'write')` is a common way to unfreeze a net."""
    ours, built_in = ScratchBatchNorm(in_channels=3), nn.BatchNorm(in_channels=3)
    for layer in (ours, built_in):
        layer.collect_params().setattr("grad_req", "write")
    for name in ("running_mean", "running_var"):
        assert getattr(ours, name).grad_req == getattr(built_in, name).grad_req == "null"


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_trainer_leaves_the_statistics_alone(build, rng, mode):
    subject = build(mode, SHAPE)
    trainer = gluon.Trainer(
        subject.net.collect_params(), "sgd", {"learning_rate": 0.5, "wd": 0.5, "momentum": 0.9}
    )
    for _ in range(3):
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        expected = subject.oracle.train_step(x, dy)
        check_step(take_step(subject, x, dy), expected)
        trainer.step(1)
        subject.check_statistics(rtol=1e-12)
        subject.oracle.gamma = subject.value("gamma")
        subject.oracle.beta = subject.value("beta")


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, False)])
def test_initializers_are_respected_in_files(tmp_path, device, scale, center, deferred):
    layer = ScratchBatchNorm(
        scale=scale,
        center=center,
        gamma_initializer=mx.init.Constant(3),
        beta_initializer=mx.init.Constant(4),
        running_mean_initializer=mx.init.Constant(5),
        running_variance_initializer=mx.init.Constant(6),
        in_channels=0 if deferred else 2,
    )
    layer.initialize(mx.init.Normal(9), ctx=device)
    layer(mx.nd.ones((4, 2), ctx=device))
    layer.save_parameters(str(tmp_path / "file.params"))
    stored = {k: v.asnumpy() for k, v in mx.nd.load(str(tmp_path / "file.params")).items()}
    assert {k: v.tolist() for k, v in stored.items()} == {
        "gamma": [3, 3],
        "beta": [4, 4],
        "running_mean": [5, 5],
        "running_var": [6, 6],
    }


def test_default_initializers(device):
    layer = ScratchBatchNorm()
    layer.initialize(mx.init.Normal(9), ctx=device)
    layer(mx.nd.ones((4, 2), ctx=device))
    state = {name: value.tolist() for name, value in snapshot(layer).items()}
    assert state == {
        "gamma": [1, 1],
        "beta": [0, 0],
        "running_mean": [0, 0],
        "running_var": [1, 1],
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("via", ["save_parameters", "collect_params"])
def test_files_interchange_with_the_built_in(
    tmp_path, device, rng, dtype, scale, center, ours_first, via
):
    """Parameters of one net load into the other, by structural and by full names alike."""
    nets = []
    for norm in (
        (ScratchBatchNorm, nn.BatchNorm) if ours_first else (nn.BatchNorm, ScratchBatchNorm)
    ):
        net = nn.HybridSequential(prefix="net_")
        with net.name_scope():
            net.add(nn.Conv2D(4, 3, in_channels=3))
            net.add(norm(scale=scale, center=center, in_channels=4))
            net.add(norm(scale=scale, center=center, in_channels=4))
        net.initialize(ctx=device)
        net.cast(dtype)
        nets.append(net)
    source, target = nets
    for child in (source[1], source[2]):
        set_values(child, random_values(rng, 4))
    file = str(tmp_path / "net.params")
    if via == "save_parameters":
        source.save_parameters(file)
        target.load_parameters(file, ctx=device)
    else:
        source.collect_params().save(file)
        target.collect_params().load(file, ctx=device)
    x = array(rng.normal(size=(2, 3, 6, 6)), device, dtype)
    names = list(source.collect_params())
    assert names == list(target.collect_params())
    for name in names:
        stored, loaded = source.collect_params()[name].data(), target.collect_params()[name].data()
        assert stored.dtype == loaded.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(stored.asnumpy(), loaded.asnumpy())
    if center:
        np.testing.assert_allclose(source(x).asnumpy(), target(x).asnumpy(), rtol=1e-4, atol=1e-5)


def test_automatic_prefixes_equal_the_built_in():
    def build_net(norm):
        net = nn.HybridSequential(prefix="net_")
        with net.name_scope():
            net.add(norm(), nn.Dense(3), norm())
        return net

    ours, built_in = build_net(ScratchBatchNorm), build_net(nn.BatchNorm)
    assert ScratchBatchNorm()._alias() == "batchnorm"
    assert list(ours.collect_params()) == list(built_in.collect_params())
    assert ScratchBatchNorm(prefix="mine_").gamma.name == "mine_gamma"


@pytest.mark.parametrize("mode", BLOCK_MODES[1:])
def test_an_exported_file_holds_all_four_also_when_unused(tmp_path, device, rng, mode):
    layer = ScratchBatchNorm(scale=False, center=False, in_channels=3)
    layer.initialize(ctx=device)
    values = {k: v.astype("float32") for k, v in random_values(rng, 3).items()}
    set_values(layer, values)
    net = in_mode(layer, mode)
    net(mx.nd.ones((2, 3), ctx=device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.export(str(tmp_path / "net"))
    stored = mx.nd.load(str(tmp_path / "net-0000.params"))
    kinds = {"gamma": "arg:", "beta": "arg:", "running_mean": "aux:", "running_var": "aux:"}
    assert set(stored) == {kinds[name] + layer.prefix + name for name in STATE}
    for name in STATE:
        value = stored[kinds[name] + layer.prefix + name].asnumpy()
        np.testing.assert_array_equal(value, values[name])


# Clause 6: dtypes


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
def test_float16_made_inside_the_net(device, rng, mode):
    """Whoever casts inside a graph casts the layer too; one that was not refuses clearly."""
    layer = ScratchBatchNorm(in_channels=3, momentum=0.0)
    layer.initialize(ctx=device)
    net = nn.HybridSequential()
    net.add(nn.HybridLambda(lambda F, data: F.cast(data, dtype="float16")), layer)
    x = (rng.normal(size=SHAPE) * 100 + 1e4).astype("float16")
    oracle = OracleBatchNorm.fresh(3, momentum=0.0)
    net = in_mode(net, mode)
    if mode != "eager":
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
