"""Freezing and unfreezing the layers of either family."""

import copy

import scratchbn.convert
import scratchbn.freezing
from scratchbn import ScratchBatchNorm, freeze, unfreeze

import mxnet as mx
import numpy as np
import pytest
from helpers import array, untrained
from mxnet import gluon
from mxnet.gluon import nn
from mxnet.gluon.contrib.nn import SyncBatchNorm
from norm_nets import CLOSE, SHAPE, Residual, check_equal, kinds, layers, ready, state, train, ways


class Variant(ScratchBatchNorm):
    def statistics(self, F, view, running_mean, running_var, select):
        return super().statistics(F, view, running_mean, running_var, select)


flags = pytest.mark.parametrize("mode", ["eager", "hybrid"])


def trained_values(net):
    mx.nd.waitall()
    return {n: p.data().asnumpy() for n, p in net.collect_params().items()}


@kinds
@flags
@pytest.mark.parametrize("parameters", [False, True])
def test_a_frozen_net_trains_with_fixed_statistics(device, rng, layer_class, mode, parameters):
    net = ready(Residual(layer_class), device)
    x = array(rng.normal(size=SHAPE) + 2, device)
    if mode == "hybrid":
        net.hybridize()
    train(net, x)
    inferred = net(x).asnumpy()
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    assert len(freeze(net, parameters, report=True)[1]) == 5
    before = trained_values(net)
    y, gradients, after = train(net, x, trainer)
    np.testing.assert_allclose(y, inferred, **CLOSE)
    frozen = ("running_mean", "running_var", *(("gamma", "beta") if parameters else ()))
    for name in before:
        is_frozen = name.endswith(frozen) or name == net.body[1].gamma.name
        assert (before[name] == after[name]).all() == is_frozen, name
    assert any(name.endswith("beta") for name in gradients) != parameters

    assert len(unfreeze(net, report=True)[1]) == 5
    before = trained_values(net)
    y, _, after = train(net, x, trainer)
    assert np.abs(y - inferred).max() > 0.1
    for name in before:
        is_frozen = name == net.body[1].gamma.name
        if np.abs(after[name]).max() > 1e-12:  # else the mean of data that is normalized already
            assert (before[name] == after[name]).all() == is_frozen, name


@kinds
def test_unfreeze_restores_exactly_what_was(device, layer_class):
    net = nn.HybridSequential()
    net.add(layer_class(in_channels=3), layer_class(in_channels=3, use_global_stats=True))
    net.add(layer_class(in_channels=3, center=False), layer_class(in_channels=3, scale=False))
    net.add(layer_class(in_channels=3))
    net[0].gamma.grad_req = "add"
    net[4].gamma.grad_req = net[4].beta.grad_req = "null"
    before = [state(layer) for layer in net]
    assert freeze(net, parameters=True, report=True)[1] == ("0", "1", "2", "3", "4")
    for layer in net:
        assert layer._kwargs["use_global_stats"] is True
        assert layer.gamma.grad_req == layer.beta.grad_req == "null"
    assert unfreeze(net, report=True)[1] == ("0", "1", "2", "3", "4")
    assert [state(layer) for layer in net] == before
    assert not [name for p in net.collect_params().values() for name in vars(p) if "before" in name]


@kinds
def test_to_freeze_or_unfreeze_twice_is_safe(device, layer_class):
    net = nn.HybridSequential()
    net.add(layer_class(in_channels=3), nn.Dense(2))
    before = state(net[0])
    assert unfreeze(net, report=True)[1] == ()
    assert state(net[0]) == before
    assert freeze(net, report=True)[1] == ("0",)
    once = state(net[0])
    assert freeze(net, report=True)[1] == ()
    assert state(net[0]) == once
    assert freeze(net, parameters=True, report=True)[1] == ("0",)
    assert net[0].gamma.grad_req == "null"
    assert freeze(net, report=True)[1] == ()
    assert net[0].gamma.grad_req == "null"
    assert unfreeze(net, report=True)[1] == ("0",)
    assert unfreeze(net, report=True)[1] == ()
    assert state(net[0]) == before


