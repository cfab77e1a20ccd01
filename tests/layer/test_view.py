"""How arrays are seen: the same whether the lengths are known, and with few nodes in a graph."""

import json

from scratchbn import ScratchBatchNorm, use_backend
from scratchbn._graph.view import ChannelView

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd
from mxnet.gluon import nn


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3, 1), (2, 5, 4), (2, 3, 4, 5), (3, 1, 1, 6)])
def test_a_graph_maps_elements_and_channels_as_arrays_do(rng, shape, axis):
    if not -len(shape) <= axis < len(shape):
        pytest.skip("no such axis")
    x = rng.normal(size=shape)
    axes = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    symbol = ChannelView(mx.sym, mx.sym.var("x"), axis)
    wide = symbol.reshape_back(symbol.broadcast(symbol.mean(symbol.values)))
    graph = mx.sym.Group([symbol.m, symbol.mean(symbol.values), wide])
    bound = graph.bind(mx.cpu(), {"x": nd.array(x, dtype="float64")})
    m, mean, back = (a.asnumpy() for a in bound.forward())
    assert m == x.size / shape[axis]
    np.testing.assert_allclose(mean, x.mean(axes), rtol=1e-13)
    np.testing.assert_allclose(back, np.broadcast_to(x.mean(axes, keepdims=True), shape))

    view = ChannelView(nd, nd.array(x, dtype="float64"), axis)
    np.testing.assert_allclose(view.mean(view.values).asnumpy(), mean, rtol=1e-13)
    rank_2 = view.broadcast(view.mean(view.values))
    np.testing.assert_allclose(view.reshape_back(rank_2).asnumpy(), back, rtol=1e-13)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
def test_behind_a_dense_layer_of_any_rank(rng, flatten, axis):
    """Whether rank 2 is expected or not, and rightly or not, results are the same."""
    x = nd.array(rng.normal(size=(6, 3, 4)))
    found = []
    for hybridize in (False, True):
        mx.random.seed(1)
        net = nn.HybridSequential()
        net.add(nn.Dense(3, flatten=flatten), ScratchBatchNorm(axis=axis))
        net.initialize(mx.init.Normal(1))
        if hybridize:
            net.hybridize()
        x.attach_grad()
        with use_backend("portable"), autograd.record():
            y = net(x) ** 3
        y.backward()
        found.append([y, x.grad.copy(), net[1].running_mean.data(), net[1].running_var.data()])
    for eager, graph in zip(*found):
        np.testing.assert_allclose(graph.asnumpy(), eager.asnumpy(), rtol=1e-4, atol=1e-5)


def test_a_layer_has_few_nodes():
    with use_backend("portable"):
        symbol = ScratchBatchNorm(in_channels=3)(mx.sym.var("data"))
    operators = [n["op"] for n in json.loads(symbol.tojson())["nodes"] if n["op"] != "null"]
    assert len(operators) <= 103
    assert operators.count("dot") == 14  # three means, three broadcasts, two lengths


def test_an_array_of_rank_1_is_refused_when_shapes_are_known():
    with use_backend("portable"):
        symbol = ScratchBatchNorm(in_channels=3)(mx.sym.var("data"))
    with pytest.raises(mx.MXNetError):
        symbol.infer_shape(data=(3,))
