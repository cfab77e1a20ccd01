"""LeNet with batch normalization, as the MXNet tutorial "Batch Normalization from scratch" has it.

Source: The Straight Dope, chapter 4, https://github.com/zackchase/mxnet-the-straight-dope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scratchbn import ScratchBatchNorm

import mxnet as mx
from mxnet.gluon import nn

from ._norm import check_options

__all__ = ["INITIALIZATIONS", "initialize", "lenet"]

INITIALIZATIONS = ("tutorial", "xavier")

_TUTORIAL_SIGMA = 0.01
_XAVIER_MAGNITUDE = 2.24


def lenet(
    norm_layer: Callable[..., Any] | None = ScratchBatchNorm,
    norm_kwargs: Mapping[str, Any] | None = None,
    classes: int = 10,
    prefix: str | None = None,
    params: Any = None,
) -> nn.HybridSequential:
    """Build LeNet: two convolutions and two dense layers, with a norm layer after all but the last.

    With the same `prefix`, two norm layers that name their parameters alike (`ScratchBatchNorm`
    and `nn.BatchNorm` do) give nets whose parameters can be copied by name.

    Parameters
    ----------
    norm_layer : callable or None
        Called as ``norm_layer(**norm_kwargs)`` for each of the three norm layers. None leaves them
        out.
    norm_kwargs : mapping, optional
        Options of the norm layer.
    classes : int
        Length of the output.
    prefix, params : optional
        See ``mxnet.gluon.Block``.

    Returns
    -------
    HybridSequential
        Not initialized; see :func:`initialize`. Takes images of shape (N, channels, H, W), for
        MNIST (N, 1, 28, 28), and returns scores of shape (N, classes).

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
    >>> net = lenet()
    >>> initialize(net)
    >>> net(mx.nd.zeros((2, 1, 28, 28))).shape
    (2, 10)
    """
    check_options(norm_layer, norm_kwargs, classes)
    net = nn.HybridSequential(prefix=prefix, params=params)

    def add(layer: Any) -> None:
        net.add(layer)
        if norm_layer is not None:
            net.add(norm_layer(**(norm_kwargs or {})))
        net.add(nn.Activation("relu"))

    with net.name_scope():
        add(nn.Conv2D(20, kernel_size=3))
        net.add(nn.AvgPool2D(2))
        add(nn.Conv2D(50, kernel_size=5))
        net.add(nn.AvgPool2D(2), nn.Flatten())
        add(nn.Dense(128))
        net.add(nn.Dense(classes))
    return net


def initialize(net: Any, init: str = "tutorial", ctx: Any = None) -> None:
    """Initialize a net's parameters, or replace their values.

    Parameters
    ----------
    net : Block
        Any net.
    init : {'tutorial', 'xavier'}
        ``'tutorial'`` draws weights, biases and beta from N(0, 0.01) and gamma from N(1, 0.01),
        the second number being the standard deviation. ``'xavier'`` is
        ``Xavier(magnitude=2.24)`` for the weights. All other parameters start as their layers say.
    ctx : mxnet.Context or list of mxnet.Context, optional
        Where to put them; default: the current device.

    Raises
    ------
    ValueError
        If `init` is neither of the two.
    """
    if init not in INITIALIZATIONS:
        raise ValueError(f"init must be one of {', '.join(INITIALIZATIONS)}, got {init!r}")
    overrides = _tutorial_initializers() if init == "tutorial" else {}
    xavier = mx.init.Xavier(magnitude=_XAVIER_MAGNITUDE)
    for name, parameter in net.collect_params().items():
        # Given here, an initializer outranks the parameter's own, such as 'zeros' for a bias.
        override = overrides.get(name.rsplit("_", 1)[-1])
        parameter.initialize(override, ctx=ctx, default_init=xavier, force_reinit=True)


def _tutorial_initializers() -> dict[str, Any]:
    normal = mx.init.Normal(_TUTORIAL_SIGMA)
    return {
        "weight": normal,
        "bias": normal,
        "gamma": _NormalAroundOne(_TUTORIAL_SIGMA),
        "beta": normal,
    }


class _NormalAroundOne(mx.init.Normal):
    """N(1, sigma): mx.init.Normal has mean 0 only."""

    def _init_weight(self, name: Any, array: Any) -> None:
        super()._init_weight(name, array)
        array += 1
