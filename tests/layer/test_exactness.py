"""Where mathematics is exact: batches of nothing, of one value per channel, of a constant."""

from __future__ import annotations

from scratchbn import ScratchBatchNorm, use_backend
from scratchbn.variants import BatchRenorm

# isort: split
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

OPTIONS = [{}, {"unbiased_variance": True}, {"momentum": None}, {"epsilon": 0}]


@pytest.fixture(autouse=True)
def portable():
    with use_backend("portable"):
        yield


def step(cls, shape, dtype, hybridize, fill=None, head=None, **options):
    """The gradients of one training step, and the layer."""
    layer = cls(in_channels=3, **options)
    layer.initialize()
    layer.cast(dtype)
    layer.hybridize(hybridize)
    module = mx.np if mx.util.is_np_array() else mx.nd
    x = module.array(np.full(shape, 0.0 if fill is None else fill), dtype=dtype)
    x.attach_grad()
    with autograd.record():
        y = layer(x)
    y.backward(None if head is None else module.array(np.full(shape, head), dtype=dtype))
    mx.nd.waitall()
    return x.grad.asnumpy(), layer.gamma.grad().asnumpy(), layer.beta.grad().asnumpy(), layer


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize(
    # A graph for float32 stops at its first reshape: oneDNN takes no empty array.
    ("hybridize", "dtype"),
    [(False, "float16"), (False, "float32"), (False, "float64"), (True, "float64")],
)
@pytest.mark.parametrize("cls", [ScratchBatchNorm, BatchRenorm])
def test_an_empty_batch_has_gradients_of_0(cls, hybridize, dtype, numpy, options):
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 2, 2)):
        with mx.util.np_shape(True), mx.util.np_array(numpy):
            dx, dgamma, dbeta, layer = step(cls, shape, dtype, hybridize, **options)
            assert dx.shape == shape
            assert not dgamma.any() and not dbeta.any()  # neither 0 nor -0 is any; NaN is
            assert not layer.running_mean.data().asnumpy().any()
            assert (layer.running_var.data().asnumpy() == 1).all()
            if options.get("momentum", 0) is None:
                assert layer.num_batches.data().asnumpy() == 0


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("hybridize", [False, True])
def test_one_value_per_channel_has_no_gradient(hybridize, dtype, options):
    for shape in ((1, 3), (1, 3, 1, 1)):
        for fill in (0.1, -1e5, 3.7e20):
            dx, dgamma, dbeta, _ = step(
                ScratchBatchNorm, shape, dtype, hybridize, fill, 0.3, **options
            )
            assert not dx.any()
            assert not dgamma.any()
            assert (dbeta == np.dtype(dtype).type(0.3)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("hybridize", [False, True])
def test_a_constant_under_a_constant_gradient_has_next_to_none(hybridize, dtype):
    """Some units in the last place of gamma dy / sigma, which is subtracted from itself.

    Not exactly 0: what is subtracted is m dy summed, times 316.22775, over m. In float32
    200 * 316.22775 is 63245.55 and that over 200 is 316.22778, one unit of 3.05e-5 off; and 200
    times 0.1 does not sum up to exactly 20 in the first place. To subtract the mean of the centred
    batch once more gives exactly 0, for a fifth of a training step (LeNet 1.21, MLP 1.18 times).
    """
    for fill, head in ((1.0, 1.0), (0.1, 1.0), (0.1, 0.1), (7.3, -0.7)):
        dx, _, _, _ = step(ScratchBatchNorm, (2, 3, 10, 10), dtype, hybridize, fill, head)
        unit = np.spacing(np.dtype(dtype).type(abs(head) / np.sqrt(1e-5)))
        assert np.abs(dx).max() <= 32 * unit
