"""Nets and data as people have them: several inputs, iterators of MXNet, other devices."""

from scratchbn import ScratchBatchNorm, recalibrate

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn


class Difference(gluon.HybridBlock):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.norm = ScratchBatchNorm()

    def hybrid_forward(self, F, a, b):
        return self.norm(a) - self.norm(b)


@pytest.fixture
def pair(rng):
    return [mx.nd.array(rng.normal(k, k, (21, 3))) for k in (1, 2)]


def assert_of(layer, *arrays):
    x = np.concatenate([a.asnumpy().astype("f8") for a in arrays])
    for copy, expected in ((layer.running_mean, x.mean(0)), (layer.running_var, x.var(0))):
        for value in copy.list_data():
            np.testing.assert_allclose(value.asnumpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "call"),
    [
        (lambda a, b: ([a, b], mx.nd.zeros(21)), None),
        (lambda a, b: ((a, b),), None),
        (lambda a, b: mx.io.DataBatch([a, b]), None),
        (lambda a, b: (a, b), lambda net, batch: net(*batch)),
        (lambda a, b: {"left": a, "right": b}, lambda net, x: net(x["left"], x["right"])),
    ],
)
def test_a_net_of_two_inputs(pair, batch, call):
    net = Difference()
    net.initialize()
    net.hybridize()
    assert recalibrate(net, [batch(*pair)], call=call, report=True)[1] == 1
    assert_of(net.norm, *pair)


@pytest.mark.parametrize("form", ["hybrid", "imported"])
def test_a_bare_pair_is_read_as_data_and_label_and_the_error_says_what_to_write(pair, form):
    net = Difference()
    if form == "imported":
        a, b = mx.sym.var("a"), mx.sym.var("b")
        net = gluon.SymbolBlock(mx.sym.BatchNorm(a - b, name="norm"), [a, b])
    net.initialize()
    net.hybridize()
    net(*pair)
    before = [p.data().asnumpy() for p in net.collect_params().values()]
    text = r"batch 1 is a tuple .* with 1 array; if it takes others: call=lambda net, batch: net"
    with pytest.raises(TypeError, match=text):
        recalibrate(net, [([*pair], 0), tuple(pair)])
    for value, p in zip(before, net.collect_params().values()):
        np.testing.assert_array_equal(value, p.data().asnumpy())


def one(device=None):
    net = nn.HybridSequential()
    net.add(ScratchBatchNorm())
    net.initialize(ctx=device)
    return net


def test_an_iterator_of_mxnet_is_read_from_its_start_and_without_padding(pair):
    net, data = one(), mx.io.NDArrayIter(pair[0], mx.nd.zeros(21), 10)
    for _ in range(2):
        assert recalibrate(net, data, report=True)[1] == 3
        assert_of(net[0], pair[0])


@pytest.mark.parametrize("called", [False, True])
def test_data_on_another_device(pair, called):
    net = one([mx.cpu(1), mx.cpu(2)])
    if called:
        net(pair[0].as_in_context(mx.cpu(2)))
    parts = [pair[0][:9], pair[0][9:].as_in_context(mx.cpu(2))]
    assert recalibrate(net, parts, report=True)[1] == 2
    assert_of(net[0], pair[0])


@pytest.mark.parametrize("batch", [{"x": 1}, ([], 1), ([1, 2],), mx.io.DataBatch([])])
def test_other_batches_are_refused_with_advice(batch):
    net = one()
    with pytest.raises(TypeError, match=r"batch 0 is .*: call=lambda net, batch: \.\.\. takes any"):
        recalibrate(net, [batch])


def test_call_must_be_callable(pair):
    with pytest.raises(TypeError, match="call must be callable"):
        recalibrate(one(), [pair[0]], call="net")
