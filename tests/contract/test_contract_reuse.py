"""Clause 10 of the contract: one layer called several times in one forward, and in loops."""

from scratchbn import ScratchBatchNorm
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from contract_cases import every_block_mode, every_mode
from helpers import CLOSE, STATE, array, forward_backward, in_mode, random_values, set_values
from mxnet import autograd, gluon
from mxnet.gluon import HybridBlock, SymbolBlock, nn

SHAPE = (6, 3, 4)


def state_of(net):
    """The four parameters of the one norm layer in a net, by their structural names."""
    found = {s: [p for n, p in net.collect_params().items() if n.endswith("_" + s)] for s in STATE}
    assert all(len(parameters) == 1 for parameters in found.values())
    return {name: parameters[0] for name, parameters in found.items()}


# One layer called several times in one forward


class Siamese(HybridBlock):
    """Calls one layer (or two that share their parameters) on both inputs, first on `first`."""

    def __init__(self, layers, combine, **kwargs):
        super().__init__(**kwargs)
        self.combine = combine
        with self.name_scope():
            self.one, self.two = layers

    def hybrid_forward(self, F, first, second):
        a = self.one(first)
        b = self.two(second)
        return self.combine(F, a, b)


COMBINATIONS = {
    "in order": lambda F, a, b: F.elemwise_add(2 * a, 3 * b),
    "reversed": lambda F, a, b: F.elemwise_add(3 * b, 2 * a),
    "reversed, deep": lambda F, a, b: F.elemwise_add(
        F.identity(3 * b), F.identity(F.identity(2 * a))
    ),
}


def shared_layers(device, rng, shared_by, **options):
    first = ScratchBatchNorm(in_channels=3, **options)
    second = first
    if shared_by == "params":
        second = ScratchBatchNorm(in_channels=3, params=first.params, **options)
    first.initialize(ctx=device)
    for layer in (first, second):
        layer.cast("float64")
    values = random_values(rng, 3)
    set_values(first, values)
    return first, second, OracleBatchNorm(**values, **options)


@every_mode
@pytest.mark.parametrize("shared_by", ["object", "params"])
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_two_calls_update_twice_in_order(
    device, rng, tmp_path, mode, shared_by, combination, momentum
):
    first, second, oracle = shared_layers(device, rng, shared_by, momentum=momentum)
    net = Siamese((first, second), COMBINATIONS[combination])
    if mode == "exported":
        sample = array(np.zeros(SHAPE), device)
        net.hybridize()
        net(sample, sample)
        net.export(str(tmp_path / "net"))
        files = str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")
        net = SymbolBlock.imports(files[0], ["data0", "data1"], files[1], ctx=device)
    elif mode == "nested":
        outer = Siamese((first, second), COMBINATIONS[combination])
        net = Wrapped(outer)
        net.hybridize()
    else:
        net = in_mode(net, mode)
    held = state_of(net)
    for step in range(3):
        x1, x2 = rng.normal(size=SHAPE), 10 * rng.normal(size=SHAPE) + 5
        dy = rng.normal(size=SHAPE)
        data = [array(x, device) for x in (x1, x2)]
        for one in data:
            one.attach_grad()
        with autograd.record():
            y = net(*data)
        y.backward(array(dy, device))
        mx.nd.waitall()
        e1, e2 = oracle.train_step(x1, 2 * dy), oracle.train_step(x2, 3 * dy)
        np.testing.assert_allclose(y.asnumpy(), 2 * e1.y + 3 * e2.y, **CLOSE["float64"])
        for one, expected in zip(data, (e1, e2)):
            np.testing.assert_allclose(one.grad.asnumpy(), expected.dx, **CLOSE["float64"])
        for name in ("gamma", "beta"):
            expected = getattr(e1, "d" + name) + getattr(e2, "d" + name)
            actual = held[name].grad(device).asnumpy()
            np.testing.assert_allclose(actual, expected, err_msg=name, **CLOSE["float64"])
        for name in ("running_mean", "running_var"):
            actual, expected = held[name].data(device).asnumpy(), getattr(oracle, name)
            np.testing.assert_allclose(actual, expected, rtol=1e-10, err_msg=f"{name}, step {step}")
        y = net(*data)
        expected = 2 * oracle.infer(x1) + 3 * oracle.infer(x2)
        np.testing.assert_allclose(y.asnumpy(), expected, **CLOSE["float64"])


