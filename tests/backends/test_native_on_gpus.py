"""The graph that a GPU is given of the compiled operator, built and run on a CPU."""

import json
import sys

import scratchbn
from scratchbn import ScratchBatchNorm, native
from scratchbn.native import OPERATOR

import mxnet as mx
import numpy as np
import pytest
from executed_graph import FUSABLE
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

SHAPE = (6, 4, 5)


@pytest.fixture(autouse=True)
def by_the_kernel(device):
    if device.device_type != "cpu" or not native.available():
        pytest.skip("needs the compiled kernel on a CPU")
    with scratchbn.use_backend("native"):
        yield


@pytest.fixture
def graph_of_gpus(monkeypatch):
    def switch():
        monkeypatch.setattr(sys.modules["scratchbn.backends.native"], "_on_gpu", lambda x: True)

    return switch


class Net(HybridBlock):
    """Two layers on one array, one of them called again, with its Parameters used elsewhere."""

    def __init__(self, **options):
        super().__init__()
        with self.name_scope():
            self.one = ScratchBatchNorm(in_channels=SHAPE[1], **options)
            self.two = ScratchBatchNorm(in_channels=SHAPE[1])
            self.three = ScratchBatchNorm(in_channels=SHAPE[1], params=self.two.params)

    def hybrid_forward(self, F, x):
        x = x * 3
        y = self.one(x) + self.two(x)
        return self.one(F.relu(y)) + self.three(y) + self.two(y)


def trained(net, gamma_req):
    """The gradients and the state after two steps from fixed numbers."""
    rng = np.random.default_rng(0)
    net.initialize()
    for name, parameter in sorted(net.collect_params().items(), key=lambda item: item[0][-12:]):
        if parameter.grad_req != "null":
            parameter.set_data(mx.nd.array(rng.normal(1, 0.2, SHAPE[1])))
            parameter.grad_req = gamma_req if name.endswith("gamma") else "write"
    net.hybridize(static_alloc=True, static_shape=True)
    x = mx.nd.array(rng.normal(size=SHAPE))
    x.attach_grad("add")
    for _ in range(2):
        with autograd.record():
            y = net(x)
        y.backward(mx.nd.array(rng.normal(size=SHAPE)))
    arrays = [y, x.grad]
    for block in (net.one, net.two):
        gradients = [p.grad() for p in (block.gamma, block.beta) if p.grad_req != "null"]
        arrays += [*gradients, block.running_mean.data(), block.running_var.data()]
    return [array.asnumpy() for array in arrays]


@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}], ids=str)
@pytest.mark.parametrize("gamma_req", ["write", "add", "null"])
def test_it_computes_what_the_graph_of_a_cpu_computes(graph_of_gpus, gamma_req, options):
    want = trained(Net(**options), gamma_req)
    graph_of_gpus()
    got = trained(Net(**options), gamma_req)
    assert len(got) == len(want)
    for one, other in zip(got, want):
        np.testing.assert_array_equal(one, other)


def test_a_layer_adds_one_launch_each_way_to_those_of_the_operator(graph_of_gpus):
    """Fusion makes one kernel of nodes that are beside each other and can be fused."""
    graph_of_gpus()
    net = nn.HybridSequential()
    net.add(*(ScratchBatchNorm(in_channels=SHAPE[1]) for _ in range(3)))
    net.initialize()
    net.hybridize()
    net(mx.nd.zeros(SHAPE))
    graph = json.loads(net._cached_op._symbol.tojson(remove_amp_cast=False))
    nodes = graph["nodes"]
    ops = [node["op"] for node in nodes]
    assert ops.count(OPERATOR) == 3
    assert ops.count("Dropout") == 1, "the flag is one for all"
    serials = set()
    for node in nodes:
        if node["op"] == OPERATOR:
            gamma, beta = ((nodes[i], k) for i, k, _ in node["inputs"][1:3])
            assert gamma[0]["op"] == "_copy"
            both, first, _ = gamma[0]["inputs"][0]
            assert (nodes[both]["op"], first) == ("amp_multicast", 0)
            assert beta == (nodes[both], 1)
            assert [nodes[i]["op"] for i, *_ in nodes[both]["inputs"]] == ["null", "null"]
            serials |= {nodes[both]["attrs"]["__serial__"], gamma[0]["attrs"]["__serial__"]}
    assert len(serials) == 6, "MXNet merges equal nodes"
    assert {"amp_multicast", "_copy", "_backward_amp_multicast"} <= FUSABLE
