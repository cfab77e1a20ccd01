"""Padded positions, left out of statistics, output and gradients: against the float64 oracle."""

from __future__ import annotations

import re
from copy import deepcopy

from scratchbn import ScratchBatchNorm, recalibrate, to_builtin
from scratchbn.deploy import export_inference
from scratchbn.masked import MaskedBatchNorm
from scratchbn.parity.oracle import OracleBatchNorm
from scratchbn.parity.oracle_masked import masked_infer_step, masked_train_step

import mxnet as mx
import numpy as np
import pytest
from helpers import CLOSE, array, check_step, numeric_gradient, random_values, set_values
from mxnet import autograd, gluon
from mxnet.gluon import nn

MODES = ("eager", "hybrid", "static_shape", "nested", "exported")
SHAPES = [((6, 3, 4), 1), ((6, 3), 1), ((5, 4, 3), -1), ((3, 4, 2, 3), 2), ((3, 5, 2), 0)]


class Net(gluon.HybridBlock):
    """A net of two inputs around a norm layer."""

    def __init__(self, norm, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.norm = norm

    def hybrid_forward(self, F, x, mask):
        return self.norm(x, mask)


class Subject:
    """A masked layer in a mode, and the oracle with the same values."""

    def __init__(self, mode, shape, rng, device, tmp_path, dtype="float64", **options):
        self.shape, self.axis = shape, options.get("axis", 1)
        channels = shape[self.axis]
        values = {k: v.astype(dtype).astype("f8") for k, v in random_values(rng, channels).items()}
        self.oracle = OracleBatchNorm(**values, **options)
        layer = MaskedBatchNorm(in_channels=channels, **options)
        layer.initialize(ctx=device)
        layer.cast(dtype)
        set_values(layer, values)
        self.net = layer if mode in ("eager", "hybrid") else Net(layer)
        self.device, self.dtype = device, dtype
        if mode != "eager":
            self.net.hybridize(
                static_alloc=mode == "static_shape", static_shape=mode == "static_shape"
            )
        if mode == "exported":
            self(*self.batch(rng)[::2])
            path = str(tmp_path / "net")
            self.net.export(path)
            files = f"{path}-symbol.json", ["data0", "data1"], f"{path}-0000.params"
            self.net = gluon.SymbolBlock.imports(*files, ctx=device)

    def batch(self, rng, valid=0.6):
        """Data with NaN in padded positions, a head gradient, and a mask."""
        x, dy = rng.normal(1, 2, self.shape), rng.normal(size=self.shape)
        places = np.delete(self.shape, self.axis)
        mask = (rng.uniform(size=places) < valid).astype("f4")
        x[np.broadcast_to(np.expand_dims(mask, self.axis % x.ndim) == 0, x.shape)] = np.nan
        return x.astype(self.dtype).astype("f8"), dy.astype(self.dtype).astype("f8"), mask

    def __call__(self, x, mask):
        if not isinstance(x, mx.nd.NDArray):
            x = array(x, self.device, self.dtype)
        return self.net(x, array(mask, self.device, mask.dtype))

    def step(self, x, dy, mask):
        data, head = (array(a, self.device, self.dtype) for a in (x, dy))
        data.attach_grad()
        with autograd.record():
            y = self(data, mask)
        y.backward(head)
        mx.nd.waitall()
        named = {name: self.parameter(name).grad().asnumpy() for name in ("gamma", "beta")}
        of = {"y": y.asnumpy(), "dx": data.grad.asnumpy()}
        return type("Step", (), {**of, **{f"d{k}": v for k, v in named.items()}})

    def parameter(self, name):
        return next(p for k, p in self.net.collect_params().items() if k.endswith("_" + name))

    def check_statistics(self):
        mx.nd.waitall()
        close = CLOSE["float64" if self.dtype == "float64" else "float32"]
        for name in ("running_mean", "running_var"):
            value = self.parameter(name).data().asnumpy()
            np.testing.assert_allclose(value, getattr(self.oracle, name), err_msg=name, **close)


@pytest.fixture
def build(rng, device, tmp_path):
    return lambda mode, shape, **kwargs: Subject(mode, shape, rng, device, tmp_path, **kwargs)


def test_the_oracle_has_the_right_gradient(rng):
    shape = (4, 2, 3)
    x, dy, mask = rng.normal(1, 2, shape), rng.normal(size=shape), rng.uniform(size=(4, 3)) < 0.6
    oracle = OracleBatchNorm(**random_values(rng, 2))
    step = masked_train_step(deepcopy(oracle), x, dy, mask)

    def loss():
        return (masked_train_step(deepcopy(oracle), x, dy, mask).y * dy).sum()

    for actual, variable in ((step.dx, x), (step.dgamma, oracle.gamma), (step.dbeta, oracle.beta)):
        np.testing.assert_allclose(actual, numeric_gradient(loss, variable), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_padded_positions_are_left_out(mode, shape, axis, build, rng):
    subject = build(mode, shape, axis=axis)
    for _ in range(2):
        batch = subject.batch(rng)
        check_step(subject.step(*batch), masked_train_step(subject.oracle, *batch))
        subject.check_statistics()
    x, dy, mask = subject.batch(rng)
    expected = masked_infer_step(subject.oracle, x, dy, mask).y
    np.testing.assert_allclose(subject(x, mask).asnumpy(), expected, rtol=1e-10, atol=1e-10)
    subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{"unbiased_variance": True}, {"momentum": None}, {"epsilon": 0.0}]
)
def test_options(mode, options, build, rng):
    subject = build(mode, (4, 3, 5), **options)
    for _ in range(2):
        batch = subject.batch(rng)
        check_step(subject.step(*batch), masked_train_step(subject.oracle, *batch))
        subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_padding_moves_nothing_and_gives_nothing(mode, build, rng):
    subject = build(mode, (4, 3, 5))
    subject.check_statistics()
    step = subject.step(*subject.batch(rng, valid=0))
    for name in ("y", "dx", "dgamma", "dbeta"):
        assert not getattr(step, name).any(), name
    subject.check_statistics()


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_ones_is_batch_normalization(mode, build, rng):
    subject = build(mode, (4, 3, 5))
    x, dy, mask = subject.batch(rng, valid=2)
    check_step(subject.step(x, dy, mask), subject.oracle.train_step(x, dy))
    subject.check_statistics()


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("mask_dtype", ["float16", "float64", "int32", "uint8", "bool"])
def test_dtypes(mode, dtype, mask_dtype, build, rng):
    subject = build(mode, (6, 3, 8), dtype=dtype)
    x, dy, mask = subject.batch(rng)
    actual = subject.step(x, dy, mask.astype(mask_dtype))
    check_step(actual, masked_train_step(subject.oracle, x, dy, mask), dtype)
    subject.check_statistics()


