"""Conversion between the layers in nets of any build."""

import json
import warnings
from collections import OrderedDict, deque

from scratchbn import freeze, to_builtin, to_scratch

import mxnet as mx
import numpy as np
import pytest
from helpers import array, untrained
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn
from norm_nets import SHAPE, Residual, check_equal, kinds, layers, ready, state, train, ways


def restore(net, values):
    for name, parameter in net.collect_params().items():
        parameter.set_data(mx.nd.array(values[name], dtype=parameter.dtype))


def operators(net):
    symbol = net(mx.sym.var("data"))
    return [node["op"] for node in json.loads(symbol.tojson())["nodes"] if node["op"] != "null"]


@ways
@pytest.mark.parametrize("when", ["new", "initialized", "called", "hybridized", "compiled"])
def test_converts_at_any_time(device, rng, convert, source, target, when):
    net = Residual(source)
    x = array(rng.normal(size=SHAPE), device)
    reference = ready(Residual(source, prefix=net.prefix), device)
    reference(x)
    if when != "new":
        ready(net, device)
    if when in ("hybridized", "compiled"):
        net.hybridize()
    if when in ("called", "compiled"):
        net(x)
    same, report = convert(net, report=True)
    assert same is net
    assert [type(layer) for layer in layers(net)] == [target] * 5
    assert [entry.path for entry in report.converted] == ["first", "body.1", "3", "4", "5"]
    assert report.skipped == report.notes == ()
    assert {entry.kind for entry in report.converted} == {source.__name__}
    if when == "new":
        ready(net, device)
        net(x)
    restore(net, {n: p.data().asnumpy() for n, p in reference.collect_params().items()})
    for _ in range(2):
        check_equal(train(net, x), train(reference, x))
        np.testing.assert_allclose(net(x).asnumpy(), reference(x).asnumpy(), rtol=1e-6, atol=1e-6)
    assert operators(net).count("BatchNorm") == (5 if target is nn.BatchNorm else 0)


@ways
def test_a_compiled_graph_is_not_used_again(device, rng, convert, source, target):
    inner = nn.HybridSequential()
    inner.add(source(in_channels=3), nn.Conv2D(3, 1))
    outer, outermost = nn.HybridSequential(), nn.HybridSequential()
    outer.add(inner)
    outermost.add(outer)
    ready(outermost, device).hybridize()
    x = array(rng.normal(size=SHAPE), device)
    outermost(x)
    for block in (outermost, outer, inner):
        block._get_graph(x)
    convert(outermost)
    for block in (outermost, outer, inner, inner[0]):
        assert block._cached_graph == ()
        assert block._cached_op is None
    outermost(x)
    found = [node["op"] for node in json.loads(outermost._cached_graph[1].tojson())["nodes"]]
    assert ("BatchNorm" in found) == (target is nn.BatchNorm)


@ways
def test_layers_shared_between_blocks_stay_shared(device, rng, convert, source, target):
    shared = source(in_channels=3)
    net, twice = nn.HybridSequential(), nn.HybridSequential()
    twice.add(shared, nn.Activation("tanh"), shared)
    net.add(shared, twice, nn.Conv2D(3, 1), twice)
    ready(net, device).hybridize()
    x = array(rng.normal(size=SHAPE), device)
    net(x)
    _, report = convert(net, report=True)
    assert len(report.converted) == 1
    assert net[0] is net[1][0] is net[3][2] is shared
    assert type(shared) is target
    net(x)
    names = net[1]._collect_params_with_prefix()
    assert names["0.gamma"] is names["2.gamma"]


@ways
def test_layers_that_share_parameters_still_do(device, convert, source, target):
    first = source(in_channels=3)
    net = nn.HybridSequential()
    net.add(first, source(in_channels=3, params=first.params))
    ready(net, device)
    convert(net)
    assert [type(layer) for layer in net] == [target, target]
    for name in ("gamma", "beta", "running_mean", "running_var"):
        assert getattr(net[0], name) is getattr(net[1], name)


@ways
def test_the_net_may_be_the_layer(device, rng, convert, source, target):
    layer = ready(source(in_channels=3), device)
    layer.hybridize()
    x = array(rng.normal(size=SHAPE), device)
    values = {n: p.data().asnumpy() for n, p in layer.collect_params().items()}
    expected = train(layer, x)
    restore(layer, values)
    same, report = convert(layer, report=True)
    assert same is layer
    assert type(layer) is target
    (entry,) = report.converted
    assert (entry.path, entry.name) == ("", layer.name)
    check_equal(train(layer, x), expected)


