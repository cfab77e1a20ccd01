"""Symbols as nets, written as ONNX and run."""

import json

from scratchbn.deploy import export_onnx

import mxnet as mx
import numpy as np
import onnxruntime
from mxnet.gluon import SymbolBlock

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def unstated(symbol):
    """The symbol as a file would have it that states nothing which is the operator's default."""
    document = json.loads(symbol.tojson())
    for node in document["nodes"]:
        if node["op"] == "null":
            continue
        known = mx.operator.get_operator_arguments(node["op"])
        for name, kind in zip(known.names, known.types):
            default = kind.rpartition("default=")[2].strip("'")
            default = {"[]": "()"}.get(default, default)
            if kind.startswith("boolean"):
                default = {"0": "False", "1": "True"}.get(default, default)
            if "default=" in kind and node.get("attrs", {}).get(name) == default:
                del node["attrs"][name]
    return mx.sym.load_json(json.dumps(document))


def renamed(symbol, name):
    """The symbol with one name for all its operators."""
    document = json.loads(symbol.tojson())
    for node in document["nodes"]:
        if node["op"] != "null":
            node["name"] = name
    return mx.sym.load_json(json.dumps(document))


def as_net(symbol, rng, **shapes):
    """A SymbolBlock with random parameters, run once; inputs by name."""
    block = SymbolBlock(symbol, [mx.sym.var(name) for name in shapes])
    block.initialize()
    arguments, _, auxiliary = symbol.infer_shape(**shapes)
    names = [*symbol.list_arguments(), *symbol.list_auxiliary_states()]
    parameters = block.collect_params()
    for name, shape in zip(names, [*arguments, *auxiliary]):
        if name not in shapes:
            positive = name.endswith(("var", "gamma"))
            values = rng.uniform(0.5, 2, shape) if positive else rng.normal(size=shape) / 2
            parameters[name].shape = shape
            parameters[name].set_data(mx.nd.array(values))
    outputs_of(block, *(np.zeros(shape) for shape in shapes.values()))
    return block


def outputs_of(net, *arrays):
    outputs = net(*map(mx.nd.array, arrays))
    return [y.asnumpy() for y in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]


def check_export(net, path, example, *others, **options):
    """Export a net, and compare the file with it on the example and on other inputs."""
    report = export_onnx(net, path, *map(mx.nd.array, example), **options)
    running = session(path)
    for arrays in (example, *others):
        feed = {}
        for entry in running.get_inputs():
            number = entry.name.removeprefix("data")
            feed[entry.name] = np.asarray(arrays[int(number or 0)], "float32")
        results = running.run(None, feed)
        for y, z in zip(outputs_of(net, *arrays), results):
            assert (y.shape, y.dtype) == (z.shape, z.dtype)
            np.testing.assert_allclose(z, y, **CLOSE)
    return report
