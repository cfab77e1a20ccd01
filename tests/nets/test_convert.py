"""Conversion between the layers in nets of any build."""

import copy
import json
import pickle
import warnings
from collections import OrderedDict, deque

from scratchbn import (
    ScratchBatchNorm,
    ScratchBatchNormReLU,
    freeze,
    to_builtin,
    to_scratch,
    unfreeze,
)

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet import autograd, gluon
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm
from mxnet.gluon.nn.basic_layers import _BatchNorm
from norm_nets import SHAPE, Residual, check_equal, kinds, layers, ready, state, train, ways


def restore(net, values):
    for name, parameter in net.collect_params().items():
        parameter.set_data(mx.nd.array(values[name], dtype=parameter.dtype))


def operators(net):
    symbol = net(mx.sym.var("data"))
    return [node["op"] for node in json.loads(symbol.tojson())["nodes"] if node["op"] != "null"]


# Whole nets


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
def test_parameters_are_the_same_objects(device, rng, convert, source, target):
    net = ready(Residual(source), device)
    net(array(rng.normal(size=SHAPE), device))
    before = dict(net.collect_params().items())
    data = {name: p.data().handle.value for name, p in before.items()}
    before_by_path = net._collect_params_with_prefix()
    convert(net)
    after = net.collect_params()
    assert list(after.keys()) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {name: p.data().handle.value for name, p in after.items()} == data
    assert net._collect_params_with_prefix() == before_by_path


@ways
def test_a_trainer_made_before_goes_on(device, rng, convert, source, target):
    x = [array(rng.normal(size=SHAPE), device) for _ in range(6)]
    results = []
    for switch in (False, True):
        net = Residual(source, prefix="net_")
        mx.random.seed(3)
        ready(net, device).hybridize()
        net(x[0])
        options = {"learning_rate": 0.01, "momentum": 0.9}
        trainer = gluon.Trainer(net.collect_params(), "sgd", options)
        for i, batch in enumerate(x):
            if switch and i == 3:
                convert(net)
            result = train(net, batch, trainer)
        results.append(result)
        assert (type(net.first) is target) == switch
    for a, e in zip(results[1], results[0]):
        for name in e if isinstance(e, dict) else [...]:
            np.testing.assert_allclose(a[name], e[name], rtol=1e-5, atol=1e-9)


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


@ways
@pytest.mark.parametrize(
    "flags", [{}, {"static_alloc": True}, {"static_alloc": True, "static_shape": True}], ids=str
)
def test_hybridize_flags_stay(device, rng, convert, source, target, flags):
    net = ready(Residual(source), device)
    net.hybridize(**flags)
    net.first.hybridize(False)
    before = [(layer._active, list(layer._flags)) for layer in [net, net.body, *layers(net)]]
    convert(net)
    after = [(layer._active, list(layer._flags)) for layer in [net, net.body, *layers(net)]]
    assert after == before
    assert [active for active, _ in after] == [True, True, False, True, True, True, True]
    assert net(array(rng.normal(size=SHAPE), device)).shape == SHAPE


@ways
def test_hooks_and_attributes_of_the_user_stay(device, rng, convert, source, target):
    layer = ready(source(in_channels=3), device)
    seen = []
    handle = layer.register_forward_hook(lambda block, _, y: seen.append((block, y.shape)))
    layer.register_forward_pre_hook(lambda block, _: seen.append(type(block)))
    layer.remark = {"stage": 3}
    convert(layer)
    x = array(rng.normal(size=SHAPE), device)
    layer(x)
    assert seen == [target, (layer, SHAPE)]
    assert layer.remark == {"stage": 3}
    handle.detach()
    layer(x)
    assert seen[2:] == [target]


@ways
def test_copies_and_pickles_of_a_converted_net(device, rng, convert, source, target):
    x = array(rng.normal(size=SHAPE), device, "float32")
    net = ready(nn.HybridSequential(), device, "float32")
    net.add(source(in_channels=3, epsilon=0.5))
    convert(net)
    net.initialize(ctx=device)
    loaded = pickle.loads(pickle.dumps(source(in_channels=3)))
    convert(loaded)
    copied = copy.deepcopy(net)
    assert type(copied[0]) is type(loaded) is target
    assert type(pickle.loads(pickle.dumps(loaded))) is target
    expected = net(x).asnumpy()
    net[0].running_mean.set_data(mx.nd.ones(3))
    np.testing.assert_array_equal(copied(x).asnumpy(), expected)
    assert np.abs(net(x).asnumpy() - expected).max() > 0.1


