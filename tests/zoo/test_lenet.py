"""LeNet: its structure, its initial values, and parity with the same net from the built-in."""

from __future__ import annotations

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity import compare
from scratchbn.parity.oracle_layer import OracleLayer

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet import autograd, gluon
from mxnet.gluon import nn

from models.lenet import initialize, lenet

NORMS = [ScratchBatchNorm, nn.BatchNorm, ScratchBatchNormReLU, nn.LayerNorm, nn.InstanceNorm, None]
LAYERS_BEFORE_NORMS = [nn.Conv2D, nn.Conv2D, nn.Dense]


def name_of(norm):
    return getattr(norm, "__name__", "none")


def ready(norm, device, init="tutorial", **options):
    net = lenet(norm, prefix="lenet_", **options)
    initialize(net, init, device)
    net(mx.nd.zeros((1, 1, 28, 28), ctx=device))
    return net


def test_shapes_are_those_of_the_tutorial(device):
    net = ready(ScratchBatchNorm, device)
    shapes = []
    x = mx.nd.zeros((64, 1, 28, 28), ctx=device)
    for layer in net:
        x = layer(x)
        shapes.append((type(layer), x.shape))
    assert shapes == [
        (nn.Conv2D, (64, 20, 26, 26)),
        (ScratchBatchNorm, (64, 20, 26, 26)),
        (nn.Activation, (64, 20, 26, 26)),
        (nn.AvgPool2D, (64, 20, 13, 13)),
        (nn.Conv2D, (64, 50, 9, 9)),
        (ScratchBatchNorm, (64, 50, 9, 9)),
        (nn.Activation, (64, 50, 9, 9)),
        (nn.AvgPool2D, (64, 50, 4, 4)),
        (nn.Flatten, (64, 800)),
        (nn.Dense, (64, 128)),
        (ScratchBatchNorm, (64, 128)),
        (nn.Activation, (64, 128)),
        (nn.Dense, (64, 10)),
    ]


@pytest.mark.parametrize("norm", NORMS[:-1], ids=name_of)
def test_any_norm_layer_follows_each_layer_but_the_last(norm, device):
    # InstanceNorm wants a spatial axis, so only the structure of its net can be looked at.
    layers = list(lenet(norm))
    places = [i for i, layer in enumerate(layers) if type(layer) is norm]
    assert [type(layers[i - 1]) for i in places] == LAYERS_BEFORE_NORMS
    assert all(isinstance(layers[i + 1], nn.Activation) for i in places)


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("norm", [n for n in NORMS if n is not nn.InstanceNorm], ids=name_of)
def test_it_trains_with_any_norm_layer_and_without(norm, hybridize, device):
    net = ready(norm, device, init="xavier")
    if hybridize:
        net.hybridize()
    x = mx.nd.random.uniform(shape=(8, 1, 28, 28), ctx=device)
    with autograd.record():
        loss = gluon.loss.SoftmaxCrossEntropyLoss()(net(x), mx.nd.arange(8, ctx=device))
    loss.backward()
    for name, parameter in net.collect_params(".*weight").items():
        assert np.abs(parameter.grad().asnumpy()).max() > 0, name


def test_without_norms_there_are_none():
    assert not [p for p in lenet(None).collect_params() if "norm" in p]
    assert len(list(lenet(None))) == len(list(lenet())) - 3


def test_options_reach_the_norm_layers(device):
    net = ready(ScratchBatchNorm, device, norm_kwargs={"momentum": 0.5}, classes=3)
    assert net(mx.nd.zeros((2, 1, 28, 28), ctx=device)).shape == (2, 3)
    norms = [layer for layer in net if isinstance(layer, ScratchBatchNorm)]
    assert len(norms) == 3
    assert all("momentum=0.5" in repr(layer) for layer in norms)


def test_parameters_have_the_names_of_the_builtin_net(device, tmp_path):
    scratch, builtin = ready(ScratchBatchNorm, device), ready(nn.BatchNorm, device)
    assert list(scratch.collect_params()) == list(builtin.collect_params())
    assert {n: p.shape for n, p in scratch.collect_params().items()} == {
        n: p.shape for n, p in builtin.collect_params().items()
    }
    # save_parameters uses structural names, "1.gamma"; load_parameters refuses any other set.
    builtin.save_parameters(str(tmp_path / "builtin.params"))
    scratch.load_parameters(str(tmp_path / "builtin.params"), ctx=device)
    for name, parameter in builtin.collect_params().items():
        loaded = scratch.collect_params()[name].data().asnumpy()
        np.testing.assert_array_equal(loaded, parameter.data().asnumpy(), err_msg=name)


def values_ending(net, ending):
    return np.concatenate(
        [p.data().asnumpy().ravel() for n, p in net.collect_params().items() if n.endswith(ending)]
    )