@pytest.mark.parametrize("hybridize", [False, True])
def test_with_and_without_a_mask(hybridize, build, rng):
    subject = build("hybrid" if hybridize else "eager", (4, 3, 5))
    for masked in (True, False, True):
        x, dy, mask = subject.batch(rng)
        if masked:
            check_step(subject.step(x, dy, mask), masked_train_step(subject.oracle, x, dy, mask))
        else:
            x = np.nan_to_num(x)
            with autograd.record():
                y = subject.net(array(x, subject.device))
            np.testing.assert_allclose(y.asnumpy(), subject.oracle.train(x), rtol=1e-10, atol=1e-10)
        subject.check_statistics()


@pytest.mark.parametrize("hybridize", [False, True])
def test_recalibrate_leaves_padding_out(hybridize, build, rng):
    subject = build("nested" if hybridize else "eager", (4, 3, 5))
    batches = [subject.batch(rng, valid) for valid in (0.6, 0, 0.3)]
    data = [([array(x, subject.device), array(mask, subject.device)],) for x, _, mask in batches]
    assert recalibrate(subject.net, data, report=True)[1] == 3
    valid = np.concatenate([np.moveaxis(x, 1, -1)[mask == 1] for x, _, mask in batches])
    subject.oracle.running_mean, subject.oracle.running_var = valid.mean(0), valid.var(0)
    subject.check_statistics()


class Deep(gluon.HybridBlock):
    """A net whose channels are unknown until it is called."""

    def __init__(self):
        super().__init__(prefix="deep_")
        with self.name_scope():
            self.first, self.norm, self.last = nn.Conv1D(4, 1), MaskedBatchNorm(), nn.Conv1D(2, 1)

    def hybrid_forward(self, F, x, mask):
        return self.last(F.sigmoid(self.norm(self.first(x), mask)))


def test_files_hold_stock_operators_and_agree(device, rng, tmp_path):
    net = Deep()
    net.initialize(ctx=device)
    net.hybridize()
    x = array(rng.normal(1, 2, (4, 3, 6)), device, "float32")
    mask = array(rng.uniform(size=(4, 6)) < 0.6, device, "float32")
    for _ in range(3):
        with autograd.train_mode():
            net(x, mask)
    mx.nd.waitall()
    expected = net(x, mask).asnumpy()
    export_inference(net, tmp_path / "served", x, mask)
    net.export(str(tmp_path / "live"))
    for name in ("served", "live"):
        file = str(tmp_path / name)
        assert not re.search(
            r'"op": "\w*(Norm|LRN)', (tmp_path / f"{name}-symbol.json").read_text()
        )
        names = ["data0", "data1"]
        loaded = gluon.SymbolBlock.imports(
            f"{file}-symbol.json", names, f"{file}-0000.params", ctx=device
        )
        np.testing.assert_allclose(loaded(x, mask).asnumpy(), expected, **CLOSE["float32"])


def test_parameter_files_and_conversions(device, tmp_path):
    layers = MaskedBatchNorm(in_channels=3), ScratchBatchNorm(in_channels=3)
    for layer in layers:
        layer.initialize(mx.init.Uniform(1), ctx=device)
    layers[0].save_parameters(str(tmp_path / "layer.params"))
    layers[1].load_parameters(str(tmp_path / "layer.params"), ctx=device)
    net = nn.HybridSequential()
    net.add(layers[0])
    assert len(to_builtin(net, report=True)[1].skipped) == 1
    assert type(net[0]) is MaskedBatchNorm


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (mx.nd.ones((4, 3, 5)), ValueError, r"shape of data .*, \(4, 5\) for .* got \(4, 3, 5\)"),
        (mx.nd.ones((4,)), ValueError, r"mask must have .* got \(4,\)"),
        (np.ones((4, 5)), TypeError, "mask must be an array, got array"),
    ],
)
def test_bad_masks(mask, error, text, device):
    layer = MaskedBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    with pytest.raises(error, match=text):
        layer(mx.nd.zeros((4, 3, 5), ctx=device), mask)


def test_numpy_arrays(device, rng):
    subject = Subject("hybrid", (4, 3, 5), rng, device, None)
    x, dy, mask = subject.batch(rng)
    mx.npx.set_np()
    with autograd.train_mode():
        y = subject(x, mask)
    assert isinstance(y, mx.np.ndarray)
    expected = masked_train_step(subject.oracle, x, dy, mask).y
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-10, atol=1e-10)
