"""Clause 10 of the contract: added gradients, repeated calls, loops, mirroring, many devices."""

import json

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
    in_mode,
    last_json,
    random_values,
    run_python,
    set_values,
)
from mxnet import autograd, gluon
from mxnet.gluon import HybridBlock, SymbolBlock, nn

every_mode = pytest.mark.parametrize("mode", MODES)
every_block_mode = pytest.mark.parametrize("mode", BLOCK_MODES)
SHAPE = (6, 3, 4)


def state_of(net):
    """The four parameters of the one norm layer in a net, by their structural names."""
    found = {s: [p for n, p in net.collect_params().items() if n.endswith("_" + s)] for s in STATE}
    assert all(len(parameters) == 1 for parameters in found.values())
    return {name: parameters[0] for name, parameters in found.items()}


# grad_req='add'


@every_mode
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
def test_added_gradients_add(build, rng, mode, training, layer_class):
    subject = build(mode, SHAPE, layer_class=layer_class)
    for name in ("gamma", "beta"):
        subject.parameter(name).grad_req = "add"
    subject.net.collect_params().zero_grad()
    data = subject.array(np.zeros(SHAPE))
    data.attach_grad("add")
    totals = {"dx": 0, "dgamma": 0, "dbeta": 0}
    for _ in range(3):
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        data[:] = subject.array(x)
        with autograd.record(train_mode=training):
            y = subject(data)
        y.backward(subject.array(dy))
        step = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        totals = {name: total + getattr(step, name) for name, total in totals.items()}
        np.testing.assert_allclose(data.grad.asnumpy(), totals["dx"], **CLOSE["float64"])
        np.testing.assert_allclose(subject.gradient("gamma"), totals["dgamma"], **CLOSE["float64"])
        np.testing.assert_allclose(subject.gradient("beta"), totals["dbeta"], **CLOSE["float64"])


@every_mode
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_added_gradients_add_in_every_dtype(build, rng, mode, dtype):
    subject = build(mode, SHAPE, dtype=dtype)
    for name in ("gamma", "beta"):
        subject.parameter(name).grad_req = "add"
    subject.net.collect_params().zero_grad()
    x, dy = rng.normal(size=SHAPE).astype(dtype), rng.normal(size=SHAPE).astype(dtype)
    data = subject.array(x)
    data.attach_grad("add")
    for _ in range(2):
        with autograd.record():
            y = subject(data)
        y.backward(subject.array(dy))
        step = subject.oracle.train_step(x, dy)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == "float16" else CLOSE["float32"]
    np.testing.assert_allclose(data.grad.asnumpy(), 2 * step.dx, **close)
    np.testing.assert_allclose(subject.gradient("gamma"), 2 * step.dgamma, **close)
    np.testing.assert_allclose(subject.gradient("beta"), 2 * step.dbeta, **close)


@every_mode
@pytest.mark.parametrize("added", ["data", "gamma", "beta"])
def test_added_beside_written_gradients(build, rng, mode, added):
    subject = build(mode, SHAPE)
    for name in ("gamma", "beta"):
        subject.parameter(name).grad_req = "add" if name == added else "write"
    subject.net.collect_params().zero_grad()
    x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    data = subject.array(x)
    data.attach_grad("add" if added == "data" else "write")
    for _ in range(2):
        with autograd.record():
            y = subject(data)
        y.backward(subject.array(dy))
        step = subject.oracle.train_step(x, dy)
    times = {name: 2 if name == added else 1 for name in ("data", "gamma", "beta")}
    np.testing.assert_allclose(data.grad.asnumpy(), times["data"] * step.dx, **CLOSE["float64"])
    for name in ("gamma", "beta"):
        expected = times[name] * getattr(step, "d" + name)
        np.testing.assert_allclose(subject.gradient(name), expected, **CLOSE["float64"])


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
        data.attach_grad()
        with autograd.record():
            y = net(data)
        y.backward(array(dy, device))
        mx.nd.waitall()
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


# Recomputation in the backward pass

