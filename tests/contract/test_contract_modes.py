"""Clause 7 of the contract: eager, hybridized, exported and re-imported nets train alike."""

import json

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from contract_cases import every_mode
from helpers import CLOSE, GRAPH_MODES, STATE, check_step, in_mode, infer, random_values, take_step
from mxnet import autograd, gluon
from mxnet.gluon import nn

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


@pytest.fixture(scope="module")
def eager_histories():
    """What eager training gave, by backend and options, for the other modes to be compared with."""
    return {}


@pytest.mark.parametrize("mode", GRAPH_MODES)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"unbiased_variance": True, "momentum": 0.5}], ids=str
)
def test_nets_train_alike_in_every_mode(device, tmp_path, mode, options, backend, eager_histories):
    key = backend, str(options)
    if key not in eager_histories:
        eager = convolutional_net(device, ScratchBatchNorm, 1, **options)
        eager_histories[key] = train(eager, device, np.random.default_rng(2))
    expected = eager_histories[key]
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
