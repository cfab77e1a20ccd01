"""A net to recalibrate, data for it, its state, and the statistics NumPy finds in that data."""

from scratchbn import ScratchBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet.gluon import nn

kinds = pytest.mark.parametrize("layer_class", [ScratchBatchNorm, nn.BatchNorm])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def population(parts, axis=1, ddof=0):
    """Mean and variance per channel of all parts together, in float64."""
    per_channel = [np.moveaxis(np.float64(p), axis, 0).reshape(p.shape[axis], -1) for p in parts]
    together = np.concatenate(per_channel, axis=1)
    return together.mean(axis=1), together.var(axis=1, ddof=ddof)


def statistics(layer, device=None):
    mx.nd.waitall()
    return [p.data(device).asnumpy() for p in (layer.running_mean, layer.running_var)]


def build_net(layer_class, device, dtype="float64"):
    """Two convolutions and a dense layer, a norm layer after each; the second below Dropout."""
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(layer_class(in_channels=2, prefix="first_"), nn.Conv2D(3, 3, in_channels=2))
        net.add(layer_class(in_channels=3), nn.Activation("relu"), nn.Dropout(0.5))
        net.add(nn.Dense(4), layer_class(momentum=0.7), nn.Dense(2))
    net.initialize(ctx=device)
    net.cast(dtype)
    return net


def batches_of(rng, device, sizes=(5, 1, 4), dtype="float64"):
    return [array(rng.normal(3, 2, (n, 2, 6, 6)), device, dtype) for n in sizes]


def states(net):
    """All parameters and gradients by name."""
    mx.nd.waitall()
    found = {}
    for name, parameter in net.collect_params().items():
        for i, value in enumerate(parameter._data or ()):
            found[name, i] = value.asnumpy()
        for i, value in enumerate(parameter._grad or ()):
            found[name, "grad", i] = value.asnumpy()
    return found


def changed(before, after):
    assert before.keys() == after.keys()
    return {name[0] for name in before if before[name].tobytes() != after[name].tobytes()}


class Interrupted(Exception):
    pass
