"""The net of the MNIST experiment in the paper of batch normalization.

Source: Ioffe & Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scratchbn import ScratchBatchNorm

import mxnet as mx
import numpy as np
from mxnet.gluon import nn

from ._norm import check_options

__all__ = ["HIDDEN_LAYERS", "HIDDEN_UNITS", "binarize", "initialize", "mlp"]

HIDDEN_LAYERS = 3
HIDDEN_UNITS = 100

_HALF_OF_FULL_SCALE = 127.5


def binarize(images: np.ndarray) -> np.ndarray:
    """Turn grey images into the binary input of the paper's net.

    Parameters
    ----------
    images : numpy.ndarray, shape (N, 28, 28) or any other of rank >= 2, uint8
        Pixels from 0 to 255.

    Returns
    -------
    numpy.ndarray, shape (N, 784) or (N, the product of all other lengths), float32
        1 where a pixel is above half of full scale, 127.5, and 0 elsewhere.

    Raises
    ------
    TypeError
        If `images` is not an array of uint8.
    ValueError
        If it has less than 2 axes.

    Examples
    --------
    >>> import numpy as np
    >>> print(binarize(np.array([[[0, 127], [128, 255]]], dtype="uint8")))
    [[0. 0. 1. 1.]]
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        given = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images must be a numpy array of uint8, got {given}")
    if images.ndim < 2:
        raise ValueError(f"images must have at least 2 axes, got shape {images.shape}")
    length = int(np.prod(images.shape[1:]))
    return (images > _HALF_OF_FULL_SCALE).reshape(len(images), length).astype(np.float32)


def mlp(
    norm_layer: Callable[..., Any] | None = ScratchBatchNorm,
    norm_kwargs: Mapping[str, Any] | None = None,
    classes: int = 10,
    prefix: str | None = None,
    params: Any = None,
    *,
    hidden: Sequence[int] = (HIDDEN_UNITS,) * HIDDEN_LAYERS,
    activation: str = "sigmoid",
    use_bias: bool | None = None,
) -> nn.HybridSequential:
    """Build the paper's net: three layers of 100 sigmoid units, and one score for each class.

    The norm layer stands before each sigmoid and normalizes ``W u``. The bias is left out there, as
    beta takes its part (section 3.2 of the paper).

    Parameters
    ----------
    norm_layer : callable or None
        Called as ``norm_layer(**norm_kwargs)`` for each of the norm layers. None leaves them out.
    norm_kwargs : mapping, optional
        Options of the norm layer.
    classes : int
        Length of the output.
    prefix, params : optional
        See ``mxnet.gluon.Block``. Together they share the Parameters of another net, given as
        ``net.prefix`` and ``net.collect_params()``.
    hidden : sequence of int
        Units of each hidden layer.
    activation : str
        Of the hidden layers.
    use_bias : bool, optional
        Whether the hidden layers have a bias; default: only without norm layers.

    Returns
    -------
    HybridSequential
        Not initialized; see :func:`initialize`. Takes vectors of shape (N, 784), as
        :func:`binarize` makes them, and returns scores of shape (N, classes).

    Raises
    ------
    TypeError
        If `norm_layer` is not callable, if there are `norm_kwargs` and no norm layer, or if
        `classes` is not an integer.
    ValueError
        If `classes` is less than 1.

    Examples
    --------
    >>> import mxnet as mx
    >>> net = mlp()
    >>> initialize(net)
    >>> net(mx.nd.zeros((2, 784))).shape
    (2, 10)
    """
    check_options(norm_layer, norm_kwargs, classes)
    if use_bias is None:
        use_bias = norm_layer is None
    net = nn.HybridSequential(prefix=prefix, params=params)
    with net.name_scope():
        for units in hidden:
            net.add(nn.Dense(units, use_bias=use_bias))
            if norm_layer is not None:
                net.add(norm_layer(**(norm_kwargs or {})))
            net.add(nn.Activation(activation))
        net.add(nn.Dense(classes))
    return net


def initialize(net: Any, sigma: float = 0.1, ctx: Any = None) -> None:
    """Draw the weights of a net from N(0, sigma); everything else starts as its layer says.

    Parameters
    ----------
    net : Block
        Any net.
    sigma : float
        Standard deviation, positive. The paper says "small random Gaussian values" and no number.
    ctx : mxnet.Context or list of mxnet.Context, optional
        Where to put the parameters; default: the current device.

    Raises
    ------
    ValueError
        If `sigma` is not positive and finite.
    """
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be positive and finite, got {sigma!r}")
    net.initialize(mx.init.Normal(sigma), ctx=ctx, force_reinit=True)
