"""What MXNet 1.9.1 tests of ``nn.BatchNorm`` in tests/python/unittest/test_gluon.py, with ours.

The same layers, nets and shapes; larger sizes are left out where only time grows. Each compares an
eager step with a hybridized one, with MXNet's tolerances, or both with NumPy's in float64.
"""

from scratchbn import BackendError, ScratchBatchNorm, native, use_backend
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn
from oracle_tolerances import RESULT

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=["portable", "native", "auto"], autouse=True)
def on_backend(request):
    try:
        with use_backend(request.param):
            yield request.param if native.available() else "portable"
    except BackendError as error:
        pytest.skip(str(error))


def take_step(net, x, dy=None):
    x = x.copy()
    x.attach_grad()
    with autograd.record():
        y = net(x)
    y.backward(dy)
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


class ChainOracle:
    """What a Chain computes, in float64, with the Parameters that it had at first."""

    def __init__(self, net):
        self.weight = values(net.conv.weight)[:, :, 0, 0]
        self.steps = net.steps
        self.norms = [
            OracleBatchNorm(
                *map(values, (norm.gamma, norm.beta, norm.running_mean, norm.running_var)),
                axis=norm.options.axis,
            )
            for norm in net.norms
        ]

    def take_step(self, x, dy):
        """Return the output and the gradient of x; the running statistics move."""
        x, inputs = np.einsum("oc,nchw->nohw", self.weight, x), []
        norms = iter(self.norms)
        for step in self.steps:
            inputs.append(x)
            if step is None:
                x = next(norms).train(x)
            else:
                x = x[ranges(step)] if isinstance(step[0], tuple) else x.reshape(step)
        y, norms = x, reversed(self.norms)
        for step, x in zip(reversed(self.steps), reversed(inputs)):
            if step is None:
                dy = replace_running(next(norms)).train_step(x, dy).dx
            elif isinstance(step[0], tuple):
                whole = np.zeros_like(x)
                whole[ranges(step)] = dy
                dy = whole
            else:
                dy = dy.reshape(x.shape)
        return y, np.einsum("oc,nohw->nchw", self.weight, dy)


def values(parameter):
    return parameter.data().asnumpy().astype(np.float64)


def ranges(step):
    return tuple(slice(*limits) for limits in zip(*step))


def replace_running(norm):
    """Copy an oracle, so that its running statistics stay."""
    return OracleBatchNorm(**vars(norm))


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
def test_views_before_and_between_norms(rng, steps, options):
    x = rng.uniform(size=(8, 3, 32, 32)).astype(np.float32)
    net = Chain(*steps, norms=steps.count(None), **options)
    net.initialize()
    dy = rng.normal(size=net(mx.nd.array(x)).shape).astype(np.float32)
    for norm in net.norms:
        norm.gamma.set_data(mx.nd.array(rng.uniform(1, 2, norm.gamma.shape)))
        norm.beta.set_data(mx.nd.array(rng.uniform(-1, 1, norm.beta.shape)))
    oracle = ChainOracle(net)
    # What a norm in float32 may be off by next to values of 1 (oracle_tolerances.py says why); a
    # second one starts from what the first was off by.
    unit = RESULT["float32"] * steps.count(None)
    for hybridized in (False, True):
        net.hybridize(hybridized)
        y, dx = take_step(net, mx.nd.array(x), mx.nd.array(dy))
        expected, expected_dx = oracle.take_step(x.astype(np.float64), dy.astype(np.float64))
        np.testing.assert_allclose(y, expected, rtol=unit, atol=unit)
        largest = np.abs(expected_dx).max()
        np.testing.assert_allclose(dx, expected_dx, rtol=unit, atol=unit * largest)
        for layer, norm in zip(net.norms, oracle.norms):
            for name in ("running_mean", "running_var"):
                moved = values(getattr(layer, name))
                np.testing.assert_allclose(moved, getattr(norm, name), rtol=unit, atol=unit)
