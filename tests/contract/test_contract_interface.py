"""The layer's interface is the built-in's: arguments, options read at call time, `repr`, hooks."""

import inspect

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import mxnet as mx
import numpy as np
import pytest
from contract_cases import both_layers, every_block_mode
from helpers import CLOSE, STATE, array, check_step, in_mode, take_step, train_forward
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

SHAPE = (6, 3, 4)


# The interface


@both_layers
def test_arguments_have_the_names_order_and_defaults_of_the_built_in(layer_class):
    ours = inspect.signature(layer_class).parameters
    theirs = inspect.signature(nn.BatchNorm).parameters
    named = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(named)] == named
    for name in named:
        assert ours[name].default == theirs[name].default
        assert ours[name].kind is ours[name].POSITIONAL_OR_KEYWORD
    assert ours["unbiased_variance"].kind is inspect.Parameter.KEYWORD_ONLY
    assert ours["unbiased_variance"].default is False
    assert issubclass(layer_class, HybridBlock)


def test_positional_arguments_arrive_where_the_built_in_puts_them(device):
    arguments = (-1, 0.8, 1e-3, False, False, True, "ones", "zeros", "ones", "zeros", 4)
    ours, theirs = ScratchBatchNorm(*arguments), nn.BatchNorm(*arguments)
    for layer in (ours, theirs):
        layer.initialize(ctx=device)
    for key in theirs._kwargs:
        assert ours._kwargs[key] == theirs._kwargs[key], key
    for name in STATE:
        a, b = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(a.data().asnumpy(), b.data().asnumpy())
        assert a.grad_req == b.grad_req


def test_fits_as_norm_layer_of_a_factory(device):
    """The calls GluonCV makes: keywords, a `norm_kwargs` of its own, a `name_scope`."""

    def block(norm_layer=nn.BatchNorm, norm_kwargs=None):
        net = nn.HybridSequential()
        with net.name_scope():
            net.add(nn.Conv2D(4, 1))
            net.add(norm_layer(epsilon=1e-3, momentum=0.1, **(norm_kwargs or {})))
            net.add(norm_layer(gamma_initializer="zeros", in_channels=4, prefix="last_"))
        return net

    options = {"use_global_stats": True}
    net = block(ScratchBatchNorm, options)
    net.initialize(ctx=device)
    assert net(mx.nd.ones((2, 3, 4, 4), ctx=device)).shape == (2, 4, 4, 4)
    assert options == {"use_global_stats": True}
    assert isinstance(net[1], ScratchBatchNorm)
    suffix = [name.split("_", 1)[1] for name in net.collect_params()]
    theirs = [name.split("_", 1)[1] for name in block().collect_params()]
    assert suffix == theirs


# `_kwargs` is read at call time


@pytest.mark.parametrize("mode", ["eager", "hybrid", "nested"])
def test_use_global_stats_can_be_switched_in_kwargs(build, rng, mode):
    """What GluonCV's `freeze_bn` does; a graph sees it once its cache is cleared."""
    subject = build(mode, SHAPE)
    for frozen in (False, True, False, True):
        subject.layer._kwargs["use_global_stats"] = frozen
        if mode != "eager":
            subject.net.hybridize()
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        expected = (subject.oracle.infer_step if frozen else subject.oracle.train_step)(x, dy)
        check_step(take_step(subject, x, dy), expected)
        subject.check_statistics(rtol=1e-12)


@pytest.mark.parametrize("mode", ["eager", "hybrid", "nested"])
@pytest.mark.parametrize(
    ("key", "attribute", "value"),
    [("momentum", "momentum", 0.25), ("eps", "epsilon", 0.5), ("axis", "axis", -1)],
)
def test_other_options_can_be_changed_in_kwargs(build, rng, mode, key, attribute, value):
    shape = (6, 3, 3)
    subject = build(mode, shape)
    for change in (False, True):
        if change:
            subject.layer._kwargs[key] = value
            setattr(subject.oracle, attribute, value)
            if mode != "eager":
                subject.net.hybridize()
        x, dy = rng.normal(size=shape), rng.normal(size=shape)
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics(rtol=1e-12)


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_fix_gamma_can_be_changed_in_kwargs(build, rng, mode):
    subject = build(mode, SHAPE)
    subject.layer._kwargs["fix_gamma"] = True
    subject.net._clear_cached_op()
    subject.oracle.scale = False
    x = rng.normal(size=SHAPE)
    np.testing.assert_allclose(
        train_forward(subject, x), subject.oracle.train(x), **CLOSE["float64"]
    )


