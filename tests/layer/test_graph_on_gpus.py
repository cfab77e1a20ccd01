"""What a GPU must not meet in our graphs, read from their structure on a CPU.

The graphs are those that MXNet executes, forward and backward, common subexpressions eliminated.
"""

from __future__ import annotations

import json

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, use_backend
from scratchbn.variants import BatchRenorm, GhostBatchNorm

# isort: split
import mxnet as mx
import numpy as np
import pytest
from executed_graph import FUSABLE, executed, fusable_beside, is_rounded
from mxnet.gluon import HybridBlock, nn

CHANNELS = {"in_channels": 3}
LAYERS = {
    "default": lambda: ScratchBatchNorm(**CHANNELS),
    "relu": lambda: ScratchBatchNormReLU(**CHANNELS),
    "cumulative": lambda: ScratchBatchNorm(momentum=None, **CHANNELS),
    "unbiased": lambda: ScratchBatchNorm(unbiased_variance=True, **CHANNELS),
    "no epsilon": lambda: ScratchBatchNorm(epsilon=0, **CHANNELS),
    "no scale": lambda: ScratchBatchNorm(scale=False, **CHANNELS),
    "no center": lambda: ScratchBatchNorm(center=False, **CHANNELS),
    "global": lambda: ScratchBatchNorm(use_global_stats=True, **CHANNELS),
    "last axis": lambda: ScratchBatchNorm(axis=-1, in_channels=4),
    "first axis": lambda: ScratchBatchNorm(axis=0, in_channels=8),
    "renorm": lambda: BatchRenorm(1.1, 0.3, **CHANNELS),
    "renorm cumulative": lambda: BatchRenorm(1.1, 0.3, momentum=None, **CHANNELS),
    "ghost": lambda: GhostBatchNorm(3, **CHANNELS),
    "ghost unbiased": lambda: GhostBatchNorm(3, unbiased_variance=True, **CHANNELS),
}


@pytest.fixture(autouse=True)
def portable():
    with use_backend("portable"):
        yield


class Beside(HybridBlock):
    """Sums what norm layers make of one array; a layer that is given twice is called twice."""

    def __init__(self, layers, before=None, prefix=None):
        super().__init__(prefix=prefix)
        self.before, self.layers = before, layers
        for layer in filter(None, [before, *layers]):
            self.register_child(layer)

    def hybrid_forward(self, F, x):
        x = self.before(x) if self.before else x
        return F.add_n(*(layer(x) for layer in self.layers))


def graph_of(net, dtype="float32"):
    """The graph that a hybridized net executes for data of shape (8, 3, 2, 4)."""
    net.cast(dtype)
    net.initialize()
    net.hybridize()
    x = mx.nd.zeros((8, 3, 2, 4), dtype=dtype)
    net(x)
    return net._cached_graph[1], {"data": x.shape}


def json_nodes(symbol):
    return [node for node in json.loads(symbol.tojson())["nodes"] if node["op"] != "null"]


def merged(nodes):
    """The pairs of nodes that MXNet merges: of one operator, with equal attributes and inputs."""
    stands_for, seen, pairs = {}, {}, []
    for i, node in enumerate(nodes):
        if node["op"] == "null" or not node["inputs"]:
            continue
        inputs = tuple((stands_for.get(j, j), k) for j, k, _ in node["inputs"])
        key = node["op"], tuple(sorted(node.get("attrs", {}).items())), inputs
        if node["op"] in ("Dropout", "sgd_mom_update"):  # with a state, or writing to an input
            continue
        if key in seen:
            stands_for[i] = seen[key]
            pairs.append((nodes[seen[key]]["name"], node["name"]))
        seen.setdefault(key, i)
    return pairs


