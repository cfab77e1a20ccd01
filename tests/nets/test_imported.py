"""Norms in the graph of a SymbolBlock: converted, frozen, recalibrated, monitored."""

import warnings
from contextlib import nullcontext

from scratchbn import (
    ScratchBatchNorm,
    ScratchBatchNormReLU,
    freeze,
    recalibrate,
    to_builtin,
    to_scratch,
    unfreeze,
)
from scratchbn.monitor import Monitor

# isort: split
import mxnet as mx
import numpy as np
import pytest
from helpers import untrained
from mxnet import autograd
from mxnet.gluon import SymbolBlock, Trainer, nn

LAYERS = {"builtin": nn.BatchNorm, "scratch": ScratchBatchNorm, "relu": ScratchBatchNormReLU}


def live(kind="scratch", **options):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Dense(4, in_units=3), LAYERS[kind](in_channels=4, **options))
        net.add(nn.Dense(5, in_units=4), LAYERS[kind](in_channels=5, **options))
        net.add(net[1] if kind == "twice" else nn.Dense(2, in_units=5))
    net.initialize(mx.init.Uniform(1))
    for i, x in enumerate(batches(3, seed=9)):
        with autograd.record():
            net(x + i)
    return net


def batches(count=4, seed=0):
    rng = np.random.default_rng(seed)
    return [mx.nd.array(rng.normal(2, 3, (6, 3))) for _ in range(count)]


def imported(net):
    """A SymbolBlock with Parameters of its own, as imports makes it."""
    symbol = net(mx.sym.var("data"))
    block = SymbolBlock(symbol, mx.sym.var("data", dtype="float32"))
    values = {name: p.data().copy() for name, p in net.collect_params().items()}
    block.collect_params().load_dict(values)
    return block


def imported_inside(net, hybridize):
    """What `imported` returns, and a net that it is in."""
    block, outer = imported(net), nn.HybridSequential()
    outer.add(block)
    outer.hybridize(hybridize)
    return block, outer


def state(block):
    mx.nd.waitall()
    return {name: p.data().asnumpy() for name, p in block.collect_params().items()}


def train(block, data):
    trainer = Trainer(block.collect_params(), "sgd", {"learning_rate": 0.01})
    for x in data:
        with autograd.record():
            loss = (block(x) ** 2).sum()
        loss.backward()
        trainer.step(len(x))


def assert_same(one, other, rtol=1e-5):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=rtol, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_trained_unfrozen_as_the_layers_are(kind, hybridize):
    net = live(kind)
    block, outer = imported_inside(net, hybridize)
    outer(batches(1)[0])
    names = tuple(f"0.{net[i].name}" for i in (1, 3))
    with untrained() if kind == "builtin" else nullcontext():
        assert freeze(outer, parameters=True, report=True)[1] == names
    assert freeze(outer, parameters=True, report=True)[1] == ()
    with untrained() if kind == "builtin" else nullcontext():
        freeze(net, parameters=True)
    before = state(block)
    for trained in (net, outer):
        train(trained, batches())
    assert_same(state(net), state(block))
    for name, value in state(block).items():
        moved = not np.array_equal(value, before[name])
        assert moved == name.endswith(("weight", "bias"))
    assert unfreeze(outer, report=True)[1] == names
    assert unfreeze(outer, report=True)[1] == ()
    unfreeze(net)
    for trained in (net, outer):
        train(trained, batches())
    assert_same(state(net), state(block), rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.5, None])
def test_a_layer_called_twice_is_frozen_and_comes_back(momentum):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(ScratchBatchNorm(in_channels=3, momentum=momentum), nn.Dense(3, in_units=3))
    net.add(net[0])
    net.initialize()
    block = imported(net)
    for step in (lambda _: None, freeze, unfreeze):
        step(net)
        step(block)
        train(net, batches(2))
        train(block, batches(2))
        assert_same(state(net), state(block), rtol=1e-4)


def test_what_was_frozen_before_stays_so_and_files_remember(tmp_path):
    block = imported(live("builtin", use_global_stats=True))
    with untrained():
        assert len(freeze(block, report=True)[1]) == 2
    assert len(unfreeze(block, report=True)[1]) == 2
    assert block(mx.sym.var("data")).attr_dict()["net_batchnorm0_fwd"]["use_global_stats"] == "True"
    block = imported(live())
    freeze(block)
    block(batches(1)[0])
    block.export(str(tmp_path / "frozen"))
    again = SymbolBlock.imports(
        str(tmp_path / "frozen-symbol.json"), ["data"], str(tmp_path / "frozen-0000.params")
    )
    before = state(again)
    assert len(unfreeze(again, report=True)[1]) == 2
    train(again, batches())
    name = "net_batchnorm0_running_mean"
    assert not np.array_equal(state(again)[name], before[name])


def test_converted_there_and_back_on_the_same_parameters():
    block = imported(live("builtin"))
    parameters = dict(block.collect_params())
    twin = imported(live("builtin"))
    twin.collect_params().load_dict({n: p.data().copy() for n, p in parameters.items()})
    _, report = to_scratch(block, report=True)
    assert [entry.path for entry in report.converted] == ["net_batchnorm0", "net_batchnorm1"]
    assert "BatchNorm" not in {n.attr("op") for n in block(mx.sym.var("data")).get_internals()}
    for trained in (block, twin):
        train(trained, batches())
    assert_same(state(block), state(twin), rtol=1e-4)
    _, report = to_builtin(block, report=True)
    assert len(report.converted) == 2
    assert dict(block.collect_params()) == parameters
    for trained in (block, twin):
        train(trained, batches())
    assert_same(state(block), state(twin), rtol=1e-4)


