"""Population statistics of a net's norm layers, against NumPy over the concatenated data."""

from scratchbn import ScratchBatchNorm, recalibrate

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import autograd, gluon
from mxnet.gluon import nn
from recalibrated_nets import EXACT, batches_of, kinds, population, statistics

# The statistics are computed in float64 and kept in the layer's dtype: one rounding.
KEPT = {"float16": 1.3e-7, "float32": 1.3e-7, "float64": 1e-12}


@kinds
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((7, 3), 1), ((4, 3, 5, 2), 1), ((4, 5, 2, 3), -1), ((3, 6), 0)]
)
def test_equals_the_statistics_of_all_data_at_once(layer_class, shape, axis, dtype, device, rng):
    layer = layer_class(axis=axis, in_channels=3)
    layer.initialize(ctx=device)
    layer.cast(dtype)
    parts = [array(rng.normal(5, 3, shape), device, dtype) for _ in range(3)]
    assert recalibrate(layer, parts, report=True)[1] == 3
    for actual, expected in zip(statistics(layer), population([p.asnumpy() for p in parts], axis)):
        np.testing.assert_allclose(actual, expected, rtol=KEPT[dtype])


@kinds
def test_large_mean_in_float32(layer_class, device, rng):
    layer = layer_class(in_channels=2)
    layer.initialize(ctx=device)
    parts = [array(rng.normal(1e5, 1, (n, 2)), device, "float32") for n in (300, 7)]
    recalibrate(layer, parts)
    expected = population([p.asnumpy() for p in parts])
    np.testing.assert_allclose(statistics(layer)[1], expected[1], rtol=1e-6)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    mean=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_does_not_depend_on_the_division_into_batches(device, sizes, mean, seed):
    data = np.random.default_rng(seed).normal(mean, 2, (sum(sizes), 3, 2))
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    layer.cast("float64")
    parts = np.split(data, np.cumsum(sizes)[:-1])
    assert recalibrate(layer, [array(p, device) for p in parts], report=True)[1] == len(sizes)
    mean, variance = population([data])
    np.testing.assert_allclose(statistics(layer)[0], mean, rtol=1e-12)
    np.testing.assert_allclose(statistics(layer)[1], variance, rtol=1e-10, atol=1e-8)


@kinds
def test_cumulative_is_the_plain_average_of_unequal_batches(layer_class, device, rng):
    layer = layer_class(in_channels=2)
    layer.initialize(ctx=device)
    layer.cast("float64")
    parts = batches_of(rng, device, sizes=(5, 1, 2))
    recalibrate(layer, parts, mode="cumulative")
    each = [population([p.asnumpy()]) for p in parts]
    for actual, expected in zip(statistics(layer), np.mean(each, axis=0)):
        np.testing.assert_allclose(actual, expected, **EXACT)
    assert not np.allclose(statistics(layer)[1], population([p.asnumpy() for p in parts])[1])


def test_cumulative_equals_training_with_momentum_none(device, rng):
    parts = batches_of(rng, device)
    layers = [ScratchBatchNorm(momentum=None, in_channels=2) for _ in range(2)]
    for layer in layers:
        layer.initialize(ctx=device)
        layer.cast("float64")
    for x in parts:
        with autograd.train_mode():
            layers[0](x)
    recalibrate(layers[1], parts, mode="cumulative")
    for trained, actual in zip(statistics(layers[0]), statistics(layers[1])):
        np.testing.assert_allclose(actual, trained, **EXACT)
    assert layers[1].num_batches.data().asscalar() == 3


@pytest.mark.parametrize("mode", ["population", "cumulative"])
def test_unbiased_variance(mode, device, rng):
    layer = ScratchBatchNorm(in_channels=2, unbiased_variance=True)
    layer.initialize(ctx=device)
    layer.cast("float64")
    parts = [array(rng.normal(size=(n, 2)), device) for n in (5, 1, 3)]
    recalibrate(layer, parts, mode=mode)
    held = [p.asnumpy() for p in parts]
    if mode == "population":
        expected = population(held, ddof=1)[1]
    else:  # a batch of one value has no unbiased variance
        expected = np.mean([population([p], ddof=1)[1] for p in (held[0], held[2])], axis=0)
    np.testing.assert_allclose(statistics(layer)[1], expected, **EXACT)


