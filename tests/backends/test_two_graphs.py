"""Which of the two graphs of a live net runs, and how long the second one lives."""

import copy
import threading

import scratchbn
from scratchbn import (
    ScratchBatchNorm,
    ScratchSyncBatchNorm,
    native,
    set_inference_graph,
    use_backend,
    use_inference_graph,
)
from scratchbn.backends import inference_graph
from scratchbn.backends.inference import switch
from scratchbn.backends.inference.two_graphs import TwoGraphs
from scratchbn.monitor import Monitor

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn
from two_graph_nets import CLOSE, SHAPE, Wired, check, conv_net, own_graph, ready, seconds

pytestmark = pytest.mark.usefixtures("two_graphs")


def test_it_goes_with_the_cache(rng):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    check(net, x)
    op = net._cached_op
    assert isinstance(op, TwoGraphs)
    again = copy.copy(op)
    assert again.inference() == op.inference()
    net.hybridize()
    assert net._cached_op is None
    copy.deepcopy(net)  # nothing is left that cannot be copied
    check(net, x)
    assert net._cached_op is not op


def test_the_file_of_a_net_in_use_is_that_of_training(rng, tmp_path):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    y = check(net, x)
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    imported = SymbolBlock.imports(*files)
    assert len(imported.collect_params(".*running").keys()) == 2
    imported.hybridize()
    again = imported(x).asnumpy()
    assert seconds(imported)  # also a net that was only imported has two graphs
    np.testing.assert_allclose(again, y, **CLOSE["float32"])
    with autograd.train_mode():
        imported(x)
    mx.nd.waitall()
    moved = imported(x).asnumpy()
    assert np.abs(moved - again).max() > 1e-3
    np.testing.assert_allclose(moved, own_graph(imported, x), **CLOSE["float32"])


def test_nested_and_on_several_devices(rng, with_kernel, device, second_device):
    inner, net = conv_net(), nn.HybridSequential()
    net.add(inner, nn.Dense(3))
    net.initialize(ctx=[device, second_device])
    net.hybridize()
    x = mx.nd.array(rng.normal(size=SHAPE), ctx=device)
    with autograd.train_mode():
        net(x)
    for where in (device, second_device):
        data = x.as_in_context(where)
        y = net(data)
        assert y.context == where
        np.testing.assert_allclose(y.asnumpy(), own_graph(net, data), **CLOSE["float32"])
    assert seconds(net)
    assert inner._cached_op is None
    one, other = (net(x.as_in_context(c)).asnumpy() for c in (device, second_device))
    assert np.abs(one - other).max() > 1e-3  # the statistics moved on one of them


def test_threads(rng, with_kernel):
    net = Wired()
    data = [ready(net, rng), *(mx.nd.array(rng.normal(size=SHAPE)) for _ in range(3))]
    net.hybridize()
    with use_inference_graph(False):
        expected = [net(x).asnumpy() for x in data]
    found = [[] for _ in data]

    def work(i):
        with use_backend("auto"):
            for _ in range(10):
                found[i].append(net(data[i]).asnumpy())

    # What runs both graphs is built; the second one is by whichever thread comes first.
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seconds(net)) == 1
    for results, wanted in zip(found, expected):
        assert len(results) == 10
        for y in results:
            np.testing.assert_allclose(y, wanted, **CLOSE["float32"])


def test_a_wrong_input_is_an_error_and_the_next_call_right(rng, with_kernel):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    wrong = mx.nd.ones((2, 5, 6, 6))
    with pytest.raises(mx.MXNetError, match=r"conv.*Shape inconsistent"):
        net(wrong)  # before there is a second graph
    check(net, x)
    for _ in range(2):
        with pytest.raises(mx.MXNetError, match=r"conv.*Shape inconsistent|attribute shape"):
            net(wrong)
        check(net, x)


