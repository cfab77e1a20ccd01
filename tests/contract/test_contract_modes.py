"""Clause 7 of the contract: eager, hybridized, exported and re-imported nets train alike."""

import json

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import (
    BLOCK_MODES,
    CLOSE,
    GRAPH_MODES,
    MODES,
    STATE,
    Subject,
    check_step,
    in_mode,
    infer,
    random_values,
    take_step,
    train_forward,
)
from mxnet import autograd, gluon
from mxnet.gluon import nn

every_mode = pytest.mark.parametrize("mode", MODES)
every_block_mode = pytest.mark.parametrize("mode", BLOCK_MODES)
STEPS = 25


def convolutional_net(device, norm, seed, **options):
    """A float64 net with four norm layers of two ranks, initialized from a NumPy stream."""
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        block = nn.HybridSequential(prefix="block_")
        with block.name_scope():
            block.add(nn.Conv2D(5, 3, in_channels=2), norm(in_channels=5, prefix="a_", **options))
            block.add(nn.Activation("tanh"), nn.Conv2D(4, 3, in_channels=5))
            block.add(norm(in_channels=4, scale=False, prefix="b_", **options))
        if norm is ScratchBatchNorm:
            net.add(block, ScratchBatchNormReLU(in_channels=4, prefix="c_", **options))
        else:
            net.add(block, norm(in_channels=4, prefix="c_", **options), nn.Activation("relu"))
        net.add(nn.Flatten())
        net.add(nn.Dense(6, in_units=64), norm(in_channels=6, center=False, prefix="d_", **options))
        net.add(nn.Dense(3, in_units=6))
    net.initialize(ctx=device)
    net.cast("float64")
    stream = np.random.default_rng(seed)
    for name, parameter in net.collect_params().items():
        if name.endswith(("weight", "bias", *STATE)):
            value = stream.normal(size=parameter.shape) * 0.3
            value = np.abs(value) + 0.5 if name.endswith(("gamma", "var")) else value
            parameter.set_data(mx.nd.array(value, dtype="float64"))
    return net


def train(net, device, rng, steps=STEPS):
    """Train with a Trainer on `steps` random batches; return what every step gave."""
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.05, "momentum": 0.9})
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    history = []
    for step in range(steps):
        size = 8 + step % 3
        x = mx.nd.array(rng.normal(size=(size, 2, 8, 8)) * 2 + 1, dtype="float64", ctx=device)
        label = mx.nd.array(rng.integers(0, 3, size=size), ctx=device)
        x.attach_grad()
        with autograd.record():
            y = net(x)
            total = loss(y, label)
        total.backward()
        trainer.step(size)
        mx.nd.waitall()
        record = {"y": y.asnumpy(), "dx": x.grad.asnumpy(), "inference": net(x).asnumpy()}
        for name, parameter in net.collect_params().items():
            record[name] = parameter.data().asnumpy()
        mx.nd.waitall()
        history.append(record)
    return history


def check_histories(actual, expected, statistics=1e-10, rest=1e-10):
    assert len(actual) == len(expected)
    for step, (a, e) in enumerate(zip(actual, expected)):
        for name in a:
            close = statistics if "running" in name or name == "inference" else rest
            np.testing.assert_allclose(
                a[name], e[name], rtol=close, atol=close, err_msg=f"{name} after step {step}"
            )


@pytest.mark.parametrize("mode", GRAPH_MODES)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"unbiased_variance": True, "momentum": 0.5}], ids=str
)
def test_nets_train_alike_in_every_mode(device, tmp_path, mode, options):
    eager = convolutional_net(device, ScratchBatchNorm, 1, **options)
    expected = train(eager, device, np.random.default_rng(2))
    net = convolutional_net(device, ScratchBatchNorm, 1, **options)
    sample = mx.nd.zeros((2, 2, 8, 8), dtype="float64", ctx=device)
    net = in_mode(net, mode, sample, tmp_path)
    actual = train(net, device, np.random.default_rng(2))
    moved = np.abs(expected[-1]["inference"] - expected[0]["inference"][:1]).max()
    assert moved > 0.1
    check_histories([{k: v for k, v in a.items() if k in expected[0]} for a in actual], expected)
    assert {name for name in actual[0] if name.endswith("running_var")} == {
        name for name in expected[0] if name.endswith("running_var")
    }


