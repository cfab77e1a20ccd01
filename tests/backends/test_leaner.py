"""The graph that trains by the compiled operator has fewer nodes, and computes the same."""

import json
import subprocess
import sys

import scratchbn
from scratchbn import ScratchBatchNorm, native
from scratchbn._graph.nodes import Graph
from scratchbn.backends.inference.calls import calls_in, compiled
from scratchbn.backends.inference.two_graphs import TwoGraphs
from scratchbn.backends.leaner import leaner
from scratchbn.native import OPERATOR

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn
from two_graph_nets import two_steps


@pytest.fixture(autouse=True)
def by_the_kernel(device):
    if device.device_type != "cpu" or not native.available():
        pytest.skip("needs the compiled kernel")
    with scratchbn.use_backend("auto"):
        yield


class Places(HybridBlock):
    """Norms before relus, with and without others that use the result."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.conv = nn.Conv2D(8, 3, padding=1)
            self.one, self.two, self.three = (ScratchBatchNorm() for _ in range(3))

    def hybrid_forward(self, F, x):
        y = F.Activation(
            self.one(x), act_type="relu"
        )  # x is an input, whose gradient may be added to
        y = F.Activation(self.two(self.conv(y)), act_type="relu")
        z = self.three(y)
        return F.relu(z) * 2 + z + F.relu(y)


def built(x):
    mx.random.seed(3)
    net = Places()
    net.initialize(mx.init.Normal(0.5))
    net.hybridize(static_alloc=True, static_shape=True)
    net(x)
    return net


def kernels(symbol):
    return [n for n in json.loads(symbol.tojson())["nodes"] if n["op"] == OPERATOR]


def test_what_is_merged_and_what_is_not(rng):
    net = built(mx.nd.array(rng.normal(size=(4, 8, 5, 5))))
    op = net._cached_op
    assert isinstance(op, TwoGraphs)
    lean = leaner(op._symbol)
    assert lean.list_inputs() == op._symbol.list_inputs()
    assert [n["attrs"]["relu"] for n in kernels(op._symbol)] == ["False"] * 3
    assert [n["attrs"]["relu"] for n in kernels(lean)] == ["Activation", "Activation", "False"]
    nodes = json.loads(lean.tojson())["nodes"]
    behind = [nodes[n["inputs"][0][0]] for n in kernels(lean)]
    assert [n["op"] for n in behind] == ["_copy", "Reshape", "_copy"]
    assert nodes[behind[1]["inputs"][0][0]]["op"] == "Convolution"  # in plain layout, once
    assert kernels(net._cached_graph[1]) == []  # what it remembers, exports


@pytest.mark.parametrize("grad_req", ["write", "add"])
@pytest.mark.parametrize("special", [None, np.nan, np.inf])
def test_outputs_gradients_and_statistics_are_the_same(rng, grad_req, special):
    value = rng.normal(size=(4, 8, 5, 5)).astype("float32")
    value[:, 1] = 2.5  # a constant channel: exact zeros before the relu
    if special is not None:
        value[0, 2, 1, 1] = special
    weights = mx.nd.array(rng.normal(size=value.shape))
    found = [results(mx.nd.array(value), grad_req, weights, lean) for lean in (True, False)]
    assert np.isfinite(found[0]["one.running_mean"]).all()
    for name, one in found[0].items():
        other = found[1][name]
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4, err_msg=name)


def results(x, grad_req, weights, lean):
    x.attach_grad(grad_req)
    return two_steps(built(x), x, weights, grad_req, lean)


def test_what_onednn_laid_out_is_copied_once_and_not_kept(tmp_path):
    """MXNet's executors kept plain copies of what six norms read, 4 MiB each, twice over."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, scratchbn, psutil, mxnet as mx\n"
        "from mxnet import autograd\n"
        "from mxnet.gluon import nn\n"
        "from scratchbn.backends.inference import two_graphs\n"
        "if sys.argv[1] == 'traced':\n"
        "    two_graphs.leaner = lambda symbol: None\n"
        "net = nn.HybridSequential()\n"
        "for _ in range(6):\n"
        "    net.add(nn.Conv2D(32, 1, in_channels=32), scratchbn.ScratchBatchNorm())\n"
        "net.initialize()\n"
        "net.hybridize(static_alloc=True, static_shape=True)\n"
        "x = mx.nd.ones((32, 32, 32, 32))\n"
        "mx.nd.waitall()\n"
        "before = psutil.Process().memory_info().rss\n"
        "for _ in range(2):\n"
        "    with autograd.record():\n"
        "        y = net(x)\n"
        "    y.backward()\n"
        "    mx.nd.waitall()\n"
        "print((psutil.Process().memory_info().rss - before) / x.size / 4)\n"
    )
    kept = {}
    for graph in ("traced", "leaner"):
        command = [sys.executable, str(script), graph]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept[graph] = float(done.stdout)
    assert kept["leaner"] < kept["traced"] - 6, "in tensors: one for each norm at least"


