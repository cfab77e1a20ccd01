"""The options of a layer, and those of a subclass, in a conversion there and back."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, to_builtin, to_scratch

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet.gluon import nn
from mxnet.gluon.nn.basic_layers import _BatchNorm
from norm_nets import SHAPE, ready, state

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


class Tuned(nn.BatchNorm):
    """Differs in its constructor only."""

    def __init__(self, **kwargs):
        super().__init__(momentum=0.5, **kwargs)
        self.tuned = True


class OurTuned(ScratchBatchNorm):
    def __init__(self, **kwargs):
        super().__init__(momentum=0.5, **kwargs)
        self.tuned = True


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