def test_nothing_is_converted_if_one_cannot_be():
    outer = nn.HybridSequential()
    outer.add(ScratchBatchNorm(in_channels=3), imported(live(momentum=None)))
    graph = outer[1](mx.sym.var("data")).tojson()
    with pytest.raises(ValueError, match="momentum=None has no counterpart"):
        to_builtin(outer)
    assert type(outer[0]) is ScratchBatchNorm
    assert outer[1](mx.sym.var("data")).tojson() == graph


def test_frozen_norms_are_converted_frozen():
    block = imported(live("builtin"))
    with untrained():
        freeze(block)
    to_scratch(block)
    before = state(block)["net_batchnorm0_running_mean"]
    train(block, batches())
    np.testing.assert_array_equal(state(block)["net_batchnorm0_running_mean"], before)
    to_builtin(block)
    assert len(unfreeze(block, report=True)[1]) == 2
    train(block, batches())
    assert not np.array_equal(state(block)["net_batchnorm0_running_mean"], before)


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", ["population", "cumulative"])
def test_recalibrated_as_the_layers_are(kind, hybridize, mode):
    net = live(kind)
    block, outer = imported_inside(net, hybridize)
    before = state(block)
    data = batches(5, seed=4)
    assert recalibrate(net, data, mode=mode, progress=False, report=True)[1] == 5
    assert recalibrate(outer, data, mode=mode, progress=False, report=True)[1] == 5
    assert_same(state(net), state(block))
    moved = [name for name, value in state(block).items() if (value != before[name]).any()]
    assert len(moved) == 4
    freeze(outer)
    assert recalibrate(outer, data, progress=False, report=True)[1] == 0


def test_an_error_leaves_the_statistics():
    block = imported(live())
    before = state(block)
    with pytest.raises(ValueError, match="'net_batchnorm0' has none"):
        recalibrate(block, [*batches(1), mx.nd.full((6, 3), np.nan)], progress=False)
    assert_same(state(block), before)
    train(block, batches(1))
    assert block(batches(1)[0]).shape == (6, 2)


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("kind", ["builtin", "scratch"])
def test_monitored_as_the_layers_are(kind, hybridize):
    net = live(kind)
    _, outer = imported_inside(net, hybridize)
    net.hybridize(hybridize)
    with Monitor(net) as one, Monitor(outer) as other:
        for x in batches():
            train(net, [x])
            train(outer, [x])
            one.step()
            other.step()
    assert len(other.records) == len(one.records) == 8
    for ours, theirs in zip(one.records, other.records):
        assert ours["layer"] == theirs["layer"]
        for field, value in ours.items():
            if field != "layer":
                assert theirs[field] == pytest.approx(value, rel=1e-3, abs=1e-4)


def test_what_does_not_tell_its_options_is_named():
    class Variant(ScratchBatchNorm):
        def transform(self, F, view, batch, gamma, beta, epsilon):
            return super().transform(F, view, batch, gamma, beta * 2, epsilon)

    net = Variant(in_channels=3, prefix="odd_")
    net.initialize()
    block = imported(net)
    with pytest.warns(UserWarning, match="odd_running_mean"):
        assert freeze(block, report=True)[1] == ()
    _, report = to_builtin(block, report=True)
    assert report.converted == ()
    assert len(report.skipped) == 1


def test_untrained_statistics_are_warned_of():
    net = nn.HybridSequential()
    net.add(ScratchBatchNorm(in_channels=3), nn.BatchNorm(in_channels=3))
    net.initialize()
    with pytest.warns(UserWarning, match=r"running_var is 1 throughout in 2 of 2 .*\(0\)"):
        freeze(net)
    unfreeze(net)
    net.add(nn.Dense(1, in_units=3))
    net[2].initialize()
    train(net, batches(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze(net)


def test_a_detector_with_an_imported_backbone():
    model_zoo = pytest.importorskip("gluoncv.model_zoo")
    net = model_zoo.get_model("ssd_512_mobilenet1.0_voc", pretrained=False, pretrained_base=False)
    net.initialize()
    x = mx.nd.random.normal(shape=(2, 3, 128, 128))
    assert len(to_scratch(net, report=True)[1].converted) == 35
    assert recalibrate(net, [x], progress=False, report=True)[1] == 1
    scores = net(x)[1].asnumpy()  # not the classes: boxes of nearly one score may change places
    assert len(freeze(net, report=True)[1]) == 35
    before = state(net)
    with autograd.train_mode():
        trained = net(x)
    assert trained[1].shape != scores.shape  # in training it returns what comes before the boxes
    assert_same(state(net), before, rtol=0)
    assert len(unfreeze(net, report=True)[1]) == 35
    assert len(to_builtin(net, report=True)[1].converted) == 35
    np.testing.assert_allclose(net(x)[1].asnumpy(), scores, rtol=1e-3, atol=1e-4)
    assert len(freeze(net, report=True)[1]) == 35


def test_numpy_semantics_stay():
    net = live()
    x = batches(1)[0]
    expected = net(x).asnumpy()
    mx.npx.set_np()
    block = SymbolBlock(net(x_symbol := mx.sym.var("data").as_np_ndarray()), x_symbol)
    block.collect_params().load_dict({n: p.data() for n, p in net.collect_params().items()})
    for action in (to_builtin, to_scratch, freeze, unfreeze):
        y = action(block)(x.as_np_ndarray())
        assert isinstance(y, mx.np.ndarray), action
        np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-5, atol=1e-6)
