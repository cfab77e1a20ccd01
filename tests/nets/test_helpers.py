"""What people use around norm layers: GluonCV's freeze_bn, copy.deepcopy and pickle."""

import copy
import pickle

from scratchbn import ScratchBatchNorm, ScratchSyncBatchNorm, freeze, to_scratch, unfreeze
from scratchbn.variants import GhostBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet import autograd
from mxnet.gluon import nn


def ready(norm, device, hybridize, seed=3):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Dense(4, in_units=3), norm(), nn.Dense(2, in_units=4))
    mx.random.seed(seed)
    net.initialize(mx.init.Normal(0.5), ctx=device)
    net.cast("float64")
    net.hybridize(hybridize)
    return net


def step(net, x):
    """The output of a training step, all Parameters behind it, and their gradients."""
    with autograd.record():
        y = net(x)
    y.backward()
    mx.nd.waitall()
    parameters = net.collect_params().values()
    values = [p.data().asnumpy() for p in parameters]
    return [y.asnumpy(), *values, *(p.grad().asnumpy() for p in parameters if p.grad_req != "null")]


def assert_close(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ["freeze", "freeze_bn first"])
def test_what_to_call_in_the_place_of_freeze_bn(order, device, rng):
    freeze_bn = pytest.importorskip("gluoncv.utils").freeze_bn
    ours, theirs = (ready(nn.BatchNorm, device, hybridize=False) for _ in range(2))
    batches = [array(rng.normal(size=(5, 3)), device) for _ in range(4)]
    for net in (ours, theirs):
        step(net, batches[0])
    freeze_bn(theirs)
    if order == "freeze":
        to_scratch(ours)
        freeze_bn(ours)  # does nothing to our layer, as docs/training.md says
        assert not ours[1].options.use_global_stats
        freeze(ours)
    else:
        freeze_bn(ours)
        to_scratch(ours)
    ours.hybridize()
    statistics = ours[1].running_mean.data().asnumpy()
    assert_close(step(ours, batches[1]), step(theirs, batches[1]))
    np.testing.assert_array_equal(ours[1].running_mean.data().asnumpy(), statistics)
    freeze_bn(theirs, False)
    if order == "freeze":
        unfreeze(ours)
    else:
        ours[1].options["use_global_stats"] = False
        ours.hybridize()
    assert_close(step(ours, batches[2]), step(theirs, batches[2]))
    assert np.abs(ours[1].running_mean.data().asnumpy() - statistics).max() > 1e-3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm, ScratchBatchNorm, ScratchSyncBatchNorm, lambda: GhostBatchNorm(2)]
)
def test_copies_of_a_called_net(norm, hybridize, duplicate, device, rng):
    net = ready(norm, device, hybridize)
    x, other = (array(rng.normal(size=(5, 3)), device) for _ in range(2))
    step(net, x)
    net(x)  # the graph for inference is built, too
    if hybridize:
        with pytest.raises(ValueError, match="ctypes objects containing pointers"):
            duplicate(net)
        net.hybridize()
    twin = duplicate(net)
    np.testing.assert_array_equal(twin(x).asnumpy(), net(x).asnumpy())
    with pytest.raises(mx.MXNetError):  # MXNet copies no gradients
        step(twin, x)
    if hybridize:
        net.hybridize()
    twin = duplicate(net)
    twin.collect_params().reset_ctx(device)
    before, expected = net(x).asnumpy(), step(twin, other)
    np.testing.assert_array_equal(net(x).asnumpy(), before)
    assert_close(step(net, other), expected)
