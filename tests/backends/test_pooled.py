"""What the kernel put out in plain order is pooled in oneDNN's, and the numbers stay."""

import json

import scratchbn
from scratchbn import ScratchBatchNorm, native
from scratchbn.backends.inference.two_graphs import TwoGraphs

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import HybridBlock, nn
from two_graph_nets import two_steps


@pytest.fixture(autouse=True)
def by_the_kernel(device):
    if device.device_type != "cpu" or mx.context.num_gpus() or not native.available():
        pytest.skip("needs the compiled kernel, and no GPU")
    with scratchbn.use_backend("auto"):
        yield


class Pooled(HybridBlock):
    """Branches side by side, one of them pooled, and a pooling of them all."""

    def __init__(self, channels=8, pool=None, **options):
        super().__init__()
        with self.name_scope():
            self.conv, self.other = nn.Conv2D(channels, 3, padding=1), nn.Conv2D(channels, 1)
            self.norm, self.second = ScratchBatchNorm(**options), ScratchBatchNorm(**options)
            self.first = pool or nn.MaxPool2D(3, 1, 1)
            self.last = nn.AvgPool2D(2)

    def hybrid_forward(self, F, x):
        y = F.Activation(self.norm(self.conv(x)), act_type="relu")
        z = self.second(self.other(x))
        return self.last(F.concat(F.LeakyReLU(z), self.first(y), F.relu(z), dim=1))


def built(x, net=None):
    mx.random.seed(3)
    net = net or Pooled()
    net.initialize(mx.init.Normal(0.5))
    net.cast(x.dtype)
    net.hybridize(static_alloc=True, static_shape=True)
    net(x)
    return net


def blocked(net):
    """The number of channels of each convolution that the graph which trains has more."""
    op = net._cached_op
    assert isinstance(op, TwoGraphs)
    assert op.trains.list_inputs() == op._symbol.list_inputs()
    nodes = json.loads(op.trains.tojson())["nodes"]
    named = [n for n in nodes if n["op"] == "Convolution" and n["name"].endswith("_blocked")]
    return [int(n["attrs"]["num_filter"]) for n in named]


def test_each_pooling_of_plain_arrays_has_a_convolution_before_it(rng):
    net = built(mx.nd.array(rng.normal(size=(2, 3, 6, 6))))
    assert blocked(net) == [8, 24]
    text = json.loads(net._cached_graph[1].tojson())["nodes"]  # what it remembers, exports
    assert sum(node["op"] == "Convolution" for node in text) == 2


@pytest.mark.parametrize(
    "net",
    [
        lambda: Pooled(12),  # oneDNN's order is one of eights
        lambda: Pooled(pool=nn.MaxPool2D(1, layout="NHWC")),
        lambda: Pooled(axis=2, in_channels=6),
        lambda: in_sequence(nn.Conv2D(8, 3), ScratchBatchNorm(), nn.GlobalMaxPool2D()),
        lambda: in_sequence(ScratchBatchNorm(), nn.MaxPool2D()),  # it cannot see how many channels
        lambda: in_sequence(ScratchBatchNorm(), nn.Conv2D(8, 3), nn.MaxPool2D()),
    ],
)
def test_where_it_gains_nothing_or_too_little_is_known_it_stays(rng, net):
    assert blocked(built(mx.nd.array(rng.normal(size=(2, 8, 6, 6))), net())) == []


def in_sequence(*layers):
    net = nn.HybridSequential()
    net.add(*layers)
    return net


@pytest.mark.parametrize("grad_req", ["write", "add", "null"])
@pytest.mark.parametrize("special", [None, np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outputs_gradients_and_statistics_are_the_same(rng, grad_req, special, dtype):
    value = rng.normal(size=(4, 3, 6, 6)).astype(dtype)
    if special is not None:
        value[0, 2, 1, 1] = special
    weights = mx.nd.array(rng.normal(size=(4, 24, 3, 3)), dtype=dtype)
    found = [
        results(mx.nd.array(value, dtype=dtype), grad_req, weights, lean) for lean in (True, False)
    ]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-9, "atol": 1e-9}
    for name, one in found[0].items():
        np.testing.assert_allclose(one, found[1][name], err_msg=name, **close)


def results(x, grad_req, weights, lean):
    x.attach_grad()
    return two_steps(built(x), x, weights, grad_req, lean)
