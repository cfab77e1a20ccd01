"""Layers and nets that a conversion leaves alone, remarks on or refuses."""

from scratchbn import ScratchBatchNorm, freeze, to_builtin, to_scratch, unfreeze

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet.gluon import nn
from mxnet.gluon.contrib.nn import SyncBatchNorm
from norm_nets import SHAPE, ready, state

# What is left alone


class Doubled(nn.BatchNorm):
    def hybrid_forward(self, F, x, **parameters):
        return 2 * super().hybrid_forward(F, x, **parameters)


class DoubledSync(SyncBatchNorm):
    def __init__(self):
        super().__init__(num_devices=1)

    def hybrid_forward(self, F, x, **parameters):
        return 2 * super().hybrid_forward(F, x, **parameters)


class Mixin:
    def reset(self):
        self.running_mean.set_data(mx.nd.zeros_like(self.running_mean.data()))


class Resettable(Mixin, nn.BatchNorm):
    pass


class Slotted(nn.BatchNorm):
    __slots__ = ("extra",)


class Median(ScratchBatchNorm):
    def statistics(self, F, view, running_mean, running_var, select):
        return super().statistics(F, view, running_mean, running_var, select)


@pytest.mark.parametrize(
    ("convert", "layer", "reason"),
    [
        (to_scratch, DoubledSync, "has hybrid_forward of its own"),
        (to_scratch, Doubled, "has hybrid_forward of its own"),
        (to_scratch, Resettable, "has reset of its own"),
        (to_scratch, Slotted, "has __slots__, extra of its own"),
        (to_builtin, Median, "has statistics of its own"),
    ],
)
def test_layers_that_do_something_else_are_reported(convert, layer, reason):
    net = nn.HybridSequential()
    net.add(layer(), nn.BatchNorm() if convert is to_scratch else ScratchBatchNorm())
    before = state(net[0])
    _, report = convert(net, report=True)
    (entry,) = report.skipped
    assert (entry.path, entry.name, entry.kind) == ("0", net[0].name, type(net[0]).__name__)
    assert reason in entry.text
    assert state(net[0]) == before
    assert [done.path for done in report.converted] == ["1"]
    lines = str(report).splitlines()
    assert lines[0] == "1 converted, 1 skipped"
    assert lines[1].strip() == f"skipped 0 [{entry.name}] {entry.kind}: {entry.text}"


def test_a_layer_with_a_forward_set_on_the_instance_is_reported():
    layer = nn.BatchNorm()
    layer.hybrid_forward = lambda F, x, **parameters: x
    _, report = to_scratch(layer, report=True)
    assert "has hybrid_forward of its own" in report.skipped[0].text
    assert type(layer) is nn.BatchNorm


def test_a_layer_with_operator_options_is_reported():
    layer = nn.BatchNorm()
    layer._kwargs["output_mean_var"] = True
    _, report = to_scratch(layer, report=True)
    assert "output_mean_var" in report.skipped[0].text
    assert type(layer) is nn.BatchNorm


@pytest.mark.parametrize("hybrid", [False, True])
def test_an_offset_that_stops_counting_is_noted(device, rng, hybrid):
    """With center=False the built-in adds beta all the same."""
    layer = ready(nn.BatchNorm(in_channels=3, center=False), device)
    if hybrid:
        layer.hybridize()
    assert to_scratch(layer, report=True)[1].notes == to_builtin(layer, report=True)[1].notes == ()
    layer.beta.set_data(mx.nd.array([0, 2, 0], dtype="float64"))
    x = array(rng.normal(size=SHAPE), device)
    before = layer(x).asnumpy()
    _, report = to_scratch(layer, report=True)
    assert "beta is not 0" in report.notes[0].text
    shift = before - layer(x).asnumpy()
    np.testing.assert_allclose(shift[:, 1], 2, rtol=1e-12)
    np.testing.assert_allclose(shift[:, [0, 2]], 0, atol=1e-12)
    _, report = to_builtin(layer, report=True)
    assert "beta is not 0" in report.notes[0].text
    np.testing.assert_array_equal(layer(x).asnumpy(), before)


# Bad input


def edited(**options):
    layer = ScratchBatchNorm()
    layer._kwargs.update(options)
    return layer


def broken(**options):
    layer = nn.BatchNorm()
    layer._kwargs.update(options)
    return layer


@pytest.mark.parametrize(
    ("convert", "bad", "error", "text"),
    [
        (to_builtin, lambda: ScratchBatchNorm(momentum=None), ValueError, "momentum=None"),
        (to_builtin, lambda: edited(momentum=None), ValueError, "momentum=None"),
        (to_builtin, lambda: edited(unbiased_variance=True), ValueError, "unbiased_variance=True"),
        (to_builtin, lambda: edited(center=False), ValueError, "center was changed to False"),
        (to_scratch, lambda: broken(momentum=1.5), ValueError, "momentum must be .* got 1.5"),
        (to_scratch, lambda: broken(momentum=None), ValueError, "momentum must be .* got None"),
        (to_scratch, lambda: broken(eps=-1), ValueError, "epsilon must be .* got -1"),
        (to_scratch, lambda: broken(axis=1.5), TypeError, "axis must be .* got 1.5"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_changes(
    device, convert, bad, error, text
):
    good = nn.BatchNorm if convert is to_scratch else ScratchBatchNorm
    net = nn.HybridSequential()
    net.add(good(in_channels=3), nn.HybridSequential(), good(in_channels=3))
    net[1].add(nn.Dense(3), bad())
    before = [state(block) for block in (net, net[0], net[1], net[1][1], net[2])]
    with pytest.raises(error, match=rf"^1\.1 \({net[1][1].name}\) cannot be converted: .*{text}"):
        convert(net)
    assert [state(block) for block in (net, net[0], net[1], net[1][1], net[2])] == before


@pytest.mark.parametrize("function", [to_scratch, to_builtin, freeze, unfreeze])
@pytest.mark.parametrize("net", [None, "resnet", nn.BatchNorm, []])
def test_only_blocks_are_accepted(function, net):
    with pytest.raises(TypeError, match="net must be a gluon Block, got"):
        function(net)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("convert", [to_scratch, to_builtin])
def test_who_wants_no_report_gets_the_net_and_is_warned(convert):
    class Own(nn.BatchNorm if convert is to_scratch else ScratchBatchNorm):
        def hybrid_forward(self, F, x, *parameters, **named):
            return x

    net = nn.HybridSequential()
    net.add(nn.Dense(2))
    assert convert(net) is net  # and no warning, which would be an error here
    net.add(Own())
    with pytest.warns(UserWarning, match="hybrid_forward of its own") as warned:
        assert convert(net) is net
    assert warned[0].filename == __file__
    assert convert(net, report=True)[0] is net
    with pytest.raises(TypeError, match="report must be True or False"):
        convert(net, report=1)
