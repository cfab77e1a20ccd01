"""Population statistics of a net's norm layers, against NumPy over the concatenated data."""

import importlib.util
import warnings

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, freeze, recalibrate
from scratchbn._net import norm_layers

import mxnet as mx
import numpy as np
import pytest
from helpers import MODES, array, in_mode
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import autograd, gluon
from mxnet.gluon import SymbolBlock, nn

kinds = pytest.mark.parametrize("layer_class", [ScratchBatchNorm, nn.BatchNorm])
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# The statistics are computed in float64 and kept in the layer's dtype: one rounding.
KEPT = {"float16": 1.3e-7, "float32": 1.3e-7, "float64": 1e-12}


def population(parts, axis=1, ddof=0):
    """Mean and variance per channel of all parts together, in float64."""
    per_channel = [np.moveaxis(np.float64(p), axis, 0).reshape(p.shape[axis], -1) for p in parts]
    together = np.concatenate(per_channel, axis=1)
    return together.mean(axis=1), together.var(axis=1, ddof=ddof)


def statistics(layer, device=None):
    mx.nd.waitall()
    return [p.data(device).asnumpy() for p in (layer.running_mean, layer.running_var)]


def build_net(layer_class, device, dtype="float64"):
    """Two convolutions and a dense layer, a norm layer after each; the second below Dropout."""
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(layer_class(in_channels=2, prefix="first_"), nn.Conv2D(3, 3, in_channels=2))
        net.add(layer_class(in_channels=3), nn.Activation("relu"), nn.Dropout(0.5))
        net.add(nn.Dense(4), layer_class(momentum=0.7), nn.Dense(2))
    net.initialize(ctx=device)
    net.cast(dtype)
    return net


def batches_of(rng, device, sizes=(5, 1, 4), dtype="float64"):
    return [array(rng.normal(3, 2, (n, 2, 6, 6)), device, dtype) for n in sizes]


def states(net):
    """All parameters and gradients by name."""
    mx.nd.waitall()
    found = {}
    for name, parameter in net.collect_params().items():
        for i, value in enumerate(parameter._data or ()):
            found[name, i] = value.asnumpy()
        for i, value in enumerate(parameter._grad or ()):
            found[name, "grad", i] = value.asnumpy()
    return found


def changed(before, after):
    assert before.keys() == after.keys()
    return {name[0] for name in before if before[name].tobytes() != after[name].tobytes()}


# --- what is set --------------------------------------------------------------------------------


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


class Interrupted(Exception):
    pass


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


# --- what is left alone -------------------------------------------------------------------------


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


@kinds
def test_frozen_layers_are_left_alone(layer_class, device, rng):
    net = build_net(layer_class, device)
    parts = batches_of(rng, device)
    net(parts[0])
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


# --- errors -------------------------------------------------------------------------------------


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
