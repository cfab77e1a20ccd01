"""Exported models as files, and whether two of them train alike."""

import json

from scratchbn import ScratchBatchNorm

import mxnet as mx
import numpy as np
from inference_files import randomize
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn

LAYERS = {"builtin": nn.BatchNorm, "scratch": ScratchBatchNorm}
OTHER = {"builtin": "scratch", "scratch": "builtin"}


def export(net, prefix, rng, shape, dtype="float64"):
    """Give a net non-trivial norms, and write it; returns symbol and parameters as files have."""
    net.initialize(mx.init.Xavier(magnitude=3))
    net.cast(dtype)
    net.hybridize()
    x = mx.nd.array(rng.normal(size=shape), dtype=dtype)
    net(x)
    randomize(net, rng)
    net.export(str(prefix))
    return mx.sym.load(f"{prefix}-symbol.json"), mx.nd.load(f"{prefix}-0000.params")


def operators(symbol):
    return [n["op"] for n in json.loads(symbol.tojson())["nodes"] if n["op"] != "null"]


def steps(prefix, data, unused=(), count=3):
    """Train an imported model; returns outputs and gradients, and the parameters at the end."""
    net = SymbolBlock.imports(f"{prefix}-symbol.json", ["data"], f"{prefix}-0000.params")
    parameters = net.collect_params()
    for name in unused:
        parameters[name].grad_req = "null"
    trained = {n: p for n, p in parameters.items() if p.grad_req != "null"}
    trainer = mx.gluon.Trainer(trained, "sgd", {"learning_rate": 0.05})
    seen = []
    for i in range(count):
        x = data[i]
        x.attach_grad()
        with autograd.record():
            y = net(x)
            loss = mx.nd.sin(y).mean()
        loss.backward()
        mx.nd.waitall()
        seen += [y.asnumpy(), x.grad.asnumpy(), *(p.grad().asnumpy() for p in trained.values())]
        trainer.step(1)
    mx.nd.waitall()
    inferred = net(data[0]).asnumpy()
    return seen, {n: p.data().asnumpy() for n, p in parameters.items()}, inferred


def check_training_agrees(one, other, shape, rng, unused=()):
    data = [mx.nd.array(rng.normal(size=shape), dtype="float64") for _ in range(3)]
    (seen, state, inferred), (seen2, state2, inferred2) = (
        steps(prefix, data, unused) for prefix in (one, other)
    )
    assert len(seen) == len(seen2)
    for a, b in zip(seen, seen2):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert state.keys() == state2.keys()
    for name in state.keys() - set(unused):
        np.testing.assert_allclose(state[name], state2[name], rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(inferred, inferred2, rtol=1e-5, atol=1e-5)


def sequential(*layers):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(*[layer() for layer in layers])
    return net
