"""Data and arguments that recalibrate refuses, and that nothing has changed then."""

import importlib.util

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, recalibrate

import mxnet as mx
import numpy as np
import pytest
from helpers import array
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


def failing(parts, how):
    yield parts[0]
    if how == "loader":
        raise Interrupted
    yield {
        "shape": mx.nd.zeros((2, 5, 6, 6), dtype="float64", ctx=parts[0].ctx),
        "batch": "no array",
        "nan": parts[1] * float("nan"),
    }[how]


@kinds
@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("loader", Interrupted, None),
        ("shape", (ValueError, mx.MXNetError), None),
        ("batch", TypeError, "batch 1 is of type str"),
        pytest.param(
            *("nan", ValueError, r"that of '0' has none after 1 batches"), marks=pytest.mark.values
        ),
    ],
)
def test_errors_leave_everything_as_it_was(
    layer_class, hybridize, how, error, message, device, rng
):
    net = build_net(layer_class, device)
    if hybridize:
        net.hybridize()
    parts = batches_of(rng, device)
    net(parts[0])
    op = net._cached_op
    before = states(net)
    with pytest.raises(error, match=message):
        recalibrate(net, failing(parts, how))
    assert not changed(before, states(net))
    assert all(block._active is hybridize for block in (net, *net))
    assert net._cached_op is op
    assert not any(block._forward_hooks for block in (net, *net))


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_batches(count, device, rng):
    layer = ScratchBatchNorm(in_channels=2)
    layer.initialize(ctx=device)
    layer.cast("float64")
    wanted = 3 if count else None
    with pytest.raises(ValueError, match=f"at least {wanted or 1} batches, got {count}"):
        recalibrate(layer, batches_of(rng, device)[:count], wanted)
    np.testing.assert_array_equal(statistics(layer)[0], [0, 0])


def test_takes_no_more_batches_than_asked_for(device, rng):
    layer = ScratchBatchNorm(in_channels=2)
    layer.initialize(ctx=device)
    layer.cast("float64")
    parts = batches_of(rng, device)
    source = ((x, "a label") for x in parts)
    assert recalibrate(layer, source, 2, report=True)[1] == 2
    assert len(list(source)) == 1
    np.testing.assert_allclose(
        statistics(layer)[0], population([p.asnumpy() for p in parts[:2]])[0], **EXACT
    )


@pytest.mark.parametrize("mode", ["population", "cumulative"])
def test_unbiased_variance_of_one_element(mode, device):
    layer = ScratchBatchNorm(in_channels=2, unbiased_variance=True)
    layer.initialize(ctx=device)
    with pytest.raises(ValueError, match="at least 2 elements per channel for unbiased_variance"):
        recalibrate(layer, [mx.nd.array([[5, 6]], ctx=device)], mode=mode)
    np.testing.assert_array_equal(statistics(layer)[0], [0, 0])


@pytest.mark.values
def test_statistics_that_the_dtype_cannot_hold(device):
    layer = ScratchBatchNorm(in_channels=1)
    layer.initialize(ctx=device)
    with pytest.raises(ValueError, match=r"float32 can hold; .*running_var would be "):
        recalibrate(layer, [array([[1e30], [-1e30]], device, "float32")])
    np.testing.assert_array_equal(statistics(layer), [[0], [1]])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, []), {}, TypeError, "net must be a gluon Block, got None"),
        (("layer", mx.nd.ones((2, 2))), {}, TypeError, "iterable of batches, got NDArray"),
        (("layer", 3), {}, TypeError, "iterable of batches, got int"),
        (("layer", [[]]), {}, TypeError, "batch 0 is a list without items"),
        (("layer", [(1, 2)]), {}, TypeError, "batch 0 is a tuple that begins with int"),
        (("layer", [], 0), {}, ValueError, "batches must be at least 1, got 0"),
        (("layer", [], 2.0), {}, TypeError, "batches must be an integer, got 2.0"),
        (("layer", []), {"mode": "exact"}, ValueError, "population, cumulative, got 'exact'"),
        (("layer", []), {"mode": None}, TypeError, "population, cumulative, got None"),
        (("layer", []), {"progress": 1}, TypeError, "progress must be True or False, got 1"),
    ],
)
def test_bad_arguments(arguments, options, error, message, device):
    layer = ScratchBatchNormReLU(in_channels=2)
    layer.initialize(ctx=device)
    net, *rest = arguments
    with pytest.raises(error, match=message):
        recalibrate(layer if net == "layer" else net, *rest, **options)


def test_works_without_tqdm(device, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    layer = ScratchBatchNorm(in_channels=1)
    layer.initialize(ctx=device)
    assert recalibrate(layer, [mx.nd.ones((2, 1), ctx=device)], report=True)[1] == 1
