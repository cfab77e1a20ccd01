"""What MXNet 1.9.1 tests of ``nn.BatchNorm`` in tests/python/unittest/test_gluon.py, with ours.

The same layers, nets, shapes and tolerances; larger sizes are left out where only time grows. Each
compares an eager step with a hybridized one; the first also knows what is right.
"""

from scratchbn import BackendError, ScratchBatchNorm, native, use_backend

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=["portable", "native", "auto"], autouse=True)
def on_backend(request):
    try:
        with use_backend(request.param):
            yield request.param if native.available() else "portable"
    except BackendError as error:
        pytest.skip(str(error))


def take_step(net, x):
    x = x.copy()
    x.attach_grad()
    with autograd.record():
        y = net(x)
    y.backward()
    return y.asnumpy(), x.grad.asnumpy()


def check_eager_and_hybridized(net, x):
    net.initialize()
    eager = take_step(net, x)
    net.hybridize()
    for one, two in zip(eager, take_step(net, x)):
        np.testing.assert_allclose(one, two, **CLOSE)
    return eager


class Chain(HybridBlock):
    """A convolution, then views and norms: a tuple is a shape or a slice, None a norm."""

    def __init__(self, *steps, channels=16, norms=2, **options):
        super().__init__()
        self.steps = steps
        with self.name_scope():
            self.conv = nn.Conv2D(channels, (1, 1))
            self.norms = [ScratchBatchNorm(**options) for _ in range(norms)]
            for norm in self.norms:
                self.register_child(norm)

    def hybrid_forward(self, F, x):
        x, norms = self.conv(x), iter(self.norms)
        for step in self.steps:
            if step is None:
                x = next(norms)(x)
            elif isinstance(step[0], tuple):
                x = x.slice(begin=step[0], end=step[1])
            else:
                x = x.reshape(step)
        return x


def test_batchnorm(on_backend):
    layer = ScratchBatchNorm(in_channels=10)
    y, dx = check_eager_and_hybridized(layer, mx.nd.ones((2, 10, 10, 10)))
    assert not y.any()  # a constant batch gives beta,
    # And has no gradient: to the bit with the kernel, to rounding times 1 / sqrt(epsilon) without.
    assert np.abs(dx).max() <= (1e-4 if on_backend == "portable" else 0)


def test_batchnorm_backward_synchronization():
    for name in ("running_var", "running_mean"):
        for _ in range(20):
            layer = ScratchBatchNorm()
            layer.initialize()
            for _ in range(3):
                x = mx.nd.random.normal(loc=10, scale=2, shape=(1, 3, 10, 10))
                with autograd.record():
                    y = layer(x)
                y.backward()
            first = getattr(layer, name).data().asnumpy()
            for _ in range(10):
                assert (getattr(layer, name).data().asnumpy() == first).all()


@pytest.mark.parametrize("channels", [16, 1024])
@pytest.mark.parametrize("side", [1, 7])
def test_batchnorm_16c(channels, side):
    x = mx.nd.random.uniform(-1, 1, shape=(4, 3, side, side))
    check_eager_and_hybridized(Chain(None, channels=channels, norms=1), x)


@pytest.mark.parametrize("channels", [1024, 512, 256, 128, 64, 45, 32, 16, 3])
def test_batchnorm_chnls(channels):
    net = nn.HybridSequential()
    net.add(
        nn.Conv3D(channels, (1, 7, 7), (1, 2, 2), (0, 3, 3), use_bias=False, in_channels=3),
        ScratchBatchNorm(in_channels=channels),
    )
    net.initialize(init=mx.init.Constant(1))
    y = net(mx.nd.zeros((1, 3, 2, 24, 24)))
    assert y.shape == (1, channels, 2, 12, 12)
    assert not y.asnumpy().any()


RESHAPED, AGAIN = (16, 32, 8, -1), (8, 16, 16, -1)
SLICED, SMALLER = ((0, 0, 0, 0), (4, 16, 32, 32)), ((0, 0, 2, 2), (4, 16, 16, 16))


@pytest.mark.parametrize(
    "steps",
    [
        (RESHAPED, None),
        (SLICED, None),
        (SLICED, None, SMALLER, None),
        (RESHAPED, None, AGAIN, None),
        (SLICED, None, RESHAPED, None),
        (RESHAPED, None, ((0, 0, 0, 0), (4, 32, 8, 16)), None),
    ],
    ids=["reshape", "slice", "slices", "reshapes", "slice_reshape", "reshape_slice"],
)
@pytest.mark.parametrize("options", [{}, {"axis": -1}, {"axis": 2}], ids=str)
def test_views_before_and_between_norms(steps, options):
    x = mx.nd.random.uniform(shape=(8, 3, 32, 32))
    check_eager_and_hybridized(Chain(*steps, norms=steps.count(None), **options), x)
