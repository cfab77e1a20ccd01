"""What is said of the ways that the layers of a net run."""

import json

import scratchbn
from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, describe, native, use_backend
from scratchbn.native import OPERATOR

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn

LATER = "chosen at the first call"


class Tanh(ScratchBatchNorm):
    def transform(self, F, view, batch, gamma, beta, epsilon):
        return F.tanh(super().transform(F, view, batch, gamma, beta, epsilon))


@pytest.fixture
def net(device):
    if device.device_type != "cpu":
        pytest.skip("the second graph is for CPUs")
    with use_backend("auto"):
        yield made()


def made():
    net = nn.HybridSequential(prefix="")
    net.add(
        nn.Conv2D(8, 3), ScratchBatchNorm(prefix="conv_norm_"), nn.Activation("relu"),
        nn.Conv2D(6, 3), ScratchBatchNormReLU(prefix="six_"),
        ScratchBatchNorm(axis=3, prefix="last_"), Tanh(prefix="tanh_"),
        nn.Dense(5), ScratchBatchNorm(prefix="dense_norm_"), nn.Activation("relu"),
    )  # fmt: skip
    net.initialize()
    return net


@pytest.fixture
def x(rng):
    return mx.nd.array(rng.normal(size=(2, 3, 8, 8)))


def said(net):
    return {row.layer: (row.training, row.inference, row.why) for row in describe(net).rows}


def operators(symbol):
    return {n["name"]: n["op"] for n in json.loads(symbol.tojson())["nodes"]}


def test_with_the_kernel(net, x):
    if not native.available():
        pytest.skip("the kernel has not been built")
    net.hybridize()
    assert set(said(net).values()) == {(LATER, LATER, "")}
    with autograd.record():
        net(x)
    assert said(net)["conv_norm"] == ("kernel with ReLU", LATER, "")
    net(x)
    relu, overrides = "kernel with ReLU", "it overrides how it computes"
    only = "kernel, inference only"
    assert said(net) == {
        "conv_norm": (relu, "convolution", ""),
        "six": ("kernel", only, "the kernel is faster on 6 channels"),
        "last": ("kernel", only, "its channels are not second"),
        "tanh": ("two-mode graph", "two-mode graph", overrides),
        "dense_norm": (relu, f"{relu}, inference only", "the kernel is faster on 2 axes"),
    }
    # and so it is
    (second,) = net._cached_op._seconds.values()
    ops = operators(second.symbol)
    assert ops["conv_norm_fwd"] == "Convolution"
    assert ops["six_fwd"] == ops["last_fwd"] == ops["dense_norm_fwd"] == OPERATOR
    assert ops["tanh_fwd"] not in (OPERATOR, "Convolution", "broadcast_add")


def test_without_the_kernel(net, x, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "facts", lambda: {"problem": "no compiler"})
    assert said(net)["six"] == ("stock operators", "stock operators", "no compiler")
    net.hybridize()
    net(x)
    graph = "two-mode graph"
    assert said(net)["six"] == (graph, "convolution", "no compiler")
    assert said(net)["dense_norm"] == (graph, "affine", "no compiler")
    assert said(net)["last"] == (graph, graph, "no compiler; its channels are not second")
    (second,) = net._cached_op._seconds.values()
    assert operators(second.symbol)["dense_norm_fwd"] == "broadcast_add"
    with scratchbn.use_inference_graph(False):
        assert said(net)["six"] == (graph, graph, "the inference graph is off; no compiler")


def test_each_rank_and_type_has_its_own(net, rng, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    layer = ScratchBatchNorm(prefix="one_")
    layer.initialize()
    layer.hybridize()
    for shape in ((2, 8, 3, 3), (2, 8)):
        layer(mx.nd.array(rng.normal(size=shape)))
    assert said(layer)["one"][1] == "convolution or affine"


@pytest.mark.parametrize("name", ["portable", "native"])
def test_a_backend_chosen_by_name(net, x, name):
    if name == "native" and not native.available():
        pytest.skip("the kernel has not been built")
    with use_backend(name):
        net.hybridize()
        y = net(x)
        found = said(net)
        np.testing.assert_array_equal(net(x).asnumpy(), y.asnumpy())
    way = "kernel" if name == "native" else "two-mode graph"
    why = "" if name == "native" else "the backend portable was chosen"
    assert found.pop("tanh")[:2] == ("two-mode graph", "two-mode graph")
    assert set(found.values()) == {(way, way, why)}
    if name == "portable" and native.available():
        assert said(net)["six"][2] == "it was traced so: hybridize() chooses anew"


def test_an_imported_net(net, x, tmp_path):
    net.hybridize()
    net(x)
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    imported = SymbolBlock.imports(*files)
    imported(x)
    assert said(imported)["six"] == (
        "two-mode graph", "convolution", "it was imported as stock operators"
    )  # fmt: skip


def test_parts_of_a_net_that_are_graphs_of_their_own(net, x):
    outer = nn.Sequential()
    outer.add(net, ScratchBatchNorm(prefix="outer_"))
    outer[1].initialize()
    net.hybridize()
    outer(x)
    rows = describe(outer).rows
    assert [(row.block, row.layer) for row in rows if row.layer in ("six", "outer")] == [
        ("0", "six"), ("1", "outer"),
    ]  # fmt: skip
    ways = {"kernel"} if native.available() else {"stock operators"}
    assert {*said(outer)["outer"][:2]} == ways
    lines = str(describe(outer)).splitlines()
    assert lines[0].split() == ["block", "layer", "training", "inference", "why"]
    assert len(lines) == 1 + len(rows) == 7


def test_nothing_is_changed_and_repr_stays(net, x):
    net.hybridize()
    net(x)
    op, text, graph = net._cached_op, repr(net), net._cached_graph
    describe(net)
    assert (net._cached_op, repr(net), net._cached_graph) == (op, text, graph)
    assert str(describe(nn.Dense(2))) == "no layer of scratchbn"


@pytest.mark.parametrize("value", [None, mx.sym.var("x"), 3])
def test_it_takes_a_block(value):
    with pytest.raises(TypeError, match="net must be a gluon Block"):
        describe(value)
