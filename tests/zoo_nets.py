"""GluonCV's nets as cases, and steps with them that a layer's net and the built-in's share."""

import json
from dataclasses import dataclass, field

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet import autograd
from mxnet.gluon import nn

from models import zoo

IMAGE = (2, 3, 64, 64)
FASTSCNN = {"base_size": 128, "crop_size": 128, "height": 128, "width": 128}


@dataclass
class Case:
    """A net, the shape of its input, the options it is built with and how many layers it has."""

    name: str
    shape: tuple
    layers: int
    options: dict = field(default_factory=dict)

    def build(self, norm_layer):
        net = zoo.get_model(self.name, norm_layer=norm_layer, **self.options)
        net.apply(adapt)
        return net


REQUIRED = [
    Case("cifar_resnet20_v1", (4, 3, 16, 16), 21),
    Case("cifar_resnet20_v2", (4, 3, 16, 16), 20),
    Case("resnet18_v1", IMAGE, 20),
    Case("resnet50_v1b", IMAGE, 53),
    Case("mobilenet0.5", IMAGE, 27),
    Case("mobilenetv2_0.25", (4, 3, 64, 64), 52),
    Case("densenet121", IMAGE, 121),
    Case("squeezenet1.0", IMAGE, 0),
    Case("se_resnet18_v1", IMAGE, 20),
    Case("fastscnn_citys", (4, 3, 128, 128), 45, FASTSCNN),
    Case("center_net_resnet18_v1b_voc", (1, 3, 64, 64), 26),
]


def of(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def adapt(block):
    """Prepare a net for comparisons: no random numbers, and images smaller than it was made for."""
    if isinstance(block, nn.Dropout):
        block._rate = 0
    if isinstance(block, nn.AvgPool2D) and block._kwargs["kernel"] in ((7, 7), (13, 13)):
        block._kwargs["kernel"] = (2, 2)


def blocks(net):
    found = []
    net.apply(found.append)
    return found


def layers_of(net, kind):
    return [block for block in dict.fromkeys(blocks(net)) if isinstance(block, kind)]


def flat(outputs):
    if isinstance(outputs, (list, tuple)):
        return [one for output in outputs for one in flat(output)]
    return [outputs]


def batch_norm_nodes(net):
    graph = mx.sym.Group(flat(net(mx.sym.var("data"))))
    operators = [node["op"] for node in json.loads(graph.tojson())["nodes"]]
    assert len(operators) > 10
    return [operator for operator in operators if "norm" in operator.lower()]


def values(net):
    mx.nd.waitall()
    return {n: p.data().asnumpy() for n, p in net._collect_params_with_prefix().items()}


def restore(net, stored):
    """Set values; a Parameter whose shape is not known yet learns it."""
    for name, parameter in net._collect_params_with_prefix().items():
        parameter.set_data(mx.nd.array(stored[name], dtype=parameter.dtype))


def training_step(net, x, device):
    """Outputs, gradients and statistics of a training step on float64, hybridized."""
    net.hybridize()
    data = array(x, device)
    data.attach_grad()
    with autograd.record():
        outputs = flat(net(data))
    stream = np.random.default_rng(7)
    heads = [array(stream.normal(size=output.shape), device) for output in outputs]
    autograd.backward(outputs, heads)
    parameters = net._collect_params_with_prefix()
    gradients = {n: p.grad().asnumpy() for n, p in parameters.items() if p.grad_req != "null"}
    gradients["data"] = data.grad.asnumpy()
    stored = {n: value for n, value in values(net).items() if "running" in n}
    return [output.asnumpy() for output in outputs], gradients, stored


def check_step(actual, expected):
    outputs, gradients, statistics = actual
    assert len(outputs) == len(expected[0])
    for a, e in zip(outputs, expected[0]):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-12 * np.abs(e).max())
    assert gradients.keys() == expected[1].keys()
    # A gradient that is 0 by symmetry is rounding noise: what counts is its share of the step.
    scale = max(np.abs(gradient).max() for gradient in expected[1].values())
    for name, gradient in gradients.items():
        close = {"rtol": 0, "atol": 1e-11 * scale}
        np.testing.assert_allclose(gradient, expected[1][name], err_msg=name, **close)
    for name, statistic in statistics.items():
        # The built-in rounds its momentum to float32, in float64 too.
        close = {"rtol": 1e-6, "atol": 1e-12}
        np.testing.assert_allclose(statistic, expected[2][name], err_msg=name, **close)


def infer_float32(net, x, device):
    net.cast("float32")
    net.hybridize()
    return [output.asnumpy() for output in flat(net(array(x, device, "float32")))]


def check_inference(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert np.isfinite(e).all()
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-6 * max(1, np.abs(e).max()))


def initialized(case, device, x, norm_layer=nn.BatchNorm):
    net = case.build(norm_layer)
    initialize(net, device, mx.init.Xavier(magnitude=2))
    net.cast("float64")
    net(array(x, device))
    return net


def initialize(net, device, *how):
    """Initialize a net on a device, with what GluonCV initialized on a CPU as it built the net."""
    net.initialize(*how, ctx=device)
    net.collect_params().reset_ctx(device)