def test_data_with_one_channel_in_place_of_many_is_an_error(rng, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    net = nn.HybridSequential()
    net.add(ScratchBatchNorm(), nn.Dense(3))
    x = ready(net, rng, (4, 8))
    net.hybridize()
    check(net, x)
    with pytest.raises(mx.MXNetError):
        net(x[:, :1])
    check(net, x)


def test_hooks_see_the_own_graph(rng):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    y = net(x)
    seen = []
    net.register_op_hook(lambda name, operator, array: seen.append(str(name)))
    own = net(x)
    own.wait_to_read()
    assert seen
    assert not any("norms_" in name for name in seen)
    np.testing.assert_allclose(own.asnumpy(), y.asnumpy(), **CLOSE["float32"])
    net.register_op_hook(None)
    np.testing.assert_array_equal(net(x).asnumpy(), y.asnumpy())


def test_a_monitor_watches_on(rng):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    y = net(x).asnumpy()
    with Monitor(net) as monitor:
        with autograd.record():
            loss = net(x).sum()
        loss.backward()
        monitor.step()
    assert len(monitor.records) == 1
    assert isinstance(net._cached_op, TwoGraphs)
    assert np.abs(net(x).asnumpy() - y).max() > 1e-3


@pytest.mark.parametrize("name", ["portable", "native"])
def test_a_backend_chosen_by_name_is_what_runs(rng, name):
    if name == "native" and not native.available():
        pytest.skip("the kernel has not been built")
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    with use_backend(name):
        y = net(x)
    assert not isinstance(net._cached_op, TwoGraphs)
    np.testing.assert_array_equal(net(x).asnumpy(), y.asnumpy())  # it keeps what was chosen
    net.hybridize()
    check(net, x)
    arrays = [x if data else parameter.data() for data, parameter in net._cached_op_args]
    assert net._cached_op._infers(arrays)
    with use_backend(name):
        assert not net._cached_op._infers(arrays)


def test_the_switch(rng, monkeypatch):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    with use_inference_graph(False):
        net(x)
        assert not seconds(net)
        with use_inference_graph(True):
            assert inference_graph()
        assert not inference_graph()
    set_inference_graph(False)
    net(x)
    assert not seconds(net)
    set_inference_graph(True)
    monkeypatch.setenv("SCRATCHBN_INFERENCE_GRAPH", "0")
    check(net, x)
    monkeypatch.setattr(switch.CHOSEN, "_everywhere", None)
    assert not inference_graph()
    monkeypatch.setenv("SCRATCHBN_INFERENCE_GRAPH", "1")
    assert inference_graph()
    monkeypatch.setenv("SCRATCHBN_INFERENCE_GRAPH", "yes")
    with pytest.raises(ValueError, match="SCRATCHBN_INFERENCE_GRAPH must be 0 or 1, got 'yes'"):
        inference_graph()


@pytest.mark.parametrize("value", [1, None, "off"])
def test_the_switch_takes_a_bool(value):
    with pytest.raises(TypeError, match="on must be True or False"):
        set_inference_graph(value)
    with pytest.raises(TypeError, match="on must be True or False"), use_inference_graph(value):
        pass
    assert inference_graph()
    assert scratchbn.set_inference_graph is set_inference_graph


def test_no_graph_through_which_devices_share_has_a_static_shape(monkeypatch, with_kernel):
    if with_kernel == "no kernel":
        pytest.skip("there is one graph then")
    made, make = {}, mx.nd.CachedOp

    def remember(symbol, flags):
        op = make(symbol, flags)
        made[op] = dict(flags)
        return op

    monkeypatch.setattr(mx.nd, "CachedOp", remember)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3), ScratchBatchNorm(), nn.Activation("relu"))
    net.add(nn.Dense(3), ScratchSyncBatchNorm())
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    net(mx.nd.ones((2, 3, 6, 6)))
    op = net._cached_op
    assert op._own is not op._lean, "a graph with fewer nodes"
    for one in (op._own, op._lean):
        assert made[one]["static_alloc"] and "static_shape" not in made[one]