@kinds
def test_shared_parameters_are_restored(device, layer_class):
    first = layer_class(in_channels=3)
    net = nn.HybridSequential()
    net.add(first, first, layer_class(in_channels=3, params=first.params))
    freeze(net[2], parameters=True)
    freeze(net, parameters=True)
    assert first.gamma.grad_req == "null"
    unfreeze(net)
    assert first.gamma.grad_req == first.beta.grad_req == "write"
    assert not any(layer._kwargs["use_global_stats"] for layer in net)


@kinds
def test_a_part_can_be_frozen(device, rng, layer_class):
    net = nn.HybridSequential()
    for _ in range(2):
        net.add(nn.HybridSequential())
        net[-1].add(nn.Conv2D(3, 1), layer_class())
    assert freeze(net[0], report=True)[1] == ("1",)
    ready(net, device)
    x = array(rng.normal(size=SHAPE), device)
    train(net, x)
    means = [part[1].running_mean.data().asnumpy() for part in net]
    assert not means[0].any()
    assert means[1].all()


@kinds
def test_a_layer_alone_can_be_frozen(device, layer_class):
    layer = layer_class(in_channels=3)
    assert freeze(layer, report=True)[1] == ("",)
    assert unfreeze(layer, report=True)[1] == ("",)


@kinds
def test_a_copy_is_unfrozen_by_itself(device, rng, layer_class):
    net = ready(Residual(layer_class), device)
    net(array(rng.normal(size=SHAPE), device))
    with untrained():
        freeze(net, parameters=True)
    copied = copy.deepcopy(net)
    unfreeze(copied)
    assert copied.first.gamma.grad_req == "write"
    assert net.first.gamma.grad_req == "null"
    assert [layer._kwargs["use_global_stats"] for layer in layers(copied)] == [False] * 5
    assert [layer._kwargs["use_global_stats"] for layer in layers(net)] == [True] * 5


@ways
def test_a_frozen_net_converts_and_unfreezes(device, rng, convert, source, target):
    net = ready(Residual(source), device)
    x = array(rng.normal(size=SHAPE), device)
    train(net, x)
    net.hybridize()
    freeze(net, parameters=True)
    expected = train(net, x)
    convert(net)
    assert all(layer._kwargs["use_global_stats"] for layer in layers(net))
    check_equal(train(net, x), expected)
    assert len(unfreeze(net, report=True)[1]) == 5
    assert not any(layer._kwargs["use_global_stats"] for layer in layers(net))
    assert net.first.gamma.grad_req == "write"
    before = trained_values(net)
    train(net, x)
    name = net.first.running_mean.name
    assert np.abs(trained_values(net)[name] - before[name]).max() > 1e-3


def test_synchronized_layers_freeze_too(device):
    layer = SyncBatchNorm(in_channels=3, num_devices=1)
    assert freeze(layer, parameters=True, report=True)[1] == ("",)
    assert layer._kwargs["use_global_stats"] is True
    assert layer.beta.grad_req == "null"
    unfreeze(layer)
    assert layer._kwargs["use_global_stats"] is False
    assert layer.beta.grad_req == "write"


def test_variants_freeze_too(device, rng):
    layer = ready(Variant(in_channels=3), device)
    with untrained():
        freeze(layer)
    train(layer, array(rng.normal(size=SHAPE), device))
    assert not layer.running_mean.data().asnumpy().any()


def test_freeze_checks_its_flag():
    layer = ScratchBatchNorm()
    with pytest.raises(TypeError, match="parameters must be True or False, got 'all'"):
        freeze(layer, parameters="all")
    assert layer._kwargs["use_global_stats"] is False


def test_the_name_is_always_that_of_the_function():
    assert scratchbn.freeze is scratchbn.convert.freeze is scratchbn.freezing.freeze
    assert scratchbn.unfreeze is scratchbn.convert.unfreeze is scratchbn.freezing.unfreeze
