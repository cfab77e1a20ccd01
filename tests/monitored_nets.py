"""Nets to be observed, and a step of training."""

from scratchbn import ScratchBatchNorm

import mxnet as mx
import pytest
from helpers import BLOCK_MODES, in_mode
from mxnet import autograd
from mxnet.gluon import nn

kinds = pytest.mark.parametrize("layer_class", [ScratchBatchNorm, nn.BatchNorm])
modes = pytest.mark.parametrize("mode", BLOCK_MODES)


def train_step(net, trainer, *inputs):
    with autograd.record():
        loss = (net(*inputs) ** 2).sum()
    loss.backward()
    if trainer is not None:
        trainer.step(len(inputs[0]))


def one_layer(layer_class, device, mode="eager", dtype="float32", **options):
    """A norm layer of 4 channels that sees the data, and a dense layer."""
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(layer_class(in_channels=4, **options), nn.Dense(2))
    net.initialize(ctx=device)
    net.cast(dtype)
    return net[0], in_mode(net, mode)


def deep_net(layer_class, device, dropout=0.0):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        body = nn.HybridSequential(prefix="body_")
        with body.name_scope():
            body.add(nn.Conv2D(8, 3), layer_class(), nn.Activation("relu"), nn.Dropout(dropout))
            body.add(nn.Conv2D(5, 3), layer_class(), nn.Activation("relu"))
        net.add(body, nn.Dense(6), layer_class(), nn.Activation("relu"), nn.Dropout(dropout))
        net.add(nn.Dense(2))
    net.initialize(mx.init.Xavier(), ctx=device)
    return net


def hooks(net):
    found = []
    net.apply(lambda b: found.extend([*b._forward_hooks.values(), *b._forward_pre_hooks.values()]))
    return found
