"""The monitor changes nothing of what it observes."""

from scratchbn import (
    BackendError,
    ScratchBatchNorm,
    use_backend,
)
from scratchbn.monitor import Monitor

import mxnet as mx
import numpy as np
import pytest
from helpers import array, in_mode
from monitored_nets import deep_net, hooks, kinds, modes, one_layer, train_step
from mxnet import autograd, gluon
from mxnet.gluon import Block, HybridBlock, nn


def values(net):
    mx.nd.waitall()
    return {name: p.data().asnumpy() for name, p in net.collect_params().items()}


def train(layer_class, mode, device, rng, every):
    mx.random.seed(2)
    net = deep_net(layer_class, device, dropout=0.4)
    outer = in_mode(net, mode)
    trainer = gluon.Trainer(net.collect_params(), "adam", {"learning_rate": 0.01})
    monitor = Monitor(outer, every) if every else None
    for _ in range(5):
        train_step(outer, trainer, array(rng.normal(size=(6, 3, 8, 8)), device, "float32"))
        if monitor:
            monitor.step()
    if monitor:
        monitor.close()
        assert len(monitor.records) == 3 * len(range(0, 5, every))
    after = values(net)
    after["random numbers"] = mx.nd.random.uniform(shape=(4,), ctx=device).asnumpy()
    return after


@kinds
@modes
def test_results_are_bit_identical(layer_class, mode, device):
    alone, *watched = (
        train(layer_class, mode, device, np.random.default_rng(3), every) for every in (0, 1, 2)
    )
    for other in watched:
        assert other.keys() == alone.keys()
        differing = [name for name in alone if alone[name].tobytes() != other[name].tobytes()]
        assert not differing


@pytest.mark.parametrize(("traced", "later"), [("portable", "native"), ("native", "portable")])
def test_a_net_is_observed_with_the_backend_it_was_traced_with(traced, later, device, rng):
    x = array(rng.normal(size=(6, 3, 8, 8)), device, "float32")
    found = []
    try:
        for watched in (False, True):
            mx.random.seed(2)
            net = deep_net(ScratchBatchNorm, device)
            net.hybridize()
            with use_backend(traced):
                net(x)
            with use_backend(later):
                monitor = Monitor(net)
                if not watched:
                    monitor.close()
                train_step(net, None, x)
                if watched:
                    monitor.step()
                    monitor.close()
                    assert len(monitor.records) == 3
            found.append(values(net))
    except BackendError as error:
        pytest.skip(str(error))
    assert not [name for name in found[0] if found[0][name].tobytes() != found[1][name].tobytes()]


