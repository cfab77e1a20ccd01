"""Clause 7 of the contract: every mode works on `mx.np` arrays, under `npx.set_np`."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from contract_cases import every_block_mode, every_mode
from helpers import CLOSE, check_step, in_mode, infer, take_step
from mxnet import autograd


@pytest.fixture
def np_arrays():
    mx.npx.set_np()


@every_mode
@pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.usefixtures("np_arrays")
def test_np_arrays(build, rng, mode, layer_class, dtype):
    subject = build(mode, (6, 3, 4), layer_class=layer_class, dtype=dtype)
    for _ in range(3):
        x, dy = (rng.normal(size=(6, 3, 4)).astype(dtype) for _ in range(2))
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy), dtype)
        subject.check_statistics()
        np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE[dtype])
    y = subject(subject.array(x))
    assert isinstance(y, mx.np.ndarray)
    assert y.dtype == np.dtype(dtype)
    assert isinstance(subject.layer.running_mean.data(), mx.np.ndarray)


@every_mode
@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"scale": False, "center": False}], ids=str
)
@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.usefixtures("np_arrays")
def test_np_arrays_with_options(build, rng, mode, options, axis):
    subject = build(mode, (4, 3, 5), axis=axis, **options)
    for training in (True, False, True):
        x, dy = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3, 5))
        expected = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        actual = take_step(subject, x, dy, record_train=training)
        np.testing.assert_allclose(actual.y, expected.y, **CLOSE["float64"])
        np.testing.assert_allclose(actual.dx, expected.dx, **CLOSE["float64"])
        subject.check_statistics(rtol=1e-12)


@every_block_mode
@pytest.mark.parametrize("training_first", [True, False])
@pytest.mark.usefixtures("np_arrays")
def test_np_arrays_deferred(device, rng, mode, training_first):
    layer = ScratchBatchNorm()
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    oracle = OracleBatchNorm.fresh(3)
    x = rng.normal(size=(6, 3, 4)) + 1
    data = mx.np.array(x, dtype="float32", ctx=device)
    if not training_first:
        np.testing.assert_allclose(net(data).asnumpy(), oracle.infer(x), **CLOSE["float32"])
    with autograd.record():
        y = net(data)
    y.backward()
    np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float32"])
    np.testing.assert_allclose(net(data).asnumpy(), oracle.infer(x), **CLOSE["float32"])


@every_block_mode
@pytest.mark.usefixtures("np_arrays")
def test_np_empty_batch(device, mode):
    """MXNet cannot reshape an empty float32 array in a graph on a CPU: a clear refusal there."""
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    data = mx.np.zeros((0, 3, 2), dtype="float32", ctx=device)
    try:
        with autograd.train_mode():
            y = net(data)
        mx.nd.waitall()
    except mx.MXNetError as error:
        assert mode != "eager"
        assert "delay_alloc" in str(error)
    else:
        assert y.shape == data.shape
    assert layer.running_mean.data().asnumpy().tolist() == [0, 0, 0]
    assert layer.running_var.data().asnumpy().tolist() == [1, 1, 1]
