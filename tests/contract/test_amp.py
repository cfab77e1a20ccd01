"""Contract clause 12: types follow the input, under AMP and without it.

AMP is on for a whole process, so what it does is observed in processes of its own.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import scratchbn
from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import BFLOAT16
from mxnet import autograd, gluon
from mxnet.gluon import nn

WORKER = Path(__file__).parents[1] / "amp_worker.py"
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8}
KINDS = ["portable eager", "portable graph", "native graph", "native graph static"]


@functools.lru_cache
def ended(dtype, what):
    child = subprocess.run(
        [sys.executable, str(WORKER), dtype, what], capture_output=True, text=True, timeout=300
    )
    return child


def observed(dtype, what):
    child = ended(dtype, what)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ROUNDING)
class TestTrainingUnderAmp:
    @pytest.mark.parametrize("grad_req", ["write", "add"])
    def test_a_step_is_right(self, dtype, kind, grad_req):
        seen = observed(dtype, "runs")[kind][grad_req]
        assert seen["type"] == "True"
        assert seen["held"] == "float32"
        for what in ("y", "dx", "inferred"):
            assert seen[what] < 4 * ROUNDING[dtype], what
        for what in ("dgamma", "dbeta", "mean", "var"):
            assert seen[what] < 2e-5, what  # computed in float32 from what has 16 bits

    def test_losses_and_statistics_follow_those_of_float32(self, dtype, kind):
        seen = observed(dtype, "runs")
        losses, statistics = seen[kind]["training"]
        expected, statistics32 = seen["float32"]
        np.testing.assert_allclose(losses, expected, rtol=8 * ROUNDING[dtype])
        for values, values32 in zip(statistics, statistics32):
            np.testing.assert_allclose(values, values32, rtol=8 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
class TestAroundAmp:
    def test_the_wrappers_are_still_there(self, dtype):
        assert observed(dtype, "runs")["wrapped"]

    def test_a_file_is_a_net_of_float32(self, dtype):
        seen = observed(dtype, "runs")["exported"]
        assert seen["casts"] == []
        assert seen["type"] == "float32"
        assert seen["off"] < 1e-5
        assert 0 < seen["live off"] < 16 * ROUNDING[dtype]

    def test_types_where_dense_layers_are_cast(self, dtype):
        seen = observed(dtype, "types")["types"]
        assert seen["norms"] == ["True", "True"]
        assert seen["held"] == ["float32"]
        assert len(seen["writes"]) == 5


@pytest.mark.parametrize("backend", ["portable", "native"], indirect=True)
@pytest.mark.parametrize("flags", [None, {}, {"static_alloc": True, "static_shape": True}])
@pytest.mark.parametrize("cls", [ScratchBatchNorm, ScratchBatchNormReLU])
def test_bfloat16_without_amp(rng, cls, flags, backend):
    x = mx.nd.array(rng.normal(10, 3, (16, 3, 4))).astype(BFLOAT16)
    dy = mx.nd.array(rng.normal(size=x.shape)).astype(BFLOAT16)
    net = nn.HybridSequential()
    net.add(cls())
    net.initialize()
    if flags is not None:
        net.hybridize(**flags)
    x.attach_grad("add")
    for _ in range(2):
        with autograd.record():
            y = net(x)
        y.backward(dy)
    assert y.dtype == x.grad.dtype == net(x).dtype == BFLOAT16
    oracle = OracleBatchNorm.fresh(3, relu=cls is ScratchBatchNormReLU)
    seen, given = (v.astype("float32").asnumpy().astype("float64") for v in (x, dy))
    for _ in range(2):
        step = oracle.train_step(seen, given)
    mx.nd.waitall()
    assert net[0].running_mean.dtype == np.float32
    np.testing.assert_allclose(net[0].running_mean.data().asnumpy(), oracle.running_mean, rtol=1e-5)
    np.testing.assert_allclose(net[0].running_var.data().asnumpy(), oracle.running_var, rtol=1e-4)
    np.testing.assert_allclose(y.astype("float32").asnumpy(), step.y, rtol=2**-7, atol=2**-7)
    dx = x.grad.astype("float32").asnumpy()
    np.testing.assert_allclose(dx, 2 * step.dx, rtol=2**-6, atol=2**-5)


def test_bfloat16_in_a_file(rng, tmp_path):
    x = mx.nd.array(rng.normal(10, 3, (16, 3))).astype(BFLOAT16)
    net = nn.HybridSequential()
    net.add(ScratchBatchNorm())
    net.initialize()
    net.hybridize()
    with autograd.train_mode():
        net(x)
    stem = str(tmp_path / "net")
    net.export(stem)
    loaded = gluon.SymbolBlock.imports(f"{stem}-symbol.json", ["data"], f"{stem}-0000.params")
    y = loaded(x)
    assert y.dtype == BFLOAT16
    assert (y.astype("float32") == net(x).astype("float32")).asnumpy().all()


def test_a_layer_is_cast_to_bfloat16_by_name_and_by_type():
    layer = ScratchBatchNorm(in_channels=2)
    layer.initialize()
    for dtype in ("bfloat16", BFLOAT16):
        layer.cast(dtype)
        assert layer.data_dtype == BFLOAT16
        assert layer.gamma.data().dtype == np.float32
        assert layer(mx.nd.ones((3, 2)).astype(BFLOAT16)).dtype == BFLOAT16


def test_messages_know_bfloat16(backend):
    layer = ScratchBatchNorm(in_channels=2)
    layer.initialize()
    layer.cast("float64")
    with pytest.raises(TypeError, match=r"data of dtype bfloat16 .* call cast\('bfloat16'\)"):
        layer(mx.nd.ones((3, 2)).astype(BFLOAT16))
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64, got int32"):
        layer(mx.nd.ones((3, 2), dtype="int32"))
    assert scratchbn.get_backend() == backend  # a refusal leaves it as it was
