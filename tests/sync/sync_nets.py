"""Nets over several devices beside the same on one; imported in child processes (`work space`)."""

from scratchbn import ScratchSyncBatchNorm  # isort: skip
from scratchbn import ScratchBatchNorm

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

FORMS = {
    "eager": None,
    "hybrid": {},
    "static_alloc": {"static_alloc": True},
    "static_shape": {"static_alloc": True, "static_shape": True},
}


def build(norm, devices, form="eager", prefix="net_", **options):
    """Two convolutions, each with a norm layer; a third use of the second layer where asked."""
    mx.random.seed(1)
    net = nn.HybridSequential(prefix=prefix)
    with net.name_scope():
        net.add(nn.Conv2D(4, 3, padding=1, in_channels=2), norm(in_channels=4, **options))
        net.add(nn.Activation("relu"), nn.Conv2D(3, 1, in_channels=4))
        net.add(norm(in_channels=3, **options), nn.GlobalAvgPool2D())
    net.cast("float64")
    net.initialize(mx.init.Normal(0.5), ctx=devices)
    if FORMS[form] is not None:
        net.hybridize(**FORMS[form])
    return net


class Pair:
    """A net over devices that share `sizes` of a batch, and the same net on one device."""

    def __init__(self, sizes, form="eager", calls=1, seed=0, **options):
        self.sizes, self.calls = sizes, calls
        self.devices = [mx.cpu(i) for i in range(len(sizes))]
        self.shared = build(ScratchSyncBatchNorm, self.devices, form, **options)
        options.pop("timeout", None)
        self.single = build(ScratchBatchNorm, [mx.cpu(0)], **options)
        self.rng = np.random.default_rng(seed)
        settings = "sgd", {"learning_rate": 0.1}
        self.trainers = [
            gluon.Trainer(net.collect_params(), *settings) for net in (self.shared, self.single)
        ]

    def wait(self, seconds):
        """Set how long devices wait; None: as long as the environment says."""
        for layer in self.shared:
            if isinstance(layer, ScratchSyncBatchNorm):
                layer.options["timeout"] = seconds

    def batch(self):
        n = sum(self.sizes)
        return self.rng.normal(3, 2, (n, 2, 4, 5)), self.rng.normal(size=(n, 3, 1, 1))

    def parts(self, array):
        pieces = np.split(array, np.cumsum(self.sizes)[:-1])
        return [mx.nd.array(p, c, "float64") for p, c in zip(pieces, self.devices)]

    def loss(self, net, x, w):
        return sum((net(x + i) * w).sum() for i in range(self.calls))

    def step(self, backward="loop", between=lambda i: None):
        """Train a step on both; return the greatest difference there is."""
        X, W = self.batch()
        xs, ws = self.parts(X), self.parts(W)
        for x in xs:
            x.attach_grad()
        losses = []
        with autograd.record():
            for i, (x, w) in enumerate(zip(xs, ws)):
                losses.append(self.loss(self.shared, x, w))
                between(i)
        if backward == "together":
            autograd.backward(losses)
        else:
            for loss in losses[:: -1 if backward == "reversed" else 1]:
                loss.backward()
        x, w = (mx.nd.array(a, dtype="float64") for a in (X, W))
        x.attach_grad()
        with autograd.record():
            loss = self.loss(self.single, x, w)
        loss.backward()
        found = [(sum(v.asscalar() for v in losses), loss.asscalar())]
        found.append((np.concatenate([v.grad.asnumpy() for v in xs]), x.grad.asnumpy()))
        ours = self.shared.collect_params()
        for name, p in self.single.collect_params().items():
            if p.grad_req == "null":
                found += [(v.asnumpy(), p.data().asnumpy()) for v in ours[name].list_data()]
            else:
                found.append((sum(g.asnumpy() for g in ours[name].list_grad()), p.grad().asnumpy()))
        for trainer in self.trainers:
            trainer.step(1)
        return float(max(np.abs(a - b).max() for a, b in found))
