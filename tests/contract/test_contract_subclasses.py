"""What is built upon the layer: the one with ReLU, and variants that override a method."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import mxnet as mx
import numpy as np
import pytest
from contract_cases import every_mode
from helpers import CLOSE, STATE, array, in_mode, infer, random_values, set_values, train_forward
from mxnet import autograd
from mxnet.gluon import nn

SHAPE = (6, 3, 4)


# ScratchBatchNormReLU


@every_mode
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_relu_layer_equals_relu_of_the_layer(device, rng, tmp_path, mode, dtype):
    values = random_values(rng, 3)
    nets = []
    for k, layer_class in enumerate((ScratchBatchNorm, ScratchBatchNormReLU)):
        layer = layer_class(in_channels=3)
        layer.initialize(ctx=device)
        layer.cast(dtype)
        set_values(layer, values)
        net = nn.HybridSequential()
        net.add(layer)
        if k == 0:
            net.add(nn.Activation("relu"))
        folder = tmp_path / str(k)
        folder.mkdir()
        nets.append(in_mode(net, mode, array(np.zeros(SHAPE), device, dtype), folder))
    for training in (True, False, True):
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        results = []
        for net in nets:
            data = array(x, device, dtype)
            data.attach_grad()
            with autograd.record(train_mode=training):
                y = net(data)
            y.backward(array(dy, device, dtype))
            mx.nd.waitall()
            results.append([y, data.grad])
            for name in STATE:
                parameters = [p for n, p in net.collect_params().items() if n.endswith("_" + name)]
                results[-1].append(parameters[0].data())
                if name in ("gamma", "beta"):
                    results[-1].append(parameters[0].grad())
        assert (results[0][0].asnumpy() == 0).mean() > 0.02
        for a, b in zip(*results):
            np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), **CLOSE[dtype])


def test_relu_layer_is_one_of_the_family():
    layer = ScratchBatchNormReLU(in_channels=3)
    assert isinstance(layer, ScratchBatchNorm)
    assert list(layer._collect_params_with_prefix()) == list(STATE)


# Variants


class Shifted(ScratchBatchNorm):
    """Normalizes around a mean that is 1 too large."""

    def statistics(self, F, view, running_mean, running_var, select):
        found = super().statistics(F, view, running_mean, running_var, select)
        return found._replace(centred=found.centred - 1)


class Newest(ScratchBatchNorm):
    """Averages the newest statistic and the average before it, whatever momentum is."""

    def update(self, F, running, batch, count):
        return (running + batch) / 2


class Doubled(ScratchBatchNorm):
    """Twice the output."""

    def transform(self, *args, **kwargs):
        return 2 * super().transform(*args, **kwargs)


@every_mode
@pytest.mark.parametrize("variant", [Shifted, Newest, Doubled])
def test_a_variant_overrides_one_method(build, rng, mode, variant):
    subject = build(mode, SHAPE, layer_class=variant, epsilon=1e-3)
    oracle = subject.oracle
    oracle.momentum = 0.5 if variant is Newest else oracle.momentum
    for training in (True, False, True):
        x = rng.normal(size=SHAPE)
        var = x.var(axis=(0, 2)) if training else oracle.running_var
        expected = oracle.train(x) if training else oracle.infer(x)
        if variant is Shifted:
            expected = expected - (oracle.gamma / np.sqrt(var + 1e-3))[:, None]
        if variant is Doubled:
            expected = 2 * expected
        actual = train_forward(subject, x) if training else infer(subject, x)
        np.testing.assert_allclose(actual, expected, **CLOSE["float64"])
        subject.check_statistics(rtol=1e-12)
