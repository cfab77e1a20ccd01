"""What a recalibration leaves as it was: all but the running statistics of layers that train."""

import warnings

from scratchbn import ScratchBatchNorm, freeze, recalibrate
from scratchbn._net import norm_layers

import mxnet as mx
import numpy as np
import pytest
from helpers import MODES, array, in_mode, untrained
from mxnet import autograd, gluon
from mxnet.gluon import SymbolBlock, nn
from recalibrated_nets import (
    EXACT,
    Interrupted,
    batches_of,
    build_net,
    changed,
    kinds,
    population,
    states,
    statistics,
)


@kinds
@pytest.mark.parametrize("mode", MODES[:-1])
def test_only_running_statistics_change_in_every_mode(layer_class, mode, device, rng):
    net = build_net(layer_class, device)
    outer = in_mode(net, mode)
    x, *rest = batches_of(rng, device)
    with autograd.record():
        y = outer(x).sum()
    y.backward()
    graphs = [(b, b._active, b._cached_op, b._cached_graph, b._flags) for b in (outer, net, *net)]
    options = [(layer, dict(layer._kwargs)) for layer, _ in norm_layers(dict.fromkeys(net, ""))]
    before = states(outer)
    assert recalibrate(outer, [x, *rest], report=True)[1] == 3
    after = states(outer)
    assert changed(before, after) == {
        p.name for layer, _ in options for p in (layer.running_mean, layer.running_var)
    }
    for actual, expected in zip(statistics(net[0]), population([p.asnumpy() for p in (x, *rest)])):
        np.testing.assert_allclose(actual, expected, **EXACT)
    for block, *expected in graphs:
        for actual, old in zip(
            (block._active, block._cached_op, block._cached_graph, block._flags), expected
        ):
            assert actual is old
        assert not block._forward_hooks
        assert not block._forward_pre_hooks
    assert all(layer._kwargs == old for layer, old in options)
    # The net's own graph reads the new statistics.
    inference = outer(x).asnumpy()
    net.hybridize(False)
    np.testing.assert_allclose(inference, net(x).asnumpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.values
@kinds
def test_frozen_layers_are_left_alone(layer_class, device, rng):
    net = build_net(layer_class, device)
    parts = batches_of(rng, device)
    net(parts[0])
    with untrained():
        freeze(net[0])
    before = states(net)
    recalibrate(net, parts)
    moved = changed(before, states(net))
    assert net[0].running_mean.name not in moved
    assert net[2].running_mean.name in moved


def test_no_layer_to_set_takes_no_batch(device):
    plain = nn.Dense(2)
    frozen = ScratchBatchNorm(in_channels=2, use_global_stats=True)
    data = iter([mx.nd.ones((3, 2))])
    assert recalibrate(plain, data, report=True)[1] == 0
    assert recalibrate(frozen, data, report=True)[1] == 0
    assert len(list(data)) == 1


def test_a_layer_that_no_batch_reaches_keeps_its_statistics(device):
    net = nn.Sequential()
    net.add(ScratchBatchNorm(in_channels=2), ScratchBatchNorm(in_channels=5))
    net.initialize(ctx=device)
    net.forward = net[0]
    recalibrate(net, [array([[1, 2], [3, 4]], device, "float32")])
    np.testing.assert_array_equal(statistics(net[0])[0], [2, 3])
    np.testing.assert_array_equal(statistics(net[1])[1], np.ones(5))


def test_deferred_initialization_is_finished_first(device, rng):
    net = nn.HybridSequential()
    net.add(ScratchBatchNorm(), nn.Dense(2))
    net.initialize(ctx=device)
    net.hybridize()
    x = rng.normal(size=(4, 3))
    recalibrate(net, [array(x, device, "float32")])
    np.testing.assert_allclose(statistics(net[0])[1], x.var(axis=0), rtol=1e-5)


def test_trainer_goes_on(device, rng):
    """The copy in a Trainer's key-value store is neither dropped nor older than the layer's."""
    net = build_net(ScratchBatchNorm, device, "float32")
    store = mx.kv.create("local")
    trainer = gluon.Trainer(net.collect_params(), "adam", {}, kvstore=store, update_on_kvstore=True)
    parts = batches_of(rng, device, dtype="float32")

    def step():
        with autograd.record():
            y = (net(parts[0]) ** 2).sum()
        y.backward()
        trainer.step(1)

    step()
    assert trainer._kv_initialized
    recalibrate(net, parts)
    assert trainer._kv_initialized
    expected = statistics(net[0])
    net[0]._kwargs["momentum"] = 1.0
    step()
    for actual, old in zip(statistics(net[0]), expected):
        np.testing.assert_array_equal(actual, old)


def test_layers_in_imported_graphs_are_set_too(device, rng, tmp_path):
    net = build_net(ScratchBatchNorm, device, "float32")
    parts = batches_of(rng, device, dtype="float32")
    net.hybridize()
    net(parts[0])
    net.export(str(tmp_path / "net"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cannot decide type")
        imported = SymbolBlock.imports(
            str(tmp_path / "net-symbol.json"),
            ["data"],
            str(tmp_path / "net-0000.params"),
            ctx=device,
        )
    outer = nn.HybridSequential()
    outer.add(imported, ScratchBatchNorm(in_channels=2))
    outer[1].initialize(ctx=device)
    before = states(outer)
    assert recalibrate(outer, parts, report=True)[1] == 3
    after = states(outer)
    moving = {name for name in outer.collect_params() if "running" in name}
    assert changed(before, after) == moving


class Renormalizing(ScratchBatchNorm):
    """Normalizes with its running mean in training too, while that moves."""

    fails = False

    def statistics(self, F, view, running_mean, running_var, select):
        batch = super().statistics(F, view, running_mean, running_var, select)
        return batch._replace(low=batch.low - batch.mean + running_mean)

    def transform(self, F, view, batch, gamma, beta, epsilon):
        if self.fails:
            raise Interrupted
        return super().transform(F, view, batch, gamma, beta, epsilon)


def variant_net(device):
    net = nn.HybridSequential()
    net.add(Renormalizing(in_channels=2), ScratchBatchNorm(in_channels=2))
    net.initialize(ctx=device)
    net.cast("float64")
    return net


def test_variants_see_their_old_statistics_throughout(device, rng):
    net = variant_net(device)
    x = array(rng.normal(3, 1, (5, 2)), device)
    recalibrate(net, [x])
    once = statistics(net[1])
    net = variant_net(device)
    recalibrate(net, [x, x, x])
    for actual, expected in zip(statistics(net[1]), once):
        np.testing.assert_allclose(actual, expected, **EXACT)


def test_an_error_between_the_move_and_the_result_of_a_layer(device, rng):
    net = variant_net(device)
    net[0].fails = True
    before = states(net)
    with pytest.raises(Interrupted):
        recalibrate(net, [array(rng.normal(3, 1, (5, 2)), device)])
    assert not changed(before, states(net))