def own(name, layer):
    return name.startswith(layer.prefix)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_one_array_share_no_node(name, before, dtype):
    """Pointwise fusion orders the kernels of layers that do in a circle: `graph.cc:101`."""
    first, second, third = (LAYERS[name]() for _ in range(3))
    net = Beside([first, second, third], nn.Activation("tanh") if before else None)
    symbol, _ = graph_of(net, dtype)
    pairs = merged(json.loads(symbol.tojson())["nodes"])
    layers = first, second, third
    assert not [
        p for p in pairs if [own(p[0], k) for k in layers] != [own(p[1], k) for k in layers]
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_two_calls_of_a_layer_share_no_node(name):
    layer = LAYERS[name]()
    once = graph_of(Beside([LAYERS[name]()]))[0]
    twice = graph_of(Beside([layer, layer]))[0]

    def inside(symbol):
        return merged(json.loads(symbol.tojson())["nodes"])

    assert len(inside(twice)) == 2 * len(inside(once))


def test_what_makes_nodes_distinct_is_the_same_every_time():
    def text():
        layers = [ScratchBatchNorm(prefix=f"norm{k}_", **CHANNELS) for k in range(2)]
        return Beside(layers, prefix="net_")(mx.sym.var("data")).tojson()

    assert text() == text()


@pytest.mark.parametrize("name", LAYERS)
def test_no_kernel_that_fusion_makes_rounds_float64(name):
    """In such kernels scalars and roots are float32: an operator that has either stands alone."""
    symbol, shapes = graph_of(LAYERS[name](), "float64")
    steps = executed(symbol, "float64", **shapes)
    assert {"dot", "_backward_dot"} <= {step.op for step in steps}, "backward too"
    rounded = [step for step in steps if is_rounded(step)]
    assert rounded or name in ("no epsilon", "cumulative")
    beside = {step.name: [s.name for s in fusable_beside(step, steps)] for step in rounded}
    assert not {name: others for name, others in beside.items() if others}


def test_the_check_sees_what_fusion_would_round():
    x, y = mx.sym.var("x"), mx.sym.var("y")
    symbol = mx.sym.rsqrt(x + 1e-5) * y + mx.sym.broadcast_mul(x * 0.9, y) + (x + 0.5)
    steps = executed(symbol, x=(3,), y=(3,))
    seen = {s.op for s in steps if is_rounded(s) and fusable_beside(s, steps)}
    assert seen == {"_plus_scalar", "rsqrt", "_backward_rsqrt", "_backward_mul_scalar"}


@pytest.mark.parametrize("name", LAYERS)
def test_under_np_shape_no_product_is_tf32_and_no_sum_is_over_nothing(name):
    """On a GPU `linalg.gemm2` and FullyConnected round to TF32; `sum` and `dot` divide by 0."""
    mx.npx.set_np()
    net = LAYERS[name]()
    net.initialize()
    symbol = net(mx.sym.var("data").as_np_ndarray())
    ops = {node["op"] for node in json_nodes(symbol)}
    assert "batch_dot" in ops
    assert not ops & {"_linalg_gemm2", "_linalg_gemm", "FullyConnected", "dot", "sum", "mean"}


def may_be_empty(symbol, steps, **shapes):
    """The steps of a batch without elements whose results, or gradients, have none either."""
    internals = symbol.get_internals()
    sizes = zip(internals.list_outputs(), internals.infer_shape(**shapes)[1])
    without = {name.rpartition("_output")[0] for name, shape in sizes if not np.prod(shape)}
    without |= set(shapes)
    found = []
    for step in steps:
        of, is_gradient, _ = step.name.partition("_backward")
        forward = [s for s in steps if is_gradient and s.name == of]
        among = [s for f in forward for s in (f, *f.inputs)] or step.inputs
        if not step.is_backward:
            among = [step]
        if any(s.name in without or s in found for s in among):
            found.append(step)
    return found


def fused_when_empty(net, shape):
    """What a GPU makes one kernel of though it has no elements, which it refuses to launch."""
    full = tuple(length or 2 for length in shape)
    net.initialize()
    net.hybridize()
    net(mx.np.ones(full))
    symbol = net._cached_graph[1]
    steps = executed(symbol, data=full)
    empty = may_be_empty(symbol, steps, data=shape)
    assert {"Flatten", "elemwise_sub", "_backward_sub"} <= {step.op for step in empty}
    return [
        (step.name, beside.name)
        for step in empty
        if step.op in FUSABLE
        for beside in fusable_beside(step, steps)
        if beside in empty
    ]


@pytest.mark.parametrize("shape", [(0, 3, 8, 4), (8, 3, 0, 4)])
@pytest.mark.parametrize("name", [*LAYERS, "third axis"])
def test_under_np_shape_nothing_empty_is_fused(name, shape):
    layers = {**LAYERS, "third axis": lambda: ScratchBatchNorm(axis=3, in_channels=4)}
    if shape[0] == 0 and name.startswith(("ghost", "first")):
        pytest.skip("needs a sample")
    mx.npx.set_np()
    assert not fused_when_empty(layers[name](), shape)


def test_under_np_shape_layers_on_one_array_share_no_node():
    mx.npx.set_np()
    first, second = (ScratchBatchNorm(**CHANNELS) for _ in range(2))
    x = mx.sym.var("data").as_np_ndarray()
    symbol = mx.sym.Group([layer(x).as_nd_ndarray() for layer in (first, second)])
    layers = first, second
    assert not [
        p
        for p in merged(json.loads(symbol.tojson())["nodes"])
        if [own(p[0], k) for k in layers] != [own(p[1], k) for k in layers]
    ]


def test_the_check_sees_what_is_empty_and_fused():
    mx.npx.set_np()
    x = mx.sym.var("x")
    symbol = mx.sym.sum(mx.sym.square(mx.sym.Flatten(mx.sym.square(x) * x)))
    steps = executed(symbol, x=(2, 3))
    empty = may_be_empty(symbol, steps, x=(0, 3))
    seen = {s.op for s in empty if s.op in FUSABLE and set(fusable_beside(s, steps)) & set(empty)}
    assert seen == {"square", "elemwise_mul", "_backward_mul", "_backward_square", "add_n"}


@pytest.mark.parametrize("name", LAYERS)
def test_no_product_is_tf32(name):
    ops = {node["op"] for node in json_nodes(graph_of(LAYERS[name]())[0])}
    assert "dot" in ops
    assert not ops & {"_linalg_gemm2", "_linalg_gemm", "FullyConnected", "sum", "mean"}


@pytest.mark.parametrize("hybridize", [False, True])
def test_products_under_np_shape_are_those_without(hybridize, rng):
    x = rng.normal(size=(4, 3, 5)).astype("float32")
    results = []
    for numpy in (False, True):
        if numpy:
            mx.npx.set_np()
        layer = ScratchBatchNorm(**CHANNELS)
        layer.initialize()
        layer.hybridize(hybridize)
        data = (mx.np if numpy else mx.nd).array(x)
        data.attach_grad()
        with mx.autograd.record():
            y = layer(data) ** 3
        y.backward()
        results.append((y.asnumpy(), data.grad.asnumpy()))
    for classic, numpy in zip(*results):
        np.testing.assert_allclose(numpy, classic, rtol=1e-5, atol=1e-6)