MIRROR_PROGRAM = """
import sys, json
import numpy as np, scratchbn, mxnet as mx
from mxnet.gluon import nn

kind, _, index = sys.argv[1].partition("(")
device = mx.Context(kind, int(index.rstrip(")")))
record = {}

def build(case, options):
    net = nn.HybridSequential(prefix="net_")
    shared = scratchbn.ScratchBatchNorm(in_channels=4, prefix="shared_", **options)
    if case == "net":
        for k in range(3):
            net.add(nn.Conv2D(4, 3, padding=1, in_channels=4, prefix=f"conv{k}_"))
            net.add(scratchbn.ScratchBatchNorm(in_channels=4, prefix=f"bn{k}_", **options))
            net.add(nn.Activation("relu"))
            net.add(scratchbn.ScratchBatchNormReLU(in_channels=4, prefix=f"relu{k}_", **options))
    elif case == "chain":
        net.add(shared, nn.Activation("tanh"), shared, nn.Activation("sigmoid"), shared)
    else:
        both = lambda F, a, b: F.tanh(b) * a
        net.add(nn.HybridLambda(lambda F, x: both(F, shared(x), shared(x * x))))
    return net

for case, momentum, unbiased in json.loads(sys.argv[2]):
    options = {"momentum": momentum, "unbiased_variance": unbiased}
    symbol = build(case, options)(mx.sym.var("data"))
    executor = symbol.simple_bind(device, data=(8, 4, 6, 6))
    stream = np.random.default_rng(1)
    for name, value in [*sorted(executor.arg_dict.items()), *sorted(executor.aux_dict.items())]:
        drawn = np.abs(stream.normal(size=value.shape)) * 0.3
        value[:] = mx.nd.array(np.zeros(value.shape) if name.endswith("batches") else drawn)
    for step in range(3):
        x, head = (mx.nd.array(stream.normal(size=(8, 4, 6, 6)), ctx=device) for _ in range(2))
        y = executor.forward(is_train=step != 1, data=x)[0]
        record[f"{case} {momentum} {step} y"] = y.asnumpy().tolist()
        if step != 1:
            executor.backward(head)
        mx.nd.waitall()
        for kind, group in (("grad", executor.grad_dict), ("aux", executor.aux_dict)):
            for name, value in group.items():
                record[f"{case} {momentum} {step} {kind} {name}"] = value.asnumpy().tolist()
print(json.dumps(record))
"""
MIRROR_CASES = [
    (case, *options)
    for case in ("net", "chain", "siamese")
    for options in ((0.9, False), (None, True))
]


@pytest.fixture(scope="module")
def mirror_runs(device):
    """What each case computes without mirroring and with it, in a process each."""
    programs = [MIRROR_PROGRAM, device, json.dumps(MIRROR_CASES)]
    return [
        last_json(run_python(*programs, env={"MXNET_BACKWARD_DO_MIRROR": mirror}))
        for mirror in "01"
    ]


