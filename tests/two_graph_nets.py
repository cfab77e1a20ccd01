"""Nets that run one graph in training and another in inference, and what they are compared with."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, use_inference_graph
from scratchbn.backends.inference.two_graphs import TwoGraphs

import helpers
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

SHAPE = (4, 3, 6, 6)
CLOSE = {
    "float16": {"rtol": 1e-2, "atol": 1e-2},
    "float32": {"rtol": 2e-5, "atol": 2e-5},
    "float64": {"rtol": 1e-10, "atol": 1e-10},
}
FLAGS = {
    "plain": {},
    "static_alloc": {"static_alloc": True},
    "static_shape": {"static_alloc": True, "static_shape": True},
}
flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


class Wired(HybridBlock):
    """Norms in places of all kinds: shared, behind a shared convolution, with a fused relu."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.first = nn.HybridSequential()
            self.first.add(ScratchBatchNorm(in_channels=3), nn.Conv2D(8, 1))
            self.more = nn.Conv2D(8, 3, padding=1, use_bias=False, in_channels=8)
            self.shared = ScratchBatchNorm(in_channels=8)
            self.own = ScratchBatchNormReLU(scale=False, epsilon=1e-2, in_channels=8)
            self.dense = nn.Dense(16)
            self.last = ScratchBatchNorm(center=False)

    def hybrid_forward(self, F, x):
        y = self.first(x)
        z = self.shared(self.more(self.shared(y)))
        return self.last(self.dense(z + self.own(y) + y))


def ready(net, rng, shape=SHAPE, dtype="float32", ctx=None):
    """Give a net random norms; returns an input of that shape."""
    net.initialize(mx.init.Xavier(magnitude=3), ctx=ctx)
    net.cast(dtype)
    x = mx.nd.array(rng.normal(size=shape), dtype=dtype)
    net(x)
    for layer in layers(net):
        helpers.set_values(layer, helpers.random_values(rng, layer.gamma.shape[0]))
    return x


def layers(net):
    found = []
    net.apply(lambda b: found.append(b) if isinstance(b, ScratchBatchNorm) else None)
    return found


def conv_net(*more):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3), ScratchBatchNorm(), nn.Activation("relu"), *more)
    return net


def seconds(net):
    """The second graphs of a net: those that its latest graph has built."""
    op = net._cached_op
    return [s for s in op._seconds.values() if s is not None] if isinstance(op, TwoGraphs) else []


def own_graph(net, x):
    with use_inference_graph(False):
        return net(x).asnumpy()


def eagerly(net, x):
    """What the layers compute one by one, from stock operators."""
    active = net._active
    net.hybridize(False, clear=False)
    y = net(x).asnumpy()
    assert active
    for block in (net, *_all(net)):
        block._active = True
    return y


def _all(net):
    found = []
    net.apply(found.append)
    return [block for block in found if isinstance(block, HybridBlock)]


def check(net, x, dtype="float32", second=True):
    """The net's own call, compared with the eager layers; it ran a second graph or none."""
    y = net(x)
    assert bool(seconds(net)) == second
    np.testing.assert_allclose(y.asnumpy(), eagerly(net, x), **CLOSE[dtype])
    return y.asnumpy()


def two_steps(net, x, weights, grad_req, lean):
    """All that two training steps leave, by the leaner graph or by the one that was traced."""
    net.collect_params(".*(gamma|beta|weight|bias)").setattr("grad_req", grad_req)
    if not lean:
        net._cached_op._lean = net._cached_op._own
    for _ in range(2):
        with autograd.record():
            y = net(x)
        y.backward(weights)
    mx.nd.waitall()
    parameters = net._collect_params_with_prefix()
    found = {"x": x.grad, "y": y, **{name: p.data() for name, p in parameters.items()}}
    found |= {f"{n} gradient": p.grad() for n, p in parameters.items() if p.grad_req != "null"}
    return {name: array.asnumpy() for name, array in found.items()}
