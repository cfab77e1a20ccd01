"""Clause 10 of the contract: one layer on many devices, and moved between them."""

from scratchbn import ScratchBatchNorm
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
from contract_cases import every_block_mode
from helpers import CLOSE, array, in_mode, random_values, set_values
from mxnet import autograd, gluon
from mxnet.gluon import nn

SHAPE = (6, 3, 4)


@every_block_mode
def test_statistics_are_kept_per_device(device, second_device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3, momentum=0.6)
    devices = [device, second_device]
    layer.initialize(ctx=devices)
    layer.cast("float64")
    values = random_values(rng, 3)
    set_values(layer, values)
    net = in_mode(layer, mode)
    oracles = [OracleBatchNorm(**values, momentum=0.6) for _ in devices]
    for _ in range(3):
        parts = [rng.normal(size=SHAPE) * (k + 1) + 3 * k for k in range(2)]
        heads = [rng.normal(size=SHAPE) for _ in range(2)]
        data = [array(part, where) for part, where in zip(parts, devices)]
        for one in data:
            one.attach_grad()
        with autograd.record():
            outputs = [net(one) for one in data]
        autograd.backward(outputs, [array(h, where) for h, where in zip(heads, devices)])
        mx.nd.waitall()
        for k, where in enumerate(devices):
            step = oracles[k].train_step(parts[k], heads[k])
            assert outputs[k].ctx == where
            np.testing.assert_allclose(outputs[k].asnumpy(), step.y, **CLOSE["float64"])
            np.testing.assert_allclose(data[k].grad.asnumpy(), step.dx, **CLOSE["float64"])
            np.testing.assert_allclose(
                layer.gamma.grad(where).asnumpy(), step.dgamma, **CLOSE["float64"]
            )
            for name in ("running_mean", "running_var"):
                actual = getattr(layer, name).data(where).asnumpy()
                np.testing.assert_allclose(actual, getattr(oracles[k], name), rtol=1e-12)
            inferred = net(data[k]).asnumpy()
            np.testing.assert_allclose(inferred, oracles[k].infer(parts[k]), **CLOSE["float64"])


@every_block_mode
def test_data_parallel_training(device, second_device, rng, mode):
    """A Trainer sums gradients over devices; both copies of gamma and beta stay equal."""
    devices = [device, second_device]
    layer = ScratchBatchNorm()
    chain = nn.HybridSequential()
    chain.add(nn.Dense(4), layer, nn.Dense(2))
    chain.initialize(mx.init.Xavier(), ctx=devices)
    net = in_mode(chain, mode)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    for _ in range(4):
        parts = gluon.utils.split_and_load(
            array(rng.normal(size=(10, 5)), mx.cpu(), "float32"), devices
        )
        with autograd.record():
            losses = [((net(part) - 1) ** 2).sum() for part in parts]
        autograd.backward(losses)
        trainer.step(10)
    mx.nd.waitall()
    for name in ("gamma", "beta"):
        copies = [copy.asnumpy() for copy in getattr(layer, name).list_data()]
        np.testing.assert_array_equal(copies[0], copies[1])
        assert np.abs(copies[0] - (name == "gamma")).max() > 1e-4
    means = [copy.asnumpy() for copy in layer.running_mean.list_data()]
    assert np.abs(means[0] - means[1]).max() > 1e-4


@every_block_mode
def test_reset_ctx_moves_the_layer(device, second_device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    oracle = OracleBatchNorm.fresh(3)
    for where in (device, second_device, device):
        net.collect_params().reset_ctx(where)
        x = rng.normal(size=SHAPE)
        with autograd.record():
            y = net(array(x, where, "float32"))
        np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float32"])
        mx.nd.waitall()
        np.testing.assert_allclose(
            layer.running_mean.data(where).asnumpy(), oracle.running_mean, rtol=1e-5, atol=1e-6
        )