@pytest.mark.parametrize("case", MIRROR_CASES, ids=str)
def test_mirroring_does_not_move_statistics_again(mirror_runs, case):
    """`MXNET_BACKWARD_DO_MIRROR=1` makes executors of symbols recompute forward operators.

    Gluon's own graphs do not look at the variable in MXNet 1.9.1; a `Module` or `simple_bind` does.
    """
    label = f"{case[0]} {case[1]} "
    plain, mirrored = ({k: v for k, v in run.items() if k.startswith(label)} for run in mirror_runs)
    assert plain.keys() == mirrored.keys()
    assert sum("aux" in name for name in plain) >= 6
    for name, value in plain.items():
        np.testing.assert_allclose(mirrored[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


GLUON_MIRROR_PROGRAM = """
import sys, json, tempfile
import numpy as np, scratchbn, mxnet as mx
from pathlib import Path
from helpers import MODES, build_subject, check_step, take_step

kind, _, index = sys.argv[1].partition("(")
device = mx.Context(kind, int(index.rstrip(")")))
rng, shape = np.random.default_rng(3), (6, 3, 4, 5)
for mode in MODES:
    with tempfile.TemporaryDirectory() as folder:
        subject = build_subject(mode, shape, rng=rng, device=device, directory=Path(folder))
    for training in (True, False, True, True):
        x, dy = rng.normal(size=shape), rng.normal(size=shape)
        step = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        check_step(take_step(subject, x, dy, record_train=training), step)
        subject.check_statistics(rtol=1e-12)
print(json.dumps("all modes"))
"""


def test_every_mode_with_mirroring_switched_on(device):
    process = run_python(GLUON_MIRROR_PROGRAM, device, env={"MXNET_BACKWARD_DO_MIRROR": "1"})
    assert last_json(process) == "all modes"


# Several devices


@every_block_mode
def test_statistics_are_kept_per_device(device, second_device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3, momentum=0.6)
    devices = [device, second_device]
    layer.initialize(ctx=devices)
    layer.cast("float64")
    values = random_values(rng, 3)
    set_values(layer, values)
    net = in_mode(layer, mode)
    oracles = [OracleBatchNorm(**values, momentum=0.6) for _ in devices]
    for _ in range(3):
        parts = [rng.normal(size=SHAPE) * (k + 1) + 3 * k for k in range(2)]
        heads = [rng.normal(size=SHAPE) for _ in range(2)]
        data = [array(part, where) for part, where in zip(parts, devices)]
        for one in data:
            one.attach_grad()
        with autograd.record():
            outputs = [net(one) for one in data]
        autograd.backward(outputs, [array(h, where) for h, where in zip(heads, devices)])
        mx.nd.waitall()
        for k, where in enumerate(devices):
            step = oracles[k].train_step(parts[k], heads[k])
            assert outputs[k].ctx == where
            np.testing.assert_allclose(outputs[k].asnumpy(), step.y, **CLOSE["float64"])
            np.testing.assert_allclose(data[k].grad.asnumpy(), step.dx, **CLOSE["float64"])
            np.testing.assert_allclose(
                layer.gamma.grad(where).asnumpy(), step.dgamma, **CLOSE["float64"]
            )
            for name in ("running_mean", "running_var"):
                actual = getattr(layer, name).data(where).asnumpy()
                np.testing.assert_allclose(actual, getattr(oracles[k], name), rtol=1e-12)
            inferred = net(data[k]).asnumpy()
            np.testing.assert_allclose(inferred, oracles[k].infer(parts[k]), **CLOSE["float64"])


@every_block_mode
def test_data_parallel_training(device, second_device, rng, mode):
    """A Trainer sums gradients over devices; both copies of gamma and beta stay equal."""
    devices = [device, second_device]
    layer = ScratchBatchNorm()
    chain = nn.HybridSequential()
    chain.add(nn.Dense(4), layer, nn.Dense(2))
    chain.initialize(mx.init.Xavier(), ctx=devices)
    net = in_mode(chain, mode)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    for _ in range(4):
        parts = gluon.utils.split_and_load(
            array(rng.normal(size=(10, 5)), mx.cpu(), "float32"), devices
        )
        with autograd.record():
            losses = [((net(part) - 1) ** 2).sum() for part in parts]
        autograd.backward(losses)
        trainer.step(10)
    mx.nd.waitall()
    for name in ("gamma", "beta"):
        copies = [copy.asnumpy() for copy in getattr(layer, name).list_data()]
        np.testing.assert_array_equal(copies[0], copies[1])
        assert np.abs(copies[0] - (name == "gamma")).max() > 1e-4
    means = [copy.asnumpy() for copy in layer.running_mean.list_data()]
    assert np.abs(means[0] - means[1]).max() > 1e-4


@every_block_mode
def test_reset_ctx_moves_the_layer(device, second_device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    oracle = OracleBatchNorm.fresh(3)
    for where in (device, second_device, device):
        net.collect_params().reset_ctx(where)
        x = rng.normal(size=SHAPE)
        with autograd.record():
            y = net(array(x, where, "float32"))
        np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float32"])
        mx.nd.waitall()
        np.testing.assert_allclose(
            layer.running_mean.data(where).asnumpy(), oracle.running_mean, rtol=1e-5, atol=1e-6
        )


# Several layers on one array: MXNet merges what they have in common


class Siblings(HybridBlock):
    """Sums what several norm layers make of one array."""

    def __init__(self, norm, count):
        super().__init__()
        for k in range(count):
            self.register_child(norm(in_channels=3), f"norm{k}")

    def hybrid_forward(self, F, x):
        return F.add_n(*(F.tanh(norm(x)) for norm in self._children.values()))


@pytest.mark.parametrize("count", [2, 3, 12])
@pytest.mark.parametrize("static", [False, True])
def test_layers_that_share_their_data(device, rng, count, static):
    x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    gradients = []
    for norm in (nn.BatchNorm, ScratchBatchNorm):
        net = Siblings(norm, count)
        net.initialize(ctx=device)
        net.cast("float64")
        for k, layer in enumerate(net._children.values()):
            layer.gamma.set_data(mx.nd.array([1 + k, 2, 3], dtype="float64"))
        net.hybridize(static_alloc=static, static_shape=static)
        data = array(x, device)
        data.attach_grad()
        with autograd.record():
            y = net(data)
        y.backward(array(dy, device))
        mx.nd.waitall()
        per_layer = [layer.gamma.grad().asnumpy() for layer in net._children.values()]
        gradients.append((y.asnumpy(), data.grad.asnumpy(), *per_layer))
    for built_in, ours in zip(*gradients):
        np.testing.assert_allclose(ours, built_in, rtol=1e-9, atol=1e-10)
