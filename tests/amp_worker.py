"""A process that AMP is on in, as it cannot be turned off: amp_worker.py float16|bfloat16 WHAT."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import scratchbn
from scratchbn import ScratchBatchNorm
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
from helpers import BFLOAT16
from mxnet import autograd, gluon
from mxnet.contrib import amp
from mxnet.gluon import nn

SHAPE = (8, 4, 3, 3)


def wide(array):
    """An array of 16 bits as float64; MXNet gives no NumPy array of bfloat16."""
    return narrow(array, "float32").asnumpy().astype("float64")


def narrow(array, dtype):
    """A copy of another type; with AMP of bfloat16 on, NDArray.astype writes nothing into it."""
    return mx.nd.amp_cast(array, dtype=dtype)


def clip():
    """What AMP is told to cast: exact on these data, and a CPU has it in both types."""
    return nn.HybridLambda(lambda F, x: F.clip(x, a_min=-1e4, a_max=1e4))


def cast_by_amp(dtype, graph):
    """A layer behind an operator that AMP casts to 16 bits.

    Arrays on a CPU are not cast to float16 by AMP, only those of graphs: the net does it itself.
    """
    first = clip()
    if dtype == np.float16 and not graph:
        first = nn.HybridLambda(lambda F, x: F.cast(x, dtype="float16"))
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(first, ScratchBatchNorm(in_channels=4))
    net.initialize()
    return net


def one_step(dtype, hybridize, graph, grad_req):
    """The worst deviations of a training step from the oracle's, in units of what it compares."""
    rng = np.random.default_rng(0)
    x = mx.nd.array(rng.normal(100, 30, SHAPE))
    dy = narrow(mx.nd.array(rng.normal(size=SHAPE)), dtype)
    net = cast_by_amp(dtype, graph)
    layer = net[1]
    layer.collect_params().setattr("grad_req", grad_req)
    for p in (layer.running_mean, layer.running_var):
        p.grad_req = "null"
    layer.gamma.set_data(mx.nd.array([1, 2, -1, 0.5]))
    hybridize(net)
    x.attach_grad()
    times = 2 if grad_req == "add" else 1
    for _ in range(times):
        with autograd.record():
            y = net(x)
        y.backward(dy)
    oracle = OracleBatchNorm.fresh(4)
    oracle.gamma[:] = [1, 2, -1, 0.5]
    seen = wide(narrow(x, dtype))
    steps = [oracle.train_step(seen, wide(dy)) for _ in range(times)]
    inference = net(x)
    got = {
        "y": (wide(y), steps[-1].y),
        "dx": (wide(x.grad), steps[-1].dx),
        "dgamma": (wide(layer.gamma.grad()), sum(s.dgamma for s in steps)),
        "dbeta": (wide(layer.beta.grad()), sum(s.dbeta for s in steps)),
        "mean": (wide(layer.running_mean.data()), oracle.running_mean),
        "var": (wide(layer.running_var.data()), oracle.running_var),
        "inferred": (wide(inference), oracle.infer(seen)),
    }
    deviations = {k: float(np.abs(a - b).max() / np.abs(b).max()) for k, (a, b) in got.items()}
    held = {p.data().dtype.__name__ for p in layer.collect_params().values()}
    return {
        **deviations,
        "type": str(y.dtype == dtype and inference.dtype == dtype),
        "held": " ".join(sorted(held)),
    }