@pytest.mark.parametrize("norm", [ScratchBatchNorm, nn.BatchNorm], ids=name_of)
def test_tutorial_initialization(norm, device):
    net = ready(norm, device)
    for ending, mean in (("weight", 0), ("bias", 0), ("gamma", 1), ("beta", 0)):
        drawn = values_ending(net, ending)
        # Five standard errors of the mean and of the standard deviation of a normal sample.
        error = 5 * 0.01 / np.sqrt(drawn.size)
        assert abs(drawn.mean() - mean) < error, ending
        assert abs(drawn.std() - 0.01) < error / np.sqrt(2), ending
    assert set(values_ending(net, "running_mean")) == {0}
    assert set(values_ending(net, "running_var")) == {1}


def test_xavier_initialization(device):
    net = ready(ScratchBatchNorm, device, init="xavier")
    weight = net.collect_params()["lenet_dense0_weight"].data().asnumpy()
    bound = np.sqrt(2.24 / ((800 + 128) / 2))
    assert 0.99 * bound < np.abs(weight).max() <= bound
    assert set(values_ending(net, "bias")) == set(values_ending(net, "beta")) == {0}
    assert set(values_ending(net, "gamma")) == {1}


def test_initialize_replaces_values_and_follows_the_seed(device):
    mx.random.seed(3)
    net = ready(ScratchBatchNorm, device)
    first = values_ending(net, "weight")
    initialize(net, "tutorial", device)
    assert not np.array_equal(values_ending(net, "weight"), first)
    mx.random.seed(3)
    assert np.array_equal(values_ending(ready(nn.BatchNorm, device), "weight"), first)


@pytest.mark.parametrize("mode", ["eager", "hybridized"])
def test_a_float64_step_is_that_of_the_builtin(mode, device, rng):
    nets = []
    for norm in (ScratchBatchNorm, nn.BatchNorm):
        net = lenet(norm, prefix="lenet_")
        net.cast("float64")
        initialize(net, "xavier", device)
        net(array(np.zeros((1, 1, 28, 28)), device))
        nets.append(net)
    for name, parameter in nets[0].collect_params().items():
        positive = name.endswith(("gamma", "running_var"))
        shape = parameter.shape
        value = rng.uniform(0.5, 2, shape) if positive else rng.normal(0, 0.1, shape)
        for net in nets:
            net.collect_params()[name].set_data(array(value, device))
    if mode == "hybridized":
        nets[0].hybridize()

    images, labels = rng.uniform(size=(16, 1, 28, 28)), rng.integers(0, 10, 16)
    scores, gradients = [], []
    for net in nets:
        x = array(images, device)
        x.attach_grad()
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.001})
        with autograd.record():
            y = net(x)
            loss = gluon.loss.SoftmaxCrossEntropyLoss()(y, array(labels, device))
        loss.backward()
        scores.append(y.asnumpy())
        gradients.append(x.grad.asnumpy())
        trainer.step(1)
    mx.nd.waitall()

    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
    for name, parameter in nets[0].collect_params().items():
        # The built-in holds its momentum in float32.
        close = 1e-6 if "running" in name else 1e-10
        expected = nets[1].collect_params()[name].data().asnumpy()
        np.testing.assert_allclose(
            parameter.data().asnumpy(), expected, rtol=close, atol=close, err_msg=name
        )


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"norm_layer": "batch"}, TypeError, "norm_layer must be a layer class or None.*'batch'"),
        ({"norm_layer": None, "norm_kwargs": {"axis": 1}}, TypeError, "norm_kwargs.*norm_layer"),
        ({"classes": 2.5}, TypeError, "classes must be an integer, got 2.5"),
        ({"classes": True}, TypeError, "classes must be an integer, got True"),
        ({"classes": 0}, ValueError, "classes must be at least 1, got 0"),
        ({"norm_kwargs": {"momentum": 2}}, ValueError, "momentum"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        lenet(**options)


def test_a_bad_initialization_changes_nothing(device):
    net = ready(ScratchBatchNorm, device)
    before = values_ending(net, "weight")
    with pytest.raises(ValueError, match="init must be one of tutorial, xavier, got 'zeros'"):
        initialize(net, "zeros", device)
    assert np.array_equal(values_ending(net, "weight"), before)


def test_a_step_in_float64_is_that_of_the_formulas(rng):
    """Beside the same net with the NumPy oracle: where the built-in's float32 momentum is off."""
    images = rng.normal(0.1, 0.3, (16, 1, 28, 28))
    labels = mx.nd.array(rng.integers(0, 10, 16))
    loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    report = compare(
        lenet(ScratchBatchNorm),
        lenet(OracleLayer),  # which is always eager
        images,
        steps=1,
        modes=("eager",),
        loss=lambda y: loss(y, labels),
    )
    assert report, report
    worst = report.worst(lambda row: row.kind)
    assert worst["statistic"].absolute < 1e-14
    assert worst["output"].absolute < 1e-12
    assert worst["parameter gradient"].absolute < 1e-10
