"""The paper's net: its structure, its input, its initial values, and parity with the built-in."""

from __future__ import annotations

from scratchbn import ScratchBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet import autograd, gluon
from mxnet.gluon import nn

from models.mlp import binarize, initialize, mlp

cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()


def ready(norm, device, dtype="float32", **options):
    net = mlp(norm, prefix="mlp_", **options)
    net.cast(dtype)
    initialize(net, ctx=device)
    net(mx.nd.zeros((1, 784), ctx=device, dtype=dtype))
    return net


def test_the_layers_are_those_of_the_paper(device):
    hidden = [(nn.Dense, 100), (ScratchBatchNorm, 100), (nn.Activation, 100)]
    x, found = mx.nd.zeros((60, 784), ctx=device), []
    for layer in ready(ScratchBatchNorm, device):
        x = layer(x)
        found.append((type(layer), x.shape[1]))
    assert found == [*hidden * 3, (nn.Dense, 10)]
    assert all(layer._act_type == "sigmoid" for layer in mlp() if isinstance(layer, nn.Activation))


def test_a_bias_stands_where_beta_does_not(device):
    with_norms = [
        name for name in ready(ScratchBatchNorm, device).collect_params() if "bias" in name
    ]
    without = [name for name in ready(None, device).collect_params() if "bias" in name]
    assert with_norms == ["mlp_dense3_bias"]
    assert without == [f"mlp_dense{i}_bias" for i in range(4)]


def test_a_bias_before_a_norm_would_change_nothing(device, rng):
    x, offset = rng.normal(size=(6, 784)), rng.normal(size=100)
    net = ready(ScratchBatchNorm, device, "float64")
    with autograd.train_mode():
        before = net[0](array(x, device))
        plain = net[1](before).asnumpy()
        shifted = net[1](before + array(offset, device)).asnumpy()
    np.testing.assert_allclose(shifted, plain, rtol=1e-10, atol=1e-10)


def test_pixels_above_half_of_full_scale_are_one():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    pixels = binarize(images)
    assert (pixels.shape, pixels.dtype) == ((1, 256), np.float32)
    np.testing.assert_array_equal(pixels[0], [0] * 128 + [1] * 128)
    assert binarize(np.zeros((0, 28, 28), np.uint8)).shape == (0, 784)


def test_initial_values(device):
    net = ready(ScratchBatchNorm, device)
    weights = np.concatenate(
        [p.data().asnumpy().ravel() for p in net.collect_params(".*weight").values()]
    )
    # Five standard errors of the mean and of the standard deviation of a normal sample.
    error = 5 * 0.1 / np.sqrt(weights.size)
    assert abs(weights.mean()) < error
    assert abs(weights.std() - 0.1) < error / np.sqrt(2)
    for ending, value in (("bias", 0), ("gamma", 1), ("beta", 0)):
        for name, parameter in net.collect_params(f".*{ending}").items():
            assert (parameter.data().asnumpy() == value).all(), name


def test_nets_of_one_seed_start_from_the_same_weights(device):
    nets = []
    for norm in (ScratchBatchNorm, None):
        mx.random.seed(5)
        nets.append(ready(norm, device))
    for name, parameter in nets[0].collect_params(".*weight").items():
        other = nets[1].collect_params()[name]
        np.testing.assert_array_equal(parameter.data().asnumpy(), other.data().asnumpy())


def test_a_step_is_that_of_the_net_with_the_builtin(device, rng):
    x, y = rng.integers(0, 2, (60, 784)), rng.integers(0, 10, 60)
    results = []
    for norm in (ScratchBatchNorm, nn.BatchNorm):
        mx.random.seed(5)
        net = ready(norm, device, "float64")
        net.hybridize()
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.5})
        with autograd.record():
            loss = cross_entropy(net(array(x, device)), array(y, device))
        loss.backward()
        trainer.step(60)
        mx.nd.waitall()
        results.append({n: p.data().asnumpy() for n, p in net.collect_params().items()})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        # The built-in holds its momentum in float32.
        close = 1e-6 if "running" in name else 1e-10
        np.testing.assert_allclose(value, results[1][name], rtol=close, atol=close, err_msg=name)


def test_a_net_can_share_the_parameters_of_another(device):
    net = ready(ScratchBatchNorm, device)
    twin = mlp(norm_kwargs={"momentum": 1.0}, prefix=net.prefix, params=net.collect_params())
    shared = net.collect_params()
    assert all(shared[name] is parameter for name, parameter in twin.collect_params().items())
    assert len(list(twin.collect_params())) == len(list(shared))


def test_another_net_can_be_asked_for():
    options = {"hidden": (5, 6), "activation": "relu", "use_bias": True}
    layers = list(mlp(norm_kwargs={"epsilon": 1e-3}, **options))
    kinds = [nn.Dense, ScratchBatchNorm, nn.Activation]
    assert [type(layer) for layer in layers] == [*kinds * 2, nn.Dense]
    assert [layers[i]._units for i in (0, 3, 6)] == [5, 6, 10]
    assert all(layers[i].bias is not None for i in (0, 3, 6))
    assert [layers[i]._act_type for i in (2, 5)] == ["relu", "relu"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"norm_layer": "batch"}, TypeError, "norm_layer must be a layer class or None.*'batch'"),
        ({"norm_layer": None, "norm_kwargs": {"axis": 1}}, TypeError, "norm_kwargs.*norm_layer"),
        ({"classes": 2.5}, TypeError, "classes must be an integer, got 2.5"),
        ({"classes": 0}, ValueError, "classes must be at least 1, got 0"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        mlp(**options)


@pytest.mark.parametrize("sigma", [0, -1.0, float("nan"), float("inf")])
def test_a_bad_sigma_changes_nothing(sigma, device):
    net = ready(None, device)
    before = net[0].weight.data().asnumpy()
    with pytest.raises(ValueError, match="sigma must be positive and finite, got"):
        initialize(net, sigma, device)
    np.testing.assert_array_equal(net[0].weight.data().asnumpy(), before)


def test_images_that_are_not_bytes():
    with pytest.raises(TypeError, match="images must be a numpy array of uint8, got float64"):
        binarize(np.zeros((1, 28, 28)))
    with pytest.raises(TypeError, match="images must be a numpy array of uint8, got list"):
        binarize([[0, 255]])
    with pytest.raises(ValueError, match=r"images must have at least 2 axes, got shape \(3,\)"):
        binarize(np.zeros(3, np.uint8))
