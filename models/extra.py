"""Nets that no zoo has, for other layouts and ranks, each with any norm layer.

``norm_layer`` is called like ``nn.BatchNorm``, with ``axis`` or without arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mxnet.gluon import nn

__all__ = ["channels_last", "conv1d"]

NormLayer = Callable[..., Any]


def channels_last(
    norm_layer: NormLayer, units: Sequence[int] = (64, 64), classes: int = 10
) -> nn.HybridSequential:
    """Build a net that keeps its channels on the last axis: dense layers at every position.

    MXNet has no convolution for this layout on a CPU; dense layers are 1x1 convolutions.

    Parameters
    ----------
    norm_layer : callable
        Makes a norm layer; called with ``axis=-1``.
    units : sequence of int
        Channels of each hidden layer.
    classes : int
        Length of the output.

    Returns
    -------
    HybridSequential
        Takes images of shape (N, H, W, channels) and returns scores of shape (N, classes).

    Examples
    --------
    >>> import mxnet as mx
    >>> net = channels_last(nn.BatchNorm)
    >>> net.initialize()
    >>> net(mx.nd.zeros((2, 6, 5, 3))).shape
    (2, 10)
    """
    net = nn.HybridSequential()
    with net.name_scope():
        for n in units:
            net.add(nn.Dense(n, flatten=False), norm_layer(axis=-1), nn.Activation("relu"))
        net.add(nn.HybridLambda(lambda F, x: F.mean(x, axis=(1, 2))), nn.Dense(classes))
    return net


def conv1d(
    norm_layer: NormLayer, channels: Sequence[int] = (32, 64), classes: int = 10
) -> nn.HybridSequential:
    """Build a net of one-dimensional convolutions with a norm layer after each.

    ``nn.BatchNorm`` cannot train it on a CPU: its backward fails after a Conv1D.

    Parameters
    ----------
    norm_layer : callable
        Makes a norm layer.
    channels : sequence of int
        Channels of each convolution.
    classes : int
        Length of the output.

    Returns
    -------
    HybridSequential
        Takes signals of shape (N, channels, length), length at least 13, and returns scores of
        shape (N, classes).

    Examples
    --------
    >>> import mxnet as mx
    >>> net = conv1d(nn.BatchNorm)
    >>> net.initialize()
    >>> net(mx.nd.zeros((2, 3, 13))).shape
    (2, 10)
    """
    net = nn.HybridSequential()
    with net.name_scope():
        for n in channels:
            net.add(nn.Conv1D(n, 5, strides=2), norm_layer(), nn.Activation("relu"))
        net.add(nn.GlobalAvgPool1D(), nn.Dense(classes))
    return net