class Scale(gluon.HybridBlock):
    """A weight per channel, in an operator that a CPU has in 16 bits."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.weight = self.params.get("weight", shape=(1, width, 1, 1))

    def hybrid_forward(self, F, x, weight):
        return F.broadcast_mul(x, weight)


def classifier():
    net = nn.HybridSequential(prefix="net_")
    to_float32 = gluon.nn.HybridLambda(lambda F, x: F.cast(x, dtype="float32"))
    with net.name_scope():
        net.add(Scale(4), clip(), ScratchBatchNorm(), nn.HybridLambda("relu"), clip())
        net.add(ScratchBatchNorm(momentum=None), to_float32, nn.GlobalAvgPool2D(), nn.Flatten())
    mx.random.seed(1)
    np.random.seed(1)
    net.initialize(mx.init.Uniform(1))
    return net


def losses_of_training(hybridize, with_amp):
    """The losses of a few steps, and the statistics after them."""
    rng = np.random.default_rng(5)
    net = classifier()
    hybridize(net)
    net(mx.nd.zeros(SHAPE))
    trainer = gluon.Trainer(
        net.collect_params(), "sgd", {"learning_rate": 0.05}, update_on_kvstore=False
    )
    if with_amp:
        amp.init_trainer(trainer)
        scaler = trainer._amp_loss_scaler
        scaler._loss_scale = scaler._next_loss_scale = 128.0
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    losses = []
    for _ in range(6):
        x, labels = mx.nd.array(rng.normal(1, 2, SHAPE)), mx.nd.array(rng.integers(0, 4, SHAPE[0]))
        with autograd.record():
            value = loss(net(x), labels)
            if with_amp:
                with amp.scale_loss(value, trainer) as scaled:
                    autograd.backward(scaled)
        if not with_amp:
            value.backward()
        trainer.step(len(x))
        losses.append(float(value.mean().asscalar()))
    mx.nd.waitall()
    return losses, [net[i].running_var.data().asnumpy().tolist() for i in (2, 5)]


def kinds():
    """How nets are run, by name."""
    static = {"static_alloc": True, "static_shape": True}
    for backend, flags in (
        ("portable", None),
        ("portable", {}),
        ("native", {}),
        ("native", static),
    ):
        name = f"{backend} {'eager' if flags is None else 'graph' + ' static' * bool(flags)}"

        def hybridize(net, backend=backend, flags=flags):
            scratchbn.set_backend(backend)
            if flags is not None:
                net.hybridize(**flags)

        yield name, hybridize


def exported(dtype):
    """What a file says of a net that was traced under AMP, and computes here, without casts."""
    x = mx.nd.array(np.random.default_rng(0).normal(3, 2, SHAPE))
    scratchbn.set_backend("auto")
    net = cast_by_amp(dtype, graph=True)
    net.hybridize()
    with autograd.train_mode():
        net(x)
    expected = OracleBatchNorm(
        gamma=np.ones(4),
        beta=np.zeros(4),
        running_mean=wide(net[1].running_mean.data()),
        running_var=wide(net[1].running_var.data()),
    ).infer(wide(x))
    with tempfile.TemporaryDirectory() as directory:
        stem = str(Path(directory, "net"))
        net.export(stem)
        text = Path(f"{stem}-symbol.json").read_text()
        loaded = gluon.SymbolBlock.imports(f"{stem}-symbol.json", ["data"], f"{stem}-0000.params")
        y = loaded(x)
    off = float(np.abs(wide(y) - expected).max())
    return {
        "casts": [op for op in ("amp_cast", "amp_multicast", "16") if f'"{op}' in text],
        "type": y.dtype.__name__,
        "off": off,
        "live off": float(np.abs(wide(net(x)) - expected).max()),
    }


def wrapped():
    """Whether the functions that AMP wrapped are still its own."""
    return all(f.__globals__ is vars(amp.amp) for f in (mx.sym.clip, mx.nd.clip))


def inferred(dtype):
    """The types in a net whose dense layers no CPU may have in `dtype`: of outputs and weights."""
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Dense(4), ScratchBatchNorm(), nn.Activation("relu"), nn.Dense(3))
        net.add(ScratchBatchNorm(momentum=None), nn.Dense(2))
    net.initialize()
    symbol = net(mx.sym.var("data"))
    internals = symbol.get_internals()
    arguments, outputs, states = internals.infer_type(data="float32")
    named = dict(zip(internals.list_outputs(), outputs))
    return {
        "norms": [str(named[f"net_batchnorm{i}_fwd_output"] == dtype) for i in (0, 1)],
        "held": sorted({np.dtype(t).name for t in (*arguments, *states)}),
        "writes": sorted(symbol.list_auxiliary_states()),
    }


def main(name, what):
    dtype = BFLOAT16 if name == "bfloat16" else np.dtype(name)
    results = {}
    if what == "types":
        amp.init(name)
        results["types"] = inferred(dtype)
    else:
        results["float32"] = losses_of_training(lambda net: None, with_amp=False)
        amp.init(name, target_precision_ops=["clip"])
        for kind, run in kinds():
            results[kind] = {
                req: one_step(dtype, run, "graph" in kind, req) for req in ("write", "add")
            }
            results[kind]["training"] = losses_of_training(run, with_amp=True)
        results["exported"] = exported(dtype)
        results["wrapped"] = wrapped()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