# repr

OPTION_SETS = [
    {},
    {"axis": -1, "momentum": 0.25, "epsilon": 1e-3, "in_channels": 3},
    {"momentum": None, "unbiased_variance": True},
    {"center": False, "scale": False, "use_global_stats": True},
    {"beta_initializer": "ones", "gamma_initializer": "zeros", "in_channels": 3},
    {"running_mean_initializer": "ones", "running_variance_initializer": "zeros"},
    {
        "gamma_initializer": mx.init.Constant(2.5),
        "beta_initializer": mx.init.Constant(-0.5),
        "running_mean_initializer": mx.init.Constant(0.25),
        "running_variance_initializer": mx.init.Constant(4),
        "in_channels": 3,
    },
]


@both_layers
@pytest.mark.parametrize("options", OPTION_SETS)
def test_repr_rebuilds_the_layer(device, rng, layer_class, options):
    original = layer_class(**options)
    text = repr(original)
    names = {"ScratchBatchNorm": ScratchBatchNorm, "ScratchBatchNormReLU": ScratchBatchNormReLU}
    rebuilt = eval(text, {**names, "mx": mx, "mxnet": mx})
    assert type(rebuilt) is layer_class
    assert repr(rebuilt) == text
    assert rebuilt._kwargs == original._kwargs
    x = array(rng.normal(size=(3, 3)), device, "float32")
    results = []
    for layer in (original, rebuilt):
        layer.initialize(ctx=device)
        with autograd.train_mode():
            trained = layer(x).asnumpy()
        mx.nd.waitall()
        state = [getattr(layer, name).data().asnumpy() for name in STATE]
        requests = [getattr(layer, name).grad_req for name in STATE]
        results.append([trained, layer(x).asnumpy(), *state, requests])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


@both_layers
def test_repr_shows_every_option(layer_class):
    text = repr(layer_class(momentum=0.75, epsilon=0.125, in_channels=7))
    assert text.startswith(layer_class.__name__ + "(")
    for name, parameter in inspect.signature(layer_class).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD and name not in ("prefix", "params"):
            assert f"{name}=" in text, name
    assert "momentum=0.75" in text
    assert "epsilon=0.125" in text
    assert "in_channels=7" in text


def test_repr_knows_the_channels_after_the_first_call(device):
    layer = ScratchBatchNorm()
    layer.initialize(ctx=device)
    assert "in_channels=0" in repr(layer)
    layer(mx.nd.ones((2, 5), ctx=device))
    assert "in_channels=5" in repr(layer)


def test_repr_follows_kwargs():
    layer = ScratchBatchNorm()
    layer._kwargs["use_global_stats"] = True
    assert "use_global_stats=True" in repr(layer)


# Hooks and debugging aids of Gluon


@every_block_mode
def test_forward_hooks_see_input_and_output(device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    seen = []
    layer.register_forward_hook(lambda block, inputs, output: seen.append((inputs[0], output)))
    net = in_mode(layer, mode)
    y = net(mx.nd.ones((2, 3), ctx=device))
    assert seen
    if mode != "nested":
        assert seen[-1][1] is y


def test_summary_counts_the_parameters(device, capsys):
    net = nn.HybridSequential()
    net.add(nn.Dense(4, in_units=2), ScratchBatchNorm(in_channels=4))
    net.initialize(ctx=device)
    net.summary(mx.nd.ones((3, 2), ctx=device))
    assert "ScratchBatchNorm" in capsys.readouterr().out