class Counted(HybridBlock):
    """Counts how often it is traced."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer
        self.traced = 0

    def hybrid_forward(self, F, x):
        self.traced += F is mx.sym
        return self.layer(x)


@kinds
def test_traces_once_and_leaves_nothing_behind(layer_class, device, rng):
    net = Counted(layer_class(in_channels=4))
    net.initialize(ctx=device)
    net.hybridize()
    x = array(rng.normal(size=(6, 4)), device, "float32")
    train_step(net, None, x)
    op, graph, traced = net._cached_op, net._cached_graph, net.traced
    with Monitor(net, every=2) as monitor:
        for _ in range(5):
            train_step(net, None, x)
            monitor.step()
            assert net._cached_op is op
    assert len(monitor.records) == 3
    assert net.traced == traced + 1
    assert (net._cached_op, net._cached_graph) == (op, graph)
    assert not hooks(net)
    monitor.close()
    train_step(net, None, x)
    assert (net.traced, len(monitor.records)) == (traced + 1, 3)


def test_no_trace_and_no_hook_of_unobserved_steps_has_an_effect(device, rng):
    net = Counted(ScratchBatchNorm(in_channels=4))
    net.initialize(ctx=device)
    net.hybridize()
    x = array(rng.normal(size=(6, 4)), device, "float32")
    net(x)
    traced = net.traced
    with Monitor(net, every=100) as monitor:
        with pytest.warns(UserWarning, match="no norm layer"):
            monitor.step()
        for _ in range(3):
            train_step(net, None, x)
            monitor.step()
    assert (net.traced, monitor.records) == (traced, [])


@kinds
def test_hybridizing_again_is_noticed(layer_class, device, rng):
    _, net = one_layer(layer_class, device, "hybrid")
    x = array(rng.normal(size=(6, 4)), device, "float32")
    with Monitor(net) as monitor:
        train_step(net, None, x)
        monitor.step()
        with pytest.warns(UserWarning, match="is being hybridized while still having"):
            net.hybridize(static_alloc=True)
        train_step(net, None, x * 3)
        monitor.step()
        with pytest.warns(UserWarning, match="is being hybridized while still having"):
            net.hybridize(False)
        train_step(net, None, x * 9)
        monitor.step()
    found = [r["batch_var_max"] for r in monitor.records]
    np.testing.assert_allclose(found, found[0] * np.array([1, 9, 81]), rtol=1e-5)


@kinds
def test_an_error_in_the_net_leaves_it_as_it_was(layer_class, device, rng):
    _, net = one_layer(layer_class, device, "hybrid")
    x = array(rng.normal(size=(6, 4)), device, "float32")
    train_step(net, None, x)
    op = net._cached_op
    with Monitor(net) as monitor:
        with pytest.raises(ValueError, match="argument structure"), autograd.record():
            net(x, x)
        monitor.close()
        assert net._cached_op is op
    with Monitor(net) as monitor:
        with pytest.raises(ValueError, match="argument structure"), autograd.record():
            net(x, x)
        train_step(net, None, x)
        monitor.step()
        assert net._cached_op is op
    assert monitor.records[0]["calls"] == 1


@kinds
def test_an_error_before_the_graph_runs_observes_no_other_call(layer_class, device, rng):
    layer, net = one_layer(layer_class, device, "hybrid")
    x = array(rng.normal(size=(6, 4)), device, "float32")
    train_step(net, None, x)
    with Monitor(net) as monitor:
        data, layer.gamma.data = layer.gamma.data, None
        with pytest.raises(TypeError), autograd.record():
            net(x)
        layer.gamma.data = data
        net(x)
        with pytest.warns(UserWarning, match="no norm layer"):
            monitor.step()
    assert not monitor.records


class TwoParts(Block):
    """A plain block of two hybridized ones, of which the first has two inputs and two outputs."""

    def __init__(self, layer_class):
        super().__init__()
        self.first = Pair(layer_class)
        self.second = nn.HybridSequential()
        self.second.add(layer_class(), nn.Dense(1))

    def forward(self, x, y):
        a, (b,) = self.first(x, [y])
        return self.second(a * b)


class Pair(HybridBlock):
    def __init__(self, layer_class):
        super().__init__()
        self.layer = layer_class()
        self.unused = layer_class()

    def hybrid_forward(self, F, x, y):
        self.unused(x)
        return self.layer(x), [y[0] + 1]


@kinds
@pytest.mark.parametrize("hybridize", [False, True])
def test_several_graphs_and_a_layer_whose_result_is_not_used(layer_class, hybridize, device, rng):
    net = TwoParts(layer_class)
    net.initialize(ctx=device)
    x, y = (array(rng.normal(size=(6, 4)), device, "float32") for _ in range(2))
    net(x, y)
    if hybridize:
        net.hybridize()
        with pytest.warns(UserWarning, match="is not used by any computation"):
            net(x, y)
    with Monitor(net) as monitor:
        train_step(net, None, x, y)
        monitor.step()
    unused = net.first.unused
    expected = [net.first.layer.name, unused.name, net.second[0].name]
    if hybridize:
        expected.remove(unused.name)
        assert not unused.running_mean.data().asnumpy().any()
    assert sorted(r["layer"] for r in monitor.records) == sorted(expected)


class Loop(HybridBlock):
    def __init__(self):
        super().__init__()
        self.before = ScratchBatchNorm(in_channels=4)
        self.inside = ScratchBatchNorm(in_channels=4)

    def hybrid_forward(self, F, x):
        def body(item, state):
            y = self.inside(item)
            return y, state

        y, _ = F.contrib.foreach(body, self.before(x).expand_dims(0), F.zeros((1,)))
        return y


@pytest.mark.parametrize(("mode", "seen"), [("eager", 2), ("hybrid", 1)])
def test_layers_in_a_loop(mode, seen, device, rng):
    net = Loop()
    net.initialize(ctx=device)
    outer = in_mode(net, mode)
    x = rng.normal(3, 1, (6, 4))
    with Monitor(outer) as monitor:
        with autograd.record():  # without backward, which MXNet cannot do for a loop in a graph
            outer(array(x, device, "float32"))
        monitor.step()
    assert len(monitor.records) == seen
    mx.nd.waitall()
    np.testing.assert_allclose(
        net.before.running_mean.data().asnumpy(), 0.1 * x.mean(axis=0), rtol=1e-5
    )
    # Training moved the layer in the loop once, not twice.
    np.testing.assert_allclose(
        net.inside.running_var.data().asnumpy(), 0.9 + 0.1 * np.ones(4), rtol=1e-4
    )