class Wrapped(HybridBlock):
    """One more level around a block of two inputs."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def hybrid_forward(self, F, first, second):
        return self.inner(first, second)


@every_mode
@pytest.mark.parametrize("shared_by", ["object", "params"])
def test_a_chain_of_the_same_layer(device, rng, tmp_path, mode, shared_by):
    """The second call normalizes what the first returned."""
    first, second, oracle = shared_layers(device, rng, shared_by, momentum=0.3)
    chain = nn.HybridSequential()
    chain.add(first, nn.Activation("tanh"), second)
    net = in_mode(chain, mode, array(np.zeros(SHAPE), device), tmp_path)
    held = state_of(net)
    for _ in range(3):
        x, dy = rng.normal(size=SHAPE) + 2, rng.normal(size=SHAPE)
        data = array(x, device)
        y = forward_backward(net, data, array(dy, device))
        replay = OracleBatchNorm(**{name: getattr(oracle, name) for name in STATE}, momentum=0.3)
        inner = oracle.train_step(x, np.zeros(SHAPE))
        middle = np.tanh(inner.y)
        outer = oracle.train_step(middle, dy)
        inner = replay.train_step(x, outer.dx * (1 - middle**2))
        np.testing.assert_allclose(y.asnumpy(), outer.y, **CLOSE["float64"])
        np.testing.assert_allclose(data.grad.asnumpy(), inner.dx, rtol=1e-9, atol=1e-9)
        for name in ("gamma", "beta"):
            expected = getattr(inner, "d" + name) + getattr(outer, "d" + name)
            actual = held[name].grad(device).asnumpy()
            np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
        for name in ("running_mean", "running_var"):
            actual = held[name].data(device).asnumpy()
            np.testing.assert_allclose(actual, getattr(oracle, name), rtol=1e-10)


@every_mode
def test_a_layer_in_two_branches_of_a_net(device, rng, tmp_path, mode):
    """The same object as a child of two blocks, as shared heads of detectors are built."""
    shared, _, oracle = shared_layers(device, rng, "object", momentum=0.5)
    left, right = nn.HybridSequential(), nn.HybridSequential()
    left.add(nn.HybridLambda(lambda F, x: x * 2), shared)
    right.add(nn.HybridLambda(lambda F, x: x + 3), shared)
    both = nn.HybridSequential()
    both.add(gluon.contrib.nn.HybridConcurrent(axis=0))
    both[0].add(left, right)
    net = in_mode(both, mode, array(np.zeros(SHAPE), device), tmp_path)
    held = state_of(net)
    for _ in range(2):
        x = rng.normal(size=SHAPE)
        with autograd.record():
            y = net(array(x, device))
        mx.nd.waitall()
        expected = np.concatenate([oracle.train(2 * x), oracle.train(x + 3)])
        np.testing.assert_allclose(y.asnumpy(), expected, **CLOSE["float64"])
        for name in ("running_mean", "running_var"):
            actual = held[name].data(device).asnumpy()
            np.testing.assert_allclose(actual, getattr(oracle, name), rtol=1e-10)


@every_block_mode
def test_separate_calls_of_one_layer_under_one_recording(device, rng, mode):
    layer, _, oracle = shared_layers(device, rng, "object")
    net = in_mode(layer, mode)
    x1, x2, dy = (rng.normal(size=SHAPE) for _ in range(3))
    d1, d2 = array(x1, device), array(x2, device)
    d1.attach_grad()
    d2.attach_grad()
    with autograd.record():
        total = net(d1) * array(dy, device) - net(d2) * array(dy, device)
    total.backward()
    mx.nd.waitall()
    e1, e2 = oracle.train_step(x1, dy), oracle.train_step(x2, -dy)
    np.testing.assert_allclose(d1.grad.asnumpy(), e1.dx, **CLOSE["float64"])
    np.testing.assert_allclose(d2.grad.asnumpy(), e2.dx, **CLOSE["float64"])
    np.testing.assert_allclose(layer.running_var.data().asnumpy(), oracle.running_var, rtol=1e-12)
    np.testing.assert_allclose(
        layer.gamma.grad().asnumpy(), e1.dgamma + e2.dgamma, **CLOSE["float64"]
    )


# Loops


class Loop(HybridBlock):
    """Applies one layer to every slice of the first axis."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def hybrid_forward(self, F, x):
        out, _ = F.contrib.foreach(lambda data, state: (self.layer(data), state), x, F.zeros((1,)))
        return out


def loop_net(mode, device, rng, tmp_path):
    layer = ScratchBatchNorm(in_channels=3, momentum=0.4)
    layer.initialize(ctx=device)
    values = random_values(rng, 3)
    set_values(layer, values)
    net = in_mode(Loop(layer), mode, mx.nd.zeros((5, 6, 3), ctx=device), tmp_path)
    return net, state_of(net), OracleBatchNorm(**values, momentum=0.4)


@every_mode
def test_foreach_updates_at_every_step(device, rng, tmp_path, mode):
    """`contrib.foreach` runs the layer on five slices: five updates in order, none in inference.

    MXNet 1.9.1 cannot differentiate a hybridized loop whose body holds auxiliary states, the
    built-in layer's included; gradients are tested where it can.
    """
    net, state, oracle = loop_net(mode, device, rng, tmp_path)
    for _ in range(2):
        x = rng.normal(size=(5, 6, 3)) + 1
        data = array(x, device, "float32")
        with autograd.train_mode():
            y = net(data)
        mx.nd.waitall()
        np.testing.assert_allclose(y.asnumpy(), [oracle.train(p) for p in x], **CLOSE["float32"])
        for name in ("running_mean", "running_var"):
            actual = state[name].data().asnumpy()
            np.testing.assert_allclose(actual, getattr(oracle, name), rtol=1e-5, atol=1e-6)
        expected = [oracle.infer(part) for part in x]
        np.testing.assert_allclose(net(data).asnumpy(), expected, **CLOSE["float32"])
        mx.nd.waitall()


def test_gradients_of_an_eager_foreach(device, rng, tmp_path):
    net, state, oracle = loop_net("eager", device, rng, tmp_path)
    x, dy = rng.normal(size=(5, 6, 3)) + 1, rng.normal(size=(5, 6, 3))
    data = array(x, device, "float32")
    data.attach_grad()
    with autograd.record():
        y = net(data)
    y.backward(array(dy, device, "float32"))
    steps = [oracle.train_step(*pair) for pair in zip(x, dy)]
    close = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(data.grad.asnumpy(), [s.dx for s in steps], **close)
    dgamma, dbeta = sum(s.dgamma for s in steps), sum(s.dbeta for s in steps)
    np.testing.assert_allclose(state["gamma"].grad().asnumpy(), dgamma, **close)
    np.testing.assert_allclose(state["beta"].grad().asnumpy(), dbeta, **close)