class Plain(Block):
    """Not hybrid, with layers where a walk over children does not come."""

    def __init__(self, layer_class):
        super().__init__()
        self.stages = [nn.Dense(3), {"norm": layer_class(in_channels=3)}]
        self.queue = deque([layer_class(in_channels=3)])
        self.group = frozenset([layer_class(in_channels=3)])
        self.ordered = OrderedDict(a=(layer_class(in_channels=3),))
        self.circle = [self.stages]
        self.circle.append(self.circle)
        self.call = (lambda layer: lambda x: layer(x))(self.queue[0])
        self.child = nn.Sequential()
        self.child.add(layer_class(in_channels=3))


@ways
def test_layers_in_any_container_are_found(device, rng, convert, source, target):
    net = Plain(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, report = convert(net, report=True)
    assert caught == []
    (alone,) = net.group
    found = [net.stages[1]["norm"], net.queue[0], alone, net.ordered["a"][0], net.child[0]]
    assert [type(layer) for layer in found] == [target] * 5
    assert sorted(entry.path for entry in report.converted) == [
        "child.0",
        "group[0]",
        "ordered['a'][0]",
        "queue[0]",
        "stages[1]['norm']",
    ]
    net.queue[0].initialize(ctx=device)
    x = array(rng.normal(size=SHAPE), device, "float32")
    np.testing.assert_array_equal(net.call(x).asnumpy(), net.queue[0](x).asnumpy())


@pytest.mark.values
@kinds
def test_layers_inside_a_symbol_block_are_converted(device, tmp_path, layer_class):
    inside = nn.HybridSequential()
    inside.add(nn.Conv2D(3, 1), layer_class(), nn.Activation("relu"), layer_class())
    inside.initialize(ctx=device)
    inside.hybridize()
    x = mx.nd.ones((2, 3, 4, 4), ctx=device)
    inside(x)
    inside.export(str(tmp_path / "net"))
    net = nn.HybridSequential()
    net.add(
        SymbolBlock.imports(
            str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params"), device
        ),
        layer_class(),
    )
    net[1].initialize(ctx=device)
    expected = net(x).asnumpy()
    names = [f"0.{layer.name}" for layer in (inside[1], inside[3])]
    there, other = (to_scratch, to_builtin)[:: 1 if layer_class is nn.BatchNorm else -1]
    _, report = there(net, report=True)
    assert report.skipped == ()
    assert [done.path for done in report.converted] == [*names, "1"]
    np.testing.assert_allclose(net(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)
    assert len(other(net, report=True)[1].converted) == 3
    np.testing.assert_allclose(net(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)
    with untrained():
        assert sorted(freeze(net, report=True)[1]) == sorted([*names, "1"])


@ways
def test_to_convert_again_changes_nothing(device, convert, source, target):
    net = ready(Residual(source), device)
    convert(net)
    before = [state(layer) for layer in layers(net)]
    _, report = convert(net, report=True)
    assert report.converted == report.skipped == ()
    assert [state(layer) for layer in layers(net)] == before


@ways
def test_a_net_without_norm_layers_is_left_alone(device, rng, convert, source, target):
    net = nn.HybridSequential()
    net.add(nn.Dense(3))
    ready(net, device).hybridize()
    net(array(rng.normal(size=SHAPE), device))
    compiled = net._cached_op
    same, report = convert(net, report=True)
    assert same is net
    assert (report.converted, report.skipped, report.notes) == ((), (), ())
    assert net._cached_op is compiled


class Scaled(HybridBlock):
    """Takes float32 and works in float16, with an operator that has it on a CPU."""

    def __init__(self):
        super().__init__()
        self.weight = self.params.get("weight", shape=(1, 3, 1, 1), init="ones")

    def hybrid_forward(self, F, x, weight):
        return F.broadcast_mul(F.Cast(x, dtype="float16"), weight)


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_a_float16_net_converts(device, rng, mode):
    net = nn.HybridSequential()
    net.add(Scaled(), nn.BatchNorm(in_channels=3), nn.Activation("relu"))
    ready(net, device, "float16")
    assert (net[0].weight.dtype, net[1].gamma.dtype) == ("float16", "float32")
    x = array(rng.normal(size=SHAPE), device, "float32")
    with autograd.train_mode():
        expected = net(x).asnumpy()
    if mode == "hybrid":
        net.hybridize()
        net(x)
    to_scratch(net)
    with autograd.train_mode():
        y = net(x)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=2e-3, atol=2e-3)
    assert net[1].gamma.dtype == "float32"
    to_builtin(net)
    with autograd.train_mode():
        np.testing.assert_array_equal(net(x).asnumpy(), expected)


def test_numpy_arrays_work_after_a_conversion(device, rng):
    mx.npx.set_np()
    net = nn.HybridSequential()
    net.add(nn.Dense(4), nn.BatchNorm())
    net.initialize(ctx=device)
    net.hybridize()
    x = array(rng.normal(size=(5, 3)), device, "float32")
    expected = net(x).asnumpy()
    to_scratch(net)
    y = net(x)
    assert isinstance(y, mx.np.ndarray)
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-5, atol=1e-6)
