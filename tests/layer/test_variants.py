"""The variants against exact identities and a float64 oracle, in every mode; and their document."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace

from scratchbn import ScratchBatchNorm, to_builtin
from scratchbn.deploy import export_inference, fold
from scratchbn.parity.oracle import Step, batch_moments
from scratchbn.variants import BatchRenorm, GhostBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import (
    BLOCK_MODES,
    CLOSE,
    GRAPH_MODES,
    MODES,
    REPOSITORY,
    STATE,
    array,
    check_step,
    in_mode,
    infer,
    set_values,
    take_step,
    train_forward,
)
from mxnet import autograd, gluon
from mxnet.gluon import SymbolBlock, nn

UNLIMITED = 1e30
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [((12, 3), 1), ((12, 3, 2, 2), 1), ((12, 2, 2, 3), -1), ((12, 2, 3, 2), 2)]
VARIANTS = [(GhostBatchNorm, 4), (BatchRenorm, 1.5, 0.2)]


def of(variant, *arguments):
    """A class of layers that takes the options of ScratchBatchNorm only."""
    return type(
        variant.__name__,
        (variant,),
        {"__init__": lambda self, **options: variant.__init__(self, *arguments, **options)},
    )


def data(rng, shape):
    """A batch and a head gradient."""
    return rng.normal(1, 2, shape), rng.normal(size=shape)


def chunks_of(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def ghost_step(oracle, x, dy, size):
    """What a ghost layer should do: batch normalization of each chunk by a layer of its own."""
    pieces = list(zip(chunks_of(x, size), chunks_of(dy, size)))
    steps = [deepcopy(oracle).train_step(*piece) for piece in pieces]
    weights = [len(piece) / len(x) for piece, _ in pieces]
    moments = [batch_moments(piece, oracle.axis) for piece, _ in pieces]
    mean, variance = (sum(w * pair[i] for w, pair in zip(weights, moments)) for i in (0, 1))
    oracle.running_mean = 0.9 * oracle.running_mean + 0.1 * mean
    oracle.running_var = 0.9 * oracle.running_var + 0.1 * variance
    return Step(
        y=np.concatenate([s.y for s in steps]),
        dx=np.concatenate([s.dx for s in steps]),
        dgamma=sum(s.dgamma for s in steps),
        dbeta=sum(s.dbeta for s in steps),
    )


def renorm_step(oracle, x, dy, r_max, d_max):
    """Algorithm 1 of the batch renormalization paper; r and d are constants to the gradient."""
    mean, variance = batch_moments(x, oracle.axis)
    sigma = np.sqrt(oracle.running_var + oracle.epsilon)
    r = np.clip(np.sqrt(variance + oracle.epsilon) / sigma, 1 / r_max, r_max)
    d = np.clip((mean - oracle.running_mean) / sigma, -d_max, d_max)
    # gamma (xhat r + d) + beta is batch normalization with another gamma and beta.
    plain = replace(oracle, gamma=oracle.gamma * r, beta=oracle.beta + oracle.gamma * d)
    step = plain.train_step(x, dy)
    oracle.running_mean, oracle.running_var = plain.running_mean, plain.running_var
    return replace(step, dgamma=step.dgamma * r + step.dbeta * d)


# --- ghost batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [12, 100])
def test_one_ghost_batch_is_batch_normalization(mode, size, build, rng):
    subject = build(mode, (12, 3, 2), layer_class=of(GhostBatchNorm, size), unbiased_variance=True)
    for _ in range(3):
        x, dy = data(rng, (12, 3, 2))
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("size", [4, 5])
def test_each_ghost_batch_is_normalized_by_itself(mode, shape, axis, size, build, rng):
    subject = build(mode, shape, layer_class=of(GhostBatchNorm, size), axis=axis)
    for _ in range(2):
        x, dy = data(rng, shape)
        check_step(take_step(subject, x, dy), ghost_step(subject.oracle, x, dy, size))
        subject.check_statistics()


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_a_ghost_layer_takes_batches_of_any_size(mode, build, rng):
    subject = build(mode, (8, 3, 2), layer_class=of(GhostBatchNorm, 4))
    for n in (8, 3, 9, 1):
        x, dy = data(rng, (n, 3, 2))
        check_step(take_step(subject, x, dy), ghost_step(subject.oracle, x, dy, 4))
        subject.check_statistics()


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_the_unbiased_variance_of_ghost_batches_is_pooled(mode, build, rng):
    subject = build(
        mode,
        (10, 3, 2),
        layer_class=of(GhostBatchNorm, 4),
        unbiased_variance=True,
        momentum=0.0,
    )
    x, _ = data(rng, (10, 3, 2))
    train_forward(subject, x)
    squares = sum(
        ((c - c.mean(axis=(0, 2), keepdims=True)) ** 2).sum(axis=(0, 2)) for c in chunks_of(x, 4)
    )
    np.testing.assert_allclose(subject.value("running_var"), squares / (10 * 2 - 3), **EXACT)
    np.testing.assert_allclose(subject.value("running_mean"), x.mean(axis=(0, 2)), **EXACT)


# --- batch renormalization ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
def test_renormalization_without_room_is_batch_normalization(mode, epsilon, build, rng):
    subject = build(mode, (6, 3, 2), layer_class=of(BatchRenorm, 1, 0), epsilon=epsilon)
    for _ in range(3):
        x, dy = data(rng, (6, 3, 2))
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("limits", [(1.5, 0.2), (UNLIMITED, UNLIMITED)])
def test_renormalization_follows_the_paper(mode, shape, axis, limits, build, rng):
    subject = build(mode, shape, layer_class=of(BatchRenorm, *limits), axis=axis)
    for _ in range(3):
        x, dy = data(rng, shape)
        check_step(take_step(subject, x, dy), renorm_step(subject.oracle, x, dy, *limits))
        subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
def test_unlimited_renormalization_trains_as_it_infers(mode, build, rng):
    subject = build(mode, (6, 3, 2), layer_class=of(BatchRenorm, UNLIMITED, UNLIMITED))
    for _ in range(3):
        x, dy = data(rng, (6, 3, 2))
        by_running = subject.oracle.infer_step(x, dy)
        step = take_step(subject, x, dy)
        np.testing.assert_allclose(step.y, by_running.y, **EXACT)
        # Not its gradient: r and d are constants to it, and mu_B and sigma_B are not.
        assert np.abs(step.dx - by_running.dx).max() > 0.1
        subject.oracle.train(x)


@pytest.mark.parametrize("mode", BLOCK_MODES)  # an exported graph keeps its limits
def test_limits_may_change_during_training(mode, build, rng):
    subject = build(mode, (6, 3), layer_class=of(BatchRenorm, 1, 0))
    for limits in ((1, 0), (1.5, 0.2), (3, 5)):
        subject.layer.r_max, subject.layer.d_max = limits
        if mode != "eager":
            subject.net.hybridize()
        x, dy = data(rng, (6, 3))
        check_step(take_step(subject, x, dy), renorm_step(subject.oracle, x, dy, *limits))
        subject.check_statistics()


# --- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_is_batch_normalization(mode, variant, build, rng):
    subject = build(mode, (8, 3, 2), layer_class=of(*variant))
    x = rng.normal(1, 2, (7, 3, 2))
    before = subject.statistics()
    np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **EXACT)
    x[0] = np.nan
    np.testing.assert_allclose(infer(subject, x)[1:], subject.oracle.infer(x)[1:], **EXACT)
    for old, new in zip(before, subject.statistics()):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("mode", ["eager", "hybrid", "exported"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(mode, dtype, variant, build, rng):
    subject = build(mode, (8, 3, 4), layer_class=of(*variant), dtype=dtype)
    expected = {GhostBatchNorm: ghost_step, BatchRenorm: renorm_step}[variant[0]]
    x, dy = (v.astype(dtype) for v in data(rng, (8, 3, 4)))
    actual = take_step(subject, x, dy)
    check_step(actual, expected(subject.oracle, x, dy, *variant[1:]), dtype)
    subject.check_statistics()


def test_a_batch_that_is_not_finite_moves_nothing(build, rng):
    for cls, *arguments in VARIANTS:
        for mode in ("eager", "hybrid"):
            subject = build(mode, (8, 3), layer_class=of(cls, *arguments))
            before = subject.statistics()
            x, _ = data(rng, (8, 3))
            x[5, 1] = np.inf
            train_forward(subject, x)
            for old, new in zip(before, subject.statistics()):
                np.testing.assert_array_equal(old, new)


class Twice(gluon.HybridBlock):
    """A net that calls one norm layer twice; its channels are unknown until it is called."""

    def __init__(self, norm):
        super().__init__(prefix="twice_")
        with self.name_scope():
            self.first, self.norm, self.last = nn.Dense(5), norm(), nn.Dense(2)

    def hybrid_forward(self, F, x):
        x = F.sigmoid(self.norm(self.first(x)))
        return self.last(F.sigmoid(self.norm(F.square(x))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_net_trains_alike_in_every_mode(variant, device, tmp_path, rng):
    batches = [data(rng, (8, 4)) for _ in range(4)]
    sample = array(batches[0][0], device)
    start, ends = {}, {}
    for mode in MODES:
        (tmp_path / mode).mkdir()
        net = Twice(of(*variant))
        net.cast("float64")
        net.initialize(mx.init.Normal(0.5), ctx=device)
        net = in_mode(net, mode, sample, tmp_path / mode)
        net(sample)
        parameters = net.collect_params()
        start = start or {name: p.data().asnumpy() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.set_data(array(start[name], device))
        trainer = gluon.Trainer(parameters, "sgd", {"learning_rate": 0.1})
        for x, dy in batches:
            with autograd.record():
                y = net(array(x, device))
            y.backward(array(dy[:, :2], device))
            trainer.step(len(x))
        mx.nd.waitall()
        ends[mode] = {name: p.data().asnumpy() for name, p in parameters.items()}
    for name, value in ends["eager"].items():
        assert not np.array_equal(value, start[name]), f"{name} did not move"
        for mode in GRAPH_MODES:
            np.testing.assert_allclose(ends[mode][name], value, err_msg=f"{mode} {name}", **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_numpy_arrays(variant, device, rng):
    x = rng.normal(size=(8, 3, 2))
    classic = of(*variant)(in_channels=3)
    classic.initialize(ctx=device)
    classic.cast("float64")
    with autograd.train_mode():
        expected = classic(array(x, device)).asnumpy()
    mx.npx.set_np()
    for hybridize in (False, True):
        layer = of(*variant)(in_channels=3)
        layer.initialize(ctx=device)
        layer.cast("float64")
        layer.hybridize(hybridize)
        with autograd.train_mode():
            y = layer(array(x, device))
        assert isinstance(y, mx.np.ndarray)
        np.testing.assert_allclose(y.asnumpy(), expected, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_files_are_right(variant, device, rng, tmp_path):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), of(*variant)(), nn.Activation("relu"), nn.Dense(3))
    net.initialize(mx.init.Normal(0.5), ctx=device)
    net.hybridize()
    x = array(rng.normal(size=(7, 2, 6, 6)), device, "float32")
    for _ in range(3):
        with autograd.train_mode():
            net(x)
    mx.nd.waitall()
    expected = net(x).asnumpy()

    report = export_inference(net, tmp_path / "served", x)
    assert (len(report.folded), len(report.kept)) == (1, 0)
    net.export(str(tmp_path / "live"))
    symbol, params, _ = fold(tmp_path / "live-symbol.json", tmp_path / "live-0000.params")
    symbol.save(str(tmp_path / "folded-symbol.json"))
    mx.nd.save(str(tmp_path / "folded-0000.params"), params)
    for name in ("served", "folded"):
        file = str(tmp_path / name)
        loaded = SymbolBlock.imports(
            f"{file}-symbol.json", ["data"], f"{file}-0000.params", ctx=device
        )
        np.testing.assert_allclose(loaded(x).asnumpy(), expected, **CLOSE["float32"], err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_files_interchange(variant, device, rng, tmp_path):
    layers = of(*variant)(in_channels=3), ScratchBatchNorm(in_channels=3)
    for layer in layers:
        layer.initialize(ctx=device)
    values = {name: rng.uniform(0.5, 2, 3) for name in STATE}
    set_values(layers[0], values)
    layers[0].save_parameters(str(tmp_path / "layer.params"))
    layers[1].load_parameters(str(tmp_path / "layer.params"), ctx=device)
    x = array(rng.normal(size=(4, 3)), device, "float32")
    ours, plain = (layer(x).asnumpy() for layer in layers)
    np.testing.assert_allclose(ours, plain, **CLOSE["float32"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversion_to_the_builtin_leaves_variants_alone(variant, device):
    net = nn.HybridSequential()
    net.add(of(*variant)(in_channels=3), ScratchBatchNorm(in_channels=3))
    net.initialize(ctx=device)
    _, report = to_builtin(net)
    assert isinstance(net[0], variant[0])
    assert type(net[1]) is nn.BatchNorm
    assert len(report.converted) == len(report.skipped) == 1


@pytest.mark.parametrize(
    "layer",
    [
        GhostBatchNorm(32, axis=-1, momentum=None, in_channels=3),
        BatchRenorm(1.5, 0.25, epsilon=1e-3, center=False, gamma_initializer=mx.init.One()),
    ],
)
def test_repr_rebuilds_the_layer(layer):
    text = repr(layer)
    assert repr(eval(text)) == text
    assert re.match(r"GhostBatchNorm\(ghost_size=32, |BatchRenorm\(r_max=1.5, d_max=0.25, ", text)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: GhostBatchNorm(0), ValueError, "ghost_size must be at least 1, got 0"),
        (lambda: GhostBatchNorm(2.0), TypeError, "ghost_size must be an integer, got 2.0"),
        (lambda: GhostBatchNorm(2, axis=0), ValueError, "axis must not be 0"),
        (lambda: GhostBatchNorm(2, momentum=2), ValueError, "momentum"),
        (lambda: BatchRenorm(0.5), ValueError, "r_max must be finite and at least 1, got 0.5"),
        (lambda: BatchRenorm(d_max=-1), ValueError, "d_max must be finite and at least 0, got -1"),
        (lambda: BatchRenorm(float("inf")), ValueError, "r_max must be finite.*got inf"),
        (lambda: BatchRenorm("3"), TypeError, "r_max must be a number, got '3'"),
    ],
)
def test_bad_options(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_bad_limit_changes_nothing():
    layer = BatchRenorm(2, 1)
    with pytest.raises(ValueError, match=r"r_max must be finite and at least 1, got 0\.1"):
        layer.r_max = 0.1
    with pytest.raises(TypeError, match="d_max must be a number, got None"):
        layer.d_max = None
    assert (layer.r_max, layer.d_max) == (2, 1)


def test_ghost_batches_need_samples(device):
    layer = GhostBatchNorm(2, axis=-2, in_channels=4)
    layer.initialize(ctx=device)
    with pytest.raises(ValueError, match=r"axis=-2 is the batch axis of data of shape \(4, 3\)"):
        layer(mx.nd.zeros((4, 3), ctx=device))
    mx.npx.set_np()
    with pytest.raises(ValueError, match=r"at least 1 sample, got shape \(0, 4, 3\)"):
        layer(mx.np.zeros((0, 4, 3), ctx=device))


def test_the_examples_of_the_document_run():
    page = REPOSITORY / "docs" / "your-own-variant.md"
    blocks = re.findall(
        r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) >= 3
    names = {"__name__": "document"}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


def test_ghost_chunks_of_samples_without_elements_move_nothing():
    mx.npx.set_np()
    layer = GhostBatchNorm(3, in_channels=3)
    layer.initialize()
    x = mx.np.zeros((4, 3, 0))
    x.attach_grad()
    with mx.autograd.record():
        y = layer(x)
    y.backward()
    assert y.shape == x.grad.shape == (4, 3, 0)
    for name, value in {"running_mean": 0, "running_var": 1}.items():
        assert (getattr(layer, name).data().asnumpy() == value).all()
    for name in ("gamma", "beta"):
        assert (getattr(layer, name).grad().asnumpy() == 0).all()
