"""A net with norm layers in places of all kinds, its training step, and the state of a layer."""

import copy

from scratchbn import ScratchBatchNorm, to_builtin, to_scratch

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

SHAPE = (6, 3, 5, 5)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
kinds = pytest.mark.parametrize("layer_class", [nn.BatchNorm, ScratchBatchNorm])
ways = pytest.mark.parametrize(
    ("convert", "source", "target"),
    [(to_scratch, nn.BatchNorm, ScratchBatchNorm), (to_builtin, ScratchBatchNorm, nn.BatchNorm)],
    ids=["to_scratch", "to_builtin"],
)


class Residual(HybridBlock):
    """A net with layers in attributes and in containers Gluon knows nothing of."""

    def __init__(self, layer_class, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.conv = nn.Conv2D(3, 1)
            self.first = layer_class(momentum=0.7)
            self.body = nn.HybridSequential()
            with self.body.name_scope():
                self.body.add(nn.Conv2D(3, 1), layer_class(scale=False, epsilon=1e-3))
            self.more = [layer_class(in_channels=3), (layer_class(in_channels=3),)]
            self.named = {"deep": [{"last": layer_class(in_channels=3)}]}
            for block in (self.more[0], self.more[1][0], self.named["deep"][0]["last"]):
                self.register_child(block)

    def hybrid_forward(self, F, x):
        y = self.body(F.tanh(self.first(self.conv(x))))
        return self.named["deep"][0]["last"](self.more[1][0](self.more[0](y))) + x


def layers(net):
    return [net.first, net.body[1], net.more[0], net.more[1][0], net.named["deep"][0]["last"]]


def ready(net, device, dtype="float64"):
    net.initialize(mx.init.Normal(0.5), ctx=device)
    net.cast(dtype)
    return net


def train(net, x, trainer=None):
    """Output, gradients by name and statistics by name of a training step, as NumPy arrays."""
    with autograd.record():
        y = net(x)
        loss = (y * mx.nd.sin(3 * x + y)).sum()
    loss.backward()
    if trainer is not None:
        trainer.step(len(x))
    mx.nd.waitall()
    stored = net.collect_params().items()
    return (
        y.asnumpy(),
        {n: p.grad(x.ctx).asnumpy() for n, p in stored if p.grad_req != "null"},
        {n: p.data(x.ctx).asnumpy() for n, p in stored},
    )


def check_equal(actual, expected):
    np.testing.assert_allclose(actual[0], expected[0], **CLOSE)
    for a, e in zip(actual[1:], expected[1:]):
        assert a.keys() == e.keys()
        for name in e:
            # The built-in rounds its momentum to float32, in float64 too.
            close = {"rtol": 1e-6, "atol": 1e-12} if "running" in name else CLOSE
            np.testing.assert_allclose(a[name], e[name], err_msg=name, **close)


def state(layer):
    """All a layer is made of; equal before and after a round trip."""
    attributes = {
        name: copy.copy(value) if isinstance(value, (dict, list)) else value
        for name, value in vars(layer).items()
        if not name.startswith("_cached")
    }
    requests = {name: p.grad_req for name, p in layer._reg_params.items()}
    return type(layer), attributes, requests