@kinds
def test_layers_below_see_what_training_puts_out(layer_class, device, rng):
    first, second = layer_class(in_channels=2), layer_class(in_channels=2)
    net = nn.HybridSequential()
    net.add(first, second)
    net.initialize(ctx=device)
    net.cast("float64")
    first.gamma.set_data(mx.nd.array([2, -3]))
    first.beta.set_data(mx.nd.array([1, 4]))
    parts = batches_of(rng, device)
    recalibrate(net, parts)
    outputs = []
    for x in (p.asnumpy() for p in parts):
        mean, variance = (v.reshape(1, 2, 1, 1) for v in population([x]))
        scale, shift = (np.reshape(v, (1, 2, 1, 1)) for v in ([2, -3], [1, 4]))
        outputs.append((x - mean) / np.sqrt(variance + 1e-5) * scale + shift)
    for layer, seen in ((first, [p.asnumpy() for p in parts]), (second, outputs)):
        for actual, expected in zip(statistics(layer), population(seen)):
            np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_layer_called_twice_counts_both_calls(device, rng):
    layer = ScratchBatchNorm(in_channels=3)

    class Twice(gluon.HybridBlock):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def hybrid_forward(self, F, x):
            return self.layer(x) + self.layer(x * 2)

    net = Twice()
    net.initialize(ctx=device)
    net.cast("float64")
    net.hybridize()
    x = rng.normal(size=(6, 3))
    assert recalibrate(net, [array(x, device)], report=True)[1] == 1
    for actual, expected in zip(statistics(layer), population([x, 2 * x])):
        np.testing.assert_allclose(actual, expected, **EXACT)


def test_variants_are_set_to_the_statistics_of_their_input(device, rng):
    class Halved(ScratchBatchNorm):
        """Normalizes with other statistics than the batch's, and moves to others still."""

        def statistics(self, F, view, running_mean, running_var, select):
            batch = super().statistics(F, view, running_mean, running_var, select)
            return batch._replace(variance=batch.variance / 2)

        def update(self, F, running, batch, count):
            return running + 1

    layer = Halved(in_channels=2)
    layer.initialize(ctx=device)
    layer.cast("float64")
    parts = batches_of(rng, device)
    recalibrate(layer, parts)
    for actual, expected in zip(statistics(layer), population([p.asnumpy() for p in parts])):
        np.testing.assert_allclose(actual, expected, **EXACT)


@kinds
def test_all_copies_on_several_devices_are_set(layer_class, device, second_device, rng):
    layer = layer_class(in_channels=2)
    layer.initialize(ctx=[device, second_device])
    layer.cast("float64")
    layer.running_mean.list_data()[1][:] = 9
    values = [rng.normal(size=(n, 2)) for n in (3, 5)]
    recalibrate(layer, [array(values[0], device), array(values[1], second_device)])
    for on in (device, second_device):
        for actual, expected in zip(statistics(layer, on), population(values)):
            np.testing.assert_allclose(actual, expected, **EXACT)


def test_numpy_semantics(device, rng):
    mx.npx.set_np()
    net = nn.HybridSequential()
    net.add(ScratchBatchNorm(in_channels=3))
    net.initialize(ctx=device)
    net.hybridize()
    parts = [array(rng.normal(size=(n, 3)), device, "float32") for n in (4, 2)]
    empty = mx.np.zeros((0, 3), ctx=device)
    assert recalibrate(net, [parts[0], empty, parts[1]], report=True)[1] == 3
    for actual, expected in zip(statistics(net[0]), population([p.asnumpy() for p in parts])):
        np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=1e-8)


def test_gluoncv_layer_without_cudnn(device, rng):
    block = pytest.importorskip("gluoncv.nn.block")
    layer = block.BatchNormCudnnOff(in_channels=2)
    layer.initialize(ctx=device)
    parts = batches_of(rng, device, dtype="float32")
    recalibrate(layer, parts)
    for actual, expected in zip(statistics(layer), population([p.asnumpy() for p in parts])):
        np.testing.assert_allclose(actual, expected, rtol=2e-7)


def test_spoiled_statistics_are_repaired(device, rng):
    """A trained net whose running statistics are spoiled classifies by chance, then well again."""
    net = nn.HybridSequential()
    net.add(nn.Dense(16), ScratchBatchNorm(), nn.Activation("relu"), nn.Dense(2))
    net.initialize(mx.init.Xavier(), ctx=device)
    net.hybridize()
    labels = rng.integers(0, 2, 400)
    x = rng.normal(size=(400, 6)) + 3 * labels[:, None]
    batches = [
        (array(x[i : i + 50], device, "float32"), array(labels[i : i + 50], device, "float32"))
        for i in range(0, 400, 50)
    ]
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.2})
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    for _ in range(4):
        for data, label in batches:
            with autograd.record():
                value = loss(net(data), label)
            value.backward()
            trainer.step(50)

    def accuracy():
        right = [(net(d).argmax(axis=1) == y).mean().asscalar() for d, y in batches]
        return np.mean(right)

    net[1].running_mean.set_data(array(rng.normal(0, 50, 16), device, "float32"))
    net[1].running_var.set_data(array(np.full(16, 1e-3), device, "float32"))
    spoiled = accuracy()
    recalibrate(net, batches)
    assert spoiled < 0.8
    assert accuracy() > 0.95