@ways
def test_each_device_keeps_its_statistics(device, second_device, convert, source, target):
    layer = source(in_channels=1)
    layer.initialize(ctx=[device, second_device])
    with autograd.train_mode():
        for value, context in ((1.0, device), (5.0, second_device)):
            with autograd.record():
                y = layer(mx.nd.full((2, 1, 3), value, ctx=context))
            y.backward()
    mx.nd.waitall()
    convert(layer)
    for value, context in ((1.0, device), (5.0, second_device)):
        mean = layer.running_mean.data(context)
        np.testing.assert_allclose(mean.asnumpy(), 0.1 * value, rtol=1e-6)
        expected = (value - 0.1 * value) / np.sqrt(0.9 + 1e-5)
        y = layer(mx.nd.full((2, 1, 3), value, ctx=context))
        np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-5)


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


# Options

OPTIONS = [
    {},
    {"axis": -1, "momentum": 0.25, "epsilon": 1e-3, "in_channels": 5},
    {"center": False},
    {"scale": False},
    {"center": False, "scale": False, "use_global_stats": True},
    {"momentum": 0, "epsilon": 0},
    {"beta_initializer": "ones", "gamma_initializer": "zeros"},
    {"running_mean_initializer": "ones", "running_variance_initializer": mx.init.Constant(4)},
    {"gamma_initializer": mx.init.Normal(0.5), "prefix": "my_"},
    {"gamma_initializer": None, "beta_initializer": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
@pytest.mark.parametrize("source", [nn.BatchNorm, nn.BatchNormReLU])
def test_options_of_the_built_in_survive_a_round_trip(device, rng, source, options):
    layer = source(**options)
    layer.hybridize(static_alloc=True)
    before = state(layer)
    to_scratch(layer)
    ours = ScratchBatchNormReLU if source is nn.BatchNormReLU else ScratchBatchNorm
    assert type(layer) is ours
    given = {name: value for name, value in options.items() if value is not None}
    expected = ours(**given)
    assert layer._kwargs == expected._kwargs
    assert vars(layer).keys() == vars(expected).keys()
    assert repr(layer) == repr(expected)
    _, report = to_builtin(layer, report=True)
    assert len(report.converted) == 1
    assert state(layer) == before


@pytest.mark.parametrize("options", [o for o in OPTIONS if None not in o.values()], ids="+".join)
@pytest.mark.parametrize("source", [ScratchBatchNorm, ScratchBatchNormReLU])
def test_our_options_survive_a_round_trip(device, rng, source, options):
    layer = source(**options)
    layer.hybridize(static_alloc=True)
    before, text = state(layer), repr(layer)
    to_builtin(layer)
    theirs = nn.BatchNormReLU if source is ScratchBatchNormReLU else nn.BatchNorm
    assert type(layer) is theirs
    expected = theirs(**options)
    assert layer._kwargs == expected._kwargs
    assert vars(layer).keys() == vars(expected).keys()
    assert layer.fuse_relu == expected.fuse_relu
    to_scratch(layer)
    assert state(layer) == before
    assert repr(layer) == text


@pytest.mark.parametrize("options", OPTIONS[:-1], ids="+".join)
def test_a_converted_layer_initializes_like_a_new_one(device, options):
    layer, new = nn.BatchNorm(**options), nn.BatchNorm(**options)
    to_scratch(layer)
    for one in (layer, new):
        mx.random.seed(5)
        one.initialize(ctx=device)
        one(mx.nd.ones((2, 5, 5), ctx=device))
    for name in ("gamma", "beta", "running_mean", "running_var"):
        a, b = getattr(layer, name), getattr(new, name)
        np.testing.assert_array_equal(a.data().asnumpy(), b.data().asnumpy())
        assert a.grad_req == b.grad_req


def test_grad_req_stays(device):
    layer = ready(nn.BatchNorm(in_channels=3), device)
    layer.gamma.grad_req, layer.beta.grad_req = "add", "null"
    to_scratch(layer)
    assert (layer.gamma.grad_req, layer.beta.grad_req) == ("add", "null")
    assert layer._kwargs["center"] is True  # not trained, but added
    to_builtin(layer)
    assert (layer.gamma.grad_req, layer.beta.grad_req) == ("add", "null")


def test_options_edited_in_kwargs_are_the_ones_converted():
    layer = nn.BatchNorm()
    layer._kwargs.update(use_global_stats=1, eps=0.5, momentum=0.125, fix_gamma=True, axis=2)
    to_scratch(layer)
    expected = ScratchBatchNorm(
        axis=2, momentum=0.125, epsilon=0.5, scale=False, use_global_stats=True
    )
    assert layer._kwargs == expected._kwargs


def test_a_layer_with_fused_relu_keeps_it(device, rng):
    layer = nn.BatchNorm(in_channels=3)
    layer.fuse_relu = True
    layer.initialize(ctx=device)
    values = rng.normal(size=SHAPE).astype("float32")
    x = array(values, device, "float32")
    expected = np.maximum(values / np.sqrt(1 + layer._kwargs["eps"]), 0)
    assert expected.min() == 0
    if device.device_type == "cpu":  # MXNet has no such operator for GPUs
        np.testing.assert_allclose(layer(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)
    before = state(layer)
    to_scratch(layer)
    assert type(layer) is ScratchBatchNormReLU
    np.testing.assert_allclose(layer(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)
    to_builtin(layer)
    assert state(layer) == before


# What is left alone


class Tuned(nn.BatchNorm):
    """Differs in its constructor only."""

    def __init__(self, **kwargs):
        super().__init__(momentum=0.5, **kwargs)
        self.tuned = True


class OurTuned(ScratchBatchNorm):
    def __init__(self, **kwargs):
        super().__init__(momentum=0.5, **kwargs)
        self.tuned = True


class Doubled(nn.BatchNorm):
    def hybrid_forward(self, F, x, **parameters):
        return 2 * super().hybrid_forward(F, x, **parameters)


class DoubledSync(SyncBatchNorm):
    def __init__(self):
        super().__init__(num_devices=1)

    def hybrid_forward(self, F, x, **parameters):
        return 2 * super().hybrid_forward(F, x, **parameters)


class Mixin:
    def reset(self):
        self.running_mean.set_data(mx.nd.zeros_like(self.running_mean.data()))


class Resettable(Mixin, nn.BatchNorm):
    pass


class Slotted(nn.BatchNorm):
    __slots__ = ("extra",)


class Median(ScratchBatchNorm):
    def statistics(self, F, view, running_mean, running_var, select):
        return super().statistics(F, view, running_mean, running_var, select)


@pytest.mark.parametrize(
    ("convert", "back", "source", "target"),
    [
        (to_scratch, to_builtin, Tuned, ScratchBatchNorm),
        (to_scratch, to_builtin, _BatchNorm, ScratchBatchNorm),
        (to_builtin, to_scratch, OurTuned, nn.BatchNorm),
    ],
)
def test_a_harmless_subclass_comes_back(convert, back, source, target):
    layer = source(in_channels=3)
    before = state(layer)
    convert(layer)
    assert type(layer) is target
    assert layer._kwargs["momentum"] == before[1]["_kwargs"]["momentum"]
    back(layer)
    assert state(layer) == before


@pytest.mark.parametrize(
    ("convert", "layer", "reason"),
    [
        (to_scratch, DoubledSync, "has hybrid_forward of its own"),
        (to_scratch, Doubled, "has hybrid_forward of its own"),
        (to_scratch, Resettable, "has reset of its own"),
        (to_scratch, Slotted, "has __slots__, extra of its own"),
        (to_builtin, Median, "has statistics of its own"),
    ],
)
def test_layers_that_do_something_else_are_reported(convert, layer, reason):
    net = nn.HybridSequential()
    net.add(layer(), nn.BatchNorm() if convert is to_scratch else ScratchBatchNorm())
    before = state(net[0])
    _, report = convert(net, report=True)
    (entry,) = report.skipped
    assert (entry.path, entry.name, entry.kind) == ("0", net[0].name, type(net[0]).__name__)
    assert reason in entry.text
    assert state(net[0]) == before
    assert [done.path for done in report.converted] == ["1"]
    lines = str(report).splitlines()
    assert lines[0] == "1 converted, 1 skipped"
    assert lines[1].strip() == f"skipped 0 [{entry.name}] {entry.kind}: {entry.text}"


def test_a_layer_with_a_forward_set_on_the_instance_is_reported():
    layer = nn.BatchNorm()
    layer.hybrid_forward = lambda F, x, **parameters: x
    _, report = to_scratch(layer, report=True)
    assert "has hybrid_forward of its own" in report.skipped[0].text
    assert type(layer) is nn.BatchNorm


def test_a_layer_with_operator_options_is_reported():
    layer = nn.BatchNorm()
    layer._kwargs["output_mean_var"] = True
    _, report = to_scratch(layer, report=True)
    assert "output_mean_var" in report.skipped[0].text
    assert type(layer) is nn.BatchNorm


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
    assert sorted(freeze(net, report=True)[1]) == sorted([*names, "1"])


@pytest.mark.parametrize("hybrid", [False, True])
def test_an_offset_that_stops_counting_is_noted(device, rng, hybrid):
    """With center=False the built-in adds beta all the same."""
    layer = ready(nn.BatchNorm(in_channels=3, center=False), device)
    if hybrid:
        layer.hybridize()
    assert to_scratch(layer, report=True)[1].notes == to_builtin(layer, report=True)[1].notes == ()
    layer.beta.set_data(mx.nd.array([0, 2, 0], dtype="float64"))
    x = array(rng.normal(size=SHAPE), device)
    before = layer(x).asnumpy()
    _, report = to_scratch(layer, report=True)
    assert "beta is not 0" in report.notes[0].text
    shift = before - layer(x).asnumpy()
    np.testing.assert_allclose(shift[:, 1], 2, rtol=1e-12)
    np.testing.assert_allclose(shift[:, [0, 2]], 0, atol=1e-12)
    _, report = to_builtin(layer, report=True)
    assert "beta is not 0" in report.notes[0].text
    np.testing.assert_array_equal(layer(x).asnumpy(), before)


# Bad input


def edited(**options):
    layer = ScratchBatchNorm()
    layer._kwargs.update(options)
    return layer


def broken(**options):
    layer = nn.BatchNorm()
    layer._kwargs.update(options)
    return layer


@pytest.mark.parametrize(
    ("convert", "bad", "error", "text"),
    [
        (to_builtin, lambda: ScratchBatchNorm(momentum=None), ValueError, "momentum=None"),
        (to_builtin, lambda: edited(momentum=None), ValueError, "momentum=None"),
        (to_builtin, lambda: edited(unbiased_variance=True), ValueError, "unbiased_variance=True"),
        (to_builtin, lambda: edited(center=False), ValueError, "center was changed to False"),
        (to_scratch, lambda: broken(momentum=1.5), ValueError, "momentum must be .* got 1.5"),
        (to_scratch, lambda: broken(momentum=None), ValueError, "momentum must be .* got None"),
        (to_scratch, lambda: broken(eps=-1), ValueError, "epsilon must be .* got -1"),
        (to_scratch, lambda: broken(axis=1.5), TypeError, "axis must be .* got 1.5"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_changes(
    device, convert, bad, error, text
):
    good = nn.BatchNorm if convert is to_scratch else ScratchBatchNorm
    net = nn.HybridSequential()
    net.add(good(in_channels=3), nn.HybridSequential(), good(in_channels=3))
    net[1].add(nn.Dense(3), bad())
    before = [state(block) for block in (net, net[0], net[1], net[1][1], net[2])]
    with pytest.raises(error, match=rf"^1\.1 \({net[1][1].name}\) cannot be converted: .*{text}"):
        convert(net)
    assert [state(block) for block in (net, net[0], net[1], net[1][1], net[2])] == before


@pytest.mark.parametrize("function", [to_scratch, to_builtin, freeze, unfreeze])
@pytest.mark.parametrize("net", [None, "resnet", nn.BatchNorm, []])
def test_only_blocks_are_accepted(function, net):
    with pytest.raises(TypeError, match="net must be a gluon Block, got"):
        function(net)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("convert", [to_scratch, to_builtin])
def test_who_wants_no_report_gets_the_net_and_is_warned(convert):
    class Own(nn.BatchNorm if convert is to_scratch else ScratchBatchNorm):
        def hybrid_forward(self, F, x, *parameters, **named):
            return x

    net = nn.HybridSequential()
    net.add(nn.Dense(2))
    assert convert(net) is net  # and no warning, which would be an error here
    net.add(Own())
    with pytest.warns(UserWarning, match="hybrid_forward of its own") as warned:
        assert convert(net) is net
    assert warned[0].filename == __file__
    assert convert(net, report=True)[0] is net
    with pytest.raises(TypeError, match="report must be True or False"):
        convert(net, report=1)