def test_a_hook_sees_each_node(rng):
    x = mx.nd.array(rng.normal(size=(4, 8, 5, 5)))
    net = built(x)
    net.hybridize(static_alloc=False, static_shape=False)
    net(x)
    seen = []
    net.register_op_hook(lambda name, operator, array: seen.append(str(name)))
    with autograd.train_mode():
        net(x).wait_to_read()
    assert sum("activation" in name for name in seen) == 2, seen


def test_a_graph_without_the_operator_stays():
    x = mx.sym.var("x")
    assert leaner(mx.sym.relu(mx.sym.Convolution(x, kernel=(1, 1), num_filter=2))) is None


class Dense(HybridBlock):
    """Products, with a norm between them that is called twice."""

    def __init__(self, **options):
        super().__init__()
        with self.name_scope():
            self.first, self.second = nn.Dense(6), nn.Dense(6)
            self.norm = ScratchBatchNorm(**options)

    def hybrid_forward(self, F, x):
        y = F.Activation(self.norm(self.first(x)), act_type="relu")
        return self.norm(self.second(y)) + y


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"use_global_stats": True}])
@pytest.mark.parametrize("static", [True, False])
def test_in_a_graph_that_only_infers_it_asks_for_no_mode(rng, options, static):
    net = Dense(**options)
    net.initialize(mx.init.Normal(0.5))
    net.hybridize(static_alloc=static, static_shape=static)
    x = mx.nd.array(rng.normal(size=(4, 5)))
    with autograd.train_mode():
        for _ in range(3):
            net(x)
    mx.nd.waitall()
    before = {name: p.data().asnumpy() for name, p in net.collect_params().items()}
    with scratchbn.use_inference_graph(False):
        expected = net(x).asnumpy()
    np.testing.assert_allclose(net(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)
    (second,) = net._cached_op._seconds.values()
    operators = [n["op"] for n in json.loads(second.symbol.tojson())["nodes"] if n["op"] != "null"]
    kernel, product = OPERATOR, "FullyConnected"
    assert sorted(operators) == sorted([product, "_ones", kernel, product, kernel, "elemwise_add"])
    assert [n["attrs"]["relu"] for n in kernels(second.symbol)] == ["Activation", "False"]
    for name, p in net.collect_params().items():
        np.testing.assert_array_equal(p.data().asnumpy(), before[name], err_msg=name)


def test_the_inference_graph_computes_nothing_by_the_operator_that_it_replaced(rng):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3), ScratchBatchNorm(), nn.Activation("relu"))
    net.initialize()
    net.hybridize()
    x = mx.nd.array(rng.normal(size=(2, 3, 6, 6)))
    caught = []
    make = TwoGraphs._runner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoGraphs, "_runner", lambda *args: (caught.append(args[1]), make(*args))[1])
        net(x)
    lean, second = caught
    assert len(kernels(lean)) == 1
    assert kernels(second) == []
    assert len(calls_in(Graph(net._cached_op._symbol), [compiled])) == 1
    operators = [n["op"] for n in json.loads(second.tojson())["nodes"]]
    assert operators.count("Convolution") == 2  # one centres in its bias, so no third one does