@every_mode
def test_nets_train_as_the_built_in_does(device, tmp_path, mode):
    """The built-in reads momentum and epsilon as float32, and updates in the backward pass."""
    options = {"epsilon": 2.0**-16, "momentum": 0.875}
    built_in = convolutional_net(device, nn.BatchNorm, 3, **options)
    built_in[0][4].gamma.set_data(mx.nd.ones(4, dtype="float64"))
    built_in[5].beta.set_data(mx.nd.zeros(6, dtype="float64"))
    ours = convolutional_net(device, ScratchBatchNorm, 3, **options)
    for name, parameter in built_in.collect_params().items():
        ours.collect_params()[name].set_data(parameter.data())
    sample = mx.nd.zeros((2, 2, 8, 8), dtype="float64", ctx=device)
    expected = train(built_in, device, np.random.default_rng(4))
    actual = train(in_mode(ours, mode, sample, tmp_path), device, np.random.default_rng(4))
    shared = set(actual[0]) & set(expected[0])
    assert {"y", "dx", "inference"} < shared
    assert sum(name.endswith("running_mean") for name in shared) == 4
    actual = [{name: record[name] for name in shared} for record in actual]
    check_histories(actual, expected, statistics=1e-9, rest=1e-9)


@every_mode
def test_a_layer_trains_as_the_oracle_does(build, device, rng, mode):
    """Gamma, beta and the data itself descend; statistics follow, over 25 steps."""
    shape = (5, 3, 4)
    subject = build(mode, shape)
    oracle = subject.oracle
    trainer = gluon.Trainer(subject.net.collect_params(), "sgd", {"learning_rate": 0.125})
    x = rng.normal(size=shape)
    weight = rng.normal(size=shape)
    for _ in range(STEPS):
        actual, expected = take_step(subject, x, weight), oracle.train_step(x, weight)
        check_step(actual, expected)
        trainer.step(1)
        oracle.gamma -= 0.125 * expected.dgamma
        oracle.beta -= 0.125 * expected.dbeta
        x = x - 0.125 * expected.dx
        np.testing.assert_allclose(subject.value("gamma"), oracle.gamma, rtol=1e-10)
        np.testing.assert_allclose(subject.value("beta"), oracle.beta, rtol=1e-10)
        subject.check_statistics(rtol=1e-10)
        np.testing.assert_allclose(infer(subject, x), oracle.infer(x), **CLOSE["float64"])


@pytest.mark.parametrize("first", ["training", "inference", "train_mode"])
@pytest.mark.parametrize(
    "hybridize", [{}, {"static_alloc": True}, {"static_alloc": True, "static_shape": True}]
)
@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_hybridize_before_the_first_forward(device, rng, depth, first, hybridize):
    """With `in_channels=0` the channel count is only known to the graph's shape inference."""
    layer = ScratchBatchNorm()
    net = layer
    for _ in range(depth):
        outer = nn.HybridSequential()
        outer.add(net)
        net = outer
    net.initialize(ctx=device)
    net.hybridize(**hybridize)
    oracle = OracleBatchNorm.fresh(3)
    x = rng.normal(size=(6, 3, 4)) * 2 + 1
    data = mx.nd.array(x, ctx=device)
    if first == "training":
        with autograd.record():
            y = net(data)
        y.backward()
    elif first == "train_mode":
        with autograd.train_mode():
            y = net(data)
    else:
        y = net(data)
    expected = oracle.infer(x) if first == "inference" else oracle.train(x)
    np.testing.assert_allclose(y.asnumpy(), expected, **CLOSE["float32"])
    mx.nd.waitall()
    assert layer.gamma.shape == layer.running_mean.shape == (3,)
    np.testing.assert_allclose(layer.running_mean.data().asnumpy(), oracle.running_mean, rtol=1e-5)
    np.testing.assert_allclose(layer.running_var.data().asnumpy(), oracle.running_var, rtol=1e-5)
    np.testing.assert_allclose(net(data).asnumpy(), oracle.infer(x), **CLOSE["float32"])


@pytest.mark.parametrize("axis", [1, 2, -1, -2, 0])
@every_block_mode
def test_deferred_channels_along_any_axis(device, rng, axis, mode):
    layer = ScratchBatchNorm(axis=axis)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    x = rng.normal(size=(4, 3, 5)) + 2
    oracle = OracleBatchNorm.fresh(x.shape[axis], axis=axis)
    with autograd.record():
        y = net(mx.nd.array(x, ctx=device))
    np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float32"])
    assert layer.gamma.shape == (x.shape[axis],)
    assert f"in_channels={x.shape[axis]}" in repr(layer)


@pytest.mark.parametrize("hybridize", [False, True])
def test_deferred_channels_behind_deferred_producers(device, rng, hybridize):
    """Conv and Dense with unknown inputs around the layer, two nets deep."""
    net = nn.HybridSequential()
    for _ in range(2):
        block = nn.HybridSequential()
        block.add(nn.Conv2D(4, 3), ScratchBatchNorm(), ScratchBatchNormReLU())
        net.add(block)
    net.add(nn.Dense(5), ScratchBatchNorm(), nn.Dense(2))
    net.initialize(ctx=device)
    if hybridize:
        net.hybridize()
    with autograd.record():
        y = net(mx.nd.array(rng.normal(size=(4, 2, 8, 8)), ctx=device))
    y.backward()
    mx.nd.waitall()
    assert y.shape == (4, 2)
    sizes = [p.shape for n, p in net.collect_params().items() if n.endswith("running_mean")]
    assert sizes == [(4,)] * 4 + [(5,)]
    assert all(
        p.data().asnumpy().any()
        for n, p in net.collect_params().items()
        if n.endswith("running_mean")
    )


