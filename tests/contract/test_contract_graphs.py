"""Clause 7 of the contract: graphs find channels, sizes and training, whatever is around them."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from contract_cases import every_block_mode, every_mode
from helpers import (
    BLOCK_MODES,
    CLOSE,
    MODES,
    Subject,
    check_step,
    in_mode,
    infer,
    take_step,
    train_forward,
)
from mxnet import autograd
from mxnet.gluon import nn

# Channels that only shape inference knows


@pytest.mark.parametrize("first", ["training", "inference", "train_mode"])
@pytest.mark.parametrize(
    "hybridize", [{}, {"static_alloc": True}, {"static_alloc": True, "static_shape": True}]
)
@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_hybridize_before_the_first_forward(device, rng, depth, first, hybridize):
    """With `in_channels=0` the channel count is only known to the graph's shape inference."""
    layer = ScratchBatchNorm()
    net = layer
    for _ in range(depth):
        outer = nn.HybridSequential()
        outer.add(net)
        net = outer
    net.initialize(ctx=device)
    net.hybridize(**hybridize)
    oracle = OracleBatchNorm.fresh(3)
    x = rng.normal(size=(6, 3, 4)) * 2 + 1
    data = mx.nd.array(x, ctx=device)
    if first == "training":
        with autograd.record():
            y = net(data)
        y.backward()
    elif first == "train_mode":
        with autograd.train_mode():
            y = net(data)
    else:
        y = net(data)
    expected = oracle.infer(x) if first == "inference" else oracle.train(x)
    np.testing.assert_allclose(y.asnumpy(), expected, **CLOSE["float32"])
    mx.nd.waitall()
    assert layer.gamma.shape == layer.running_mean.shape == (3,)
    np.testing.assert_allclose(layer.running_mean.data().asnumpy(), oracle.running_mean, rtol=1e-5)
    np.testing.assert_allclose(layer.running_var.data().asnumpy(), oracle.running_var, rtol=1e-5)
    np.testing.assert_allclose(net(data).asnumpy(), oracle.infer(x), **CLOSE["float32"])


@pytest.mark.parametrize("axis", [1, 2, -1, -2, 0])
@every_block_mode
def test_deferred_channels_along_any_axis(device, rng, axis, mode):
    layer = ScratchBatchNorm(axis=axis)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    x = rng.normal(size=(4, 3, 5)) + 2
    oracle = OracleBatchNorm.fresh(x.shape[axis], axis=axis)
    with autograd.record():
        y = net(mx.nd.array(x, ctx=device))
    np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float32"])
    assert layer.gamma.shape == (x.shape[axis],)
    assert f"in_channels={x.shape[axis]}" in repr(layer)


@pytest.mark.parametrize("hybridize", [False, True])
def test_deferred_channels_behind_deferred_producers(device, rng, hybridize):
    """Conv and Dense with unknown inputs around the layer, two nets deep."""
    net = nn.HybridSequential()
    for _ in range(2):
        block = nn.HybridSequential()
        block.add(nn.Conv2D(4, 3), ScratchBatchNorm(), ScratchBatchNormReLU())
        net.add(block)
    net.add(nn.Dense(5), ScratchBatchNorm(), nn.Dense(2))
    net.initialize(ctx=device)
    if hybridize:
        net.hybridize()
    with autograd.record():
        y = net(mx.nd.array(rng.normal(size=(4, 2, 8, 8)), ctx=device))
    y.backward()
    mx.nd.waitall()
    assert y.shape == (4, 2)
    sizes = [p.shape for n, p in net.collect_params().items() if n.endswith("running_mean")]
    assert sizes == [(4,)] * 4 + [(5,)]
    assert all(
        p.data().asnumpy().any()
        for n, p in net.collect_params().items()
        if n.endswith("running_mean")
    )


# Nets that change, and nets around the layer


@every_mode
def test_batch_and_spatial_sizes_may_change(build, rng, mode):
    subject = build(mode, (4, 3, 5, 5))
    for shape in ((4, 3, 5, 5), (7, 3, 5, 5), (2, 3, 9, 4), (1, 3, 2, 1), (4, 3, 5, 5)):
        x, dy = rng.normal(size=shape), rng.normal(size=shape)
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics(rtol=1e-12)
        np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])


@every_block_mode
def test_hybridize_can_be_switched_off_and_on(device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    layer.cast("float64")
    net = in_mode(layer, mode)
    oracle = OracleBatchNorm.fresh(3)
    subject = Subject(mode, layer, net, oracle, device, "float64")
    for active in (True, False, True, False):
        net.hybridize(active)
        x, dy = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
        check_step(take_step(subject, x, dy), oracle.train_step(x, dy))
        subject.check_statistics(rtol=1e-12)


@every_mode
def test_eager_children_of_a_plain_block(device, rng, tmp_path, mode):
    """A hybridized layer inside an eager `Sequential`."""
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    inner = in_mode(layer, mode, mx.nd.zeros((2, 3), ctx=device), tmp_path)
    net = nn.Sequential()
    net.add(inner, nn.Lambda(lambda data: data * 2))
    x = rng.normal(size=(6, 3))
    oracle = OracleBatchNorm.fresh(3)
    with autograd.record():
        y = net(mx.nd.array(x, ctx=device))
    np.testing.assert_allclose(y.asnumpy(), 2 * oracle.train(x), **CLOSE["float32"])


# Beside random operators: the training flag of a graph must not disturb them, nor they it


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_beside_dropout(device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    chain = nn.HybridSequential()
    chain.add(nn.Dropout(0.5), layer, nn.Dropout(0.5))
    chain.initialize(ctx=device)
    chain.cast("float64")
    net = in_mode(chain, mode)
    x = mx.nd.array(rng.normal(size=(400, 3)) + 1, dtype="float64", ctx=device)
    before = layer.running_mean.data().asnumpy()
    oracle = OracleBatchNorm.fresh(3)
    np.testing.assert_allclose(net(x).asnumpy(), oracle.infer(x.asnumpy()), **CLOSE["float64"])
    with autograd.record():
        y = net(x)
    mx.nd.waitall()
    assert 0.4 < (y.asnumpy() == 0).mean() < 0.6
    assert np.abs(layer.running_mean.data().asnumpy() - before).min() > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_always_mode_does_not_look_like_training(device, rng, tmp_path, mode):
    layer = ScratchBatchNorm(in_channels=3)
    chain = nn.HybridSequential()
    chain.add(layer, nn.HybridLambda(lambda F, data: F.Dropout(data, p=0.5, mode="always")))
    chain.initialize(ctx=device)
    x = mx.nd.array(rng.normal(size=(50, 3)) + 1, ctx=device)
    net = in_mode(chain, mode, x, tmp_path)
    for _ in range(5):
        y = net(x).asnumpy()
        kept = y != 0
        np.testing.assert_allclose(y[kept], 2 * x.asnumpy()[kept], rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_training_is_recognized_at_every_seed(build, rng, mode):
    """A flag drawn from random numbers must be right for every draw, with a single channel too."""
    subject = build(mode, (4, 1), values={"running_mean": [50.0]})
    x = rng.normal(size=(4, 1))
    trained = infer_output = None
    for seed in range(60):
        mx.random.seed(seed)
        infer_output = infer(subject, x)
        np.testing.assert_allclose(infer_output, subject.oracle.infer(x), **CLOSE["float64"])
        mx.random.seed(seed)
        trained = train_forward(subject, x)
        np.testing.assert_allclose(trained, subject.oracle.train(x), **CLOSE["float64"])
        subject.check_statistics(rtol=1e-11)
