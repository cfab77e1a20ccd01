"""Nets with norms that are not trivial, written for inference, and whether the files compute it."""

import json
from pathlib import Path

from scratchbn import ScratchBatchNorm
from scratchbn.deploy import export_inference, load_params, load_symbol, write_inference_symbol

import helpers
import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import SymbolBlock, nn

EXACT = 2e-6
NORMS = {"scratch": ScratchBatchNorm, "builtin": nn.BatchNorm}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def sequential(*layers):
    net = nn.HybridSequential()
    net.add(*layers)
    return net


def randomize(net, rng):
    """Give the norms parameters and statistics that no default could be mistaken for."""
    for name, parameter in net.collect_params().items():
        values = helpers.random_values(rng, parameter.shape[0])
        key = next((key for key in values if name.endswith("_" + key)), None)
        if key is not None:
            parameter.set_data(mx.nd.array(values[key], dtype=parameter.dtype))


def prepared(net, rng, *inputs, dtype="float32"):
    """Initialize, run and randomize a net; returns its outputs in inference, and the inputs."""
    net.initialize(mx.init.Xavier(magnitude=3))
    net.cast(dtype)
    arrays = [mx.nd.array(rng.normal(size=shape), dtype=dtype) for shape in inputs]
    net(*arrays)
    randomize(net, rng)
    return net(*arrays), *arrays


def load(prefix, *names):
    return SymbolBlock.imports(
        f"{prefix}-symbol.json", list(names) or ["data"], f"{prefix}-0000.params"
    )


def inferring(symbol, params, folder, **options):
    """Write a model, and an inference symbol to it; return the model of the second symbol."""
    symbol, params = load_symbol(symbol), load_params(params)
    path = folder / "inferring-symbol.json"
    path.write_text(symbol.tojson(remove_amp_cast=False), "utf-8")
    mx.nd.save(str(folder / "inferring-0000.params"), params)
    return mx.sym.load(write_inference_symbol(path, **options)), params


def operators(prefix):
    nodes = json.loads(Path(f"{prefix}-symbol.json").read_text())["nodes"]
    return [node["op"] for node in nodes if node["op"] != "null"]


def difference(y, z):
    """The largest difference, relative to the largest value."""
    y, z = (v.asnumpy().astype(np.float64) for v in (y, z))
    assert y.shape == z.shape
    return np.abs(y - z).max() / np.abs(y).max()


def exported(net, prefix, y, *inputs, names=(), exact=EXACT, **options):
    """Export a net, check what the files compute, and return the report and the operators."""
    report = export_inference(net, prefix, *inputs, **options)
    assert difference(y, load(prefix, *names)(*inputs)) < exact
    return report, operators(prefix)