@every_mode
def test_batch_and_spatial_sizes_may_change(build, rng, mode):
    subject = build(mode, (4, 3, 5, 5))
    for shape in ((4, 3, 5, 5), (7, 3, 5, 5), (2, 3, 9, 4), (1, 3, 2, 1), (4, 3, 5, 5)):
        x, dy = rng.normal(size=shape), rng.normal(size=shape)
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics(rtol=1e-12)
        np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])


@every_block_mode
def test_hybridize_can_be_switched_off_and_on(device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    layer.cast("float64")
    net = in_mode(layer, mode)
    oracle = OracleBatchNorm.fresh(3)
    subject = Subject(mode, layer, net, oracle, device, "float64")
    for active in (True, False, True, False):
        net.hybridize(active)
        x, dy = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
        check_step(take_step(subject, x, dy), oracle.train_step(x, dy))
        subject.check_statistics(rtol=1e-12)


@every_mode
def test_eager_children_of_a_plain_block(device, rng, tmp_path, mode):
    """A hybridized layer inside an eager `Sequential`."""
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    inner = in_mode(layer, mode, mx.nd.zeros((2, 3), ctx=device), tmp_path)
    net = nn.Sequential()
    net.add(inner, nn.Lambda(lambda data: data * 2))
    x = rng.normal(size=(6, 3))
    oracle = OracleBatchNorm.fresh(3)
    with autograd.record():
        y = net(mx.nd.array(x, ctx=device))
    np.testing.assert_allclose(y.asnumpy(), 2 * oracle.train(x), **CLOSE["float32"])


# np / npx arrays


@pytest.fixture
def np_arrays():
    mx.npx.set_np()


@every_mode
@pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.usefixtures("np_arrays")
def test_np_arrays(build, rng, mode, layer_class, dtype):
    subject = build(mode, (6, 3, 4), layer_class=layer_class, dtype=dtype)
    for _ in range(3):
        x, dy = (rng.normal(size=(6, 3, 4)).astype(dtype) for _ in range(2))
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy), dtype)
        subject.check_statistics()
        np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE[dtype])
    y = subject(subject.array(x))
    assert isinstance(y, mx.np.ndarray)
    assert y.dtype == np.dtype(dtype)
    assert isinstance(subject.layer.running_mean.data(), mx.np.ndarray)


@every_mode
@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"scale": False, "center": False}], ids=str
)
@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.usefixtures("np_arrays")
def test_np_arrays_with_options(build, rng, mode, options, axis):
    subject = build(mode, (4, 3, 5), axis=axis, **options)
    for training in (True, False, True):
        x, dy = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3, 5))
        expected = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        actual = take_step(subject, x, dy, record_train=training)
        np.testing.assert_allclose(actual.y, expected.y, **CLOSE["float64"])
        np.testing.assert_allclose(actual.dx, expected.dx, **CLOSE["float64"])
        subject.check_statistics(rtol=1e-12)


@every_block_mode
@pytest.mark.parametrize("training_first", [True, False])
@pytest.mark.usefixtures("np_arrays")
def test_np_arrays_deferred(device, rng, mode, training_first):
    layer = ScratchBatchNorm()
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    oracle = OracleBatchNorm.fresh(3)
    x = rng.normal(size=(6, 3, 4)) + 1
    data = mx.np.array(x, dtype="float32", ctx=device)
    if not training_first:
        np.testing.assert_allclose(net(data).asnumpy(), oracle.infer(x), **CLOSE["float32"])
    with autograd.record():
        y = net(data)
    y.backward()
    np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float32"])
    np.testing.assert_allclose(net(data).asnumpy(), oracle.infer(x), **CLOSE["float32"])


@every_block_mode
@pytest.mark.usefixtures("np_arrays")
def test_np_empty_batch(device, mode):
    """MXNet cannot reshape an empty float32 array in a graph on a CPU: a clear refusal there."""
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    data = mx.np.zeros((0, 3, 2), dtype="float32", ctx=device)
    try:
        with autograd.train_mode():
            y = net(data)
        mx.nd.waitall()
    except mx.MXNetError as error:
        assert mode != "eager"
        assert "delay_alloc" in str(error)
    else:
        assert y.shape == data.shape
    assert layer.running_mean.data().asnumpy().tolist() == [0, 0, 0]
    assert layer.running_var.data().asnumpy().tolist() == [1, 1, 1]


# Beside random operators: the training flag of a graph must not disturb them, nor they it


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_beside_dropout(device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    chain = nn.HybridSequential()
    chain.add(nn.Dropout(0.5), layer, nn.Dropout(0.5))
    chain.initialize(ctx=device)
    chain.cast("float64")
    net = in_mode(chain, mode)
    x = mx.nd.array(rng.normal(size=(400, 3)) + 1, dtype="float64", ctx=device)
    before = layer.running_mean.data().asnumpy()
    oracle = OracleBatchNorm.fresh(3)
    np.testing.assert_allclose(net(x).asnumpy(), oracle.infer(x.asnumpy()), **CLOSE["float64"])
    with autograd.record():
        y = net(x)
    mx.nd.waitall()
    assert 0.4 < (y.asnumpy() == 0).mean() < 0.6
    assert np.abs(layer.running_mean.data().asnumpy() - before).min() > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_always_mode_does_not_look_like_training(device, rng, tmp_path, mode):
    layer = ScratchBatchNorm(in_channels=3)
    chain = nn.HybridSequential()
    chain.add(layer, nn.HybridLambda(lambda F, data: F.Dropout(data, p=0.5, mode="always")))
    chain.initialize(ctx=device)
    x = mx.nd.array(rng.normal(size=(50, 3)) + 1, ctx=device)
    net = in_mode(chain, mode, x, tmp_path)
    for _ in range(5):
        y = net(x).asnumpy()
        kept = y != 0
        np.testing.assert_allclose(y[kept], 2 * x.asnumpy()[kept], rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_training_is_recognized_at_every_seed(build, rng, mode):
    """A flag drawn from random numbers must be right for every draw, with a single channel too."""
    subject = build(mode, (4, 1), values={"running_mean": [50.0]})
    x = rng.normal(size=(4, 1))
    trained = infer_output = None
    for seed in range(60):
        mx.random.seed(seed)
        infer_output = infer(subject, x)
        np.testing.assert_allclose(infer_output, subject.oracle.infer(x), **CLOSE["float64"])
        mx.random.seed(seed)
        trained = train_forward(subject, x)
        np.testing.assert_allclose(trained, subject.oracle.train(x), **CLOSE["float64"])
        subject.check_statistics(rtol=1e-11)


# The same layer composed by hand into symbols


def test_symbolic_call_makes_a_graph_an_executor_trains(device, rng):
    """`net(sym.var('data'))` with the Module-era executor: statistics are auxiliary states."""
    layer = ScratchBatchNorm(in_channels=3, prefix="bn_")
    y = layer(mx.sym.var("data"))
    assert y.list_auxiliary_states() == ["bn_running_mean", "bn_running_var"]
    assert sorted(y.list_arguments()) == ["bn_beta", "bn_gamma", "data"]
    executor = y.simple_bind(device, data=(6, 3))
    values = random_values(rng, 3)
    oracle = OracleBatchNorm(**values)
    for name in ("gamma", "beta"):
        executor.arg_dict[f"bn_{name}"][:] = mx.nd.array(values[name], ctx=device)
    for name in ("running_mean", "running_var"):
        executor.aux_dict[f"bn_{name}"][:] = mx.nd.array(values[name], ctx=device)
    for _ in range(3):
        x, dy = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
        out = executor.forward(is_train=False, data=mx.nd.array(x, ctx=device))[0].asnumpy()
        np.testing.assert_allclose(out, oracle.infer(x), **CLOSE["float32"])
        out = executor.forward(is_train=True, data=mx.nd.array(x, ctx=device))[0]
        executor.backward(mx.nd.array(dy, ctx=device))
        step = oracle.train_step(x, dy)
        np.testing.assert_allclose(out.asnumpy(), step.y, **CLOSE["float32"])
        for name, expected in (
            ("data", step.dx),
            ("bn_gamma", step.dgamma),
            ("bn_beta", step.dbeta),
        ):
            np.testing.assert_allclose(
                executor.grad_dict[name].asnumpy(), expected, rtol=1e-4, atol=1e-4
            )
        for name in ("running_mean", "running_var"):
            np.testing.assert_allclose(
                executor.aux_dict[f"bn_{name}"].asnumpy(),
                getattr(oracle, name),
                rtol=1e-5,
                atol=1e-6,
            )


def test_node_names_of_a_graph_are_unique():
    net = nn.HybridSequential()
    net.add(
        ScratchBatchNorm(in_channels=3),
        ScratchBatchNorm(in_channels=3),
        ScratchBatchNormReLU(in_channels=3),
    )
    nodes = json.loads(net(mx.sym.var("data")).tojson())["nodes"]
    names = [node["name"] for node in nodes]
    assert len(names) == len(set(names))
    assert sum(name.endswith(STATE) for name in names) == 12
