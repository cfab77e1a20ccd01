"""GluonCV's model zoo with any norm layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from scratchbn import ScratchBatchNorm, to_scratch
from scratchbn._net import blocks_of

import gluoncv
from gluoncv.model_zoo import get_model_list
from mxnet.gluon import nn

__all__ = ["get_model"]

# They cut the channels of nn.BatchNorm and of no other norm layer.
_PRUNED = re.compile(r"resnet\d+_v1[bd]_0\.\d+")


def get_model(
    name: str,
    norm_layer: Callable[..., Any] = ScratchBatchNorm,
    norm_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Build a net of GluonCV's model zoo with another norm layer than ``nn.BatchNorm``.

    The norm layer is passed to the net as ``norm_layer=``. Some nets do not ask for it everywhere,
    or at all (VGG, CenterNet, the pruned ResNets); what they build themselves is converted with
    :func:`scratchbn.to_scratch`, if `norm_layer` is ``ScratchBatchNorm``.

    Parameters
    ----------
    name : str
        A name that ``gluoncv.model_zoo.get_model_list()`` has, ``'cifar_resnet20_v1'``.
    norm_layer : callable
        Called like ``nn.BatchNorm``. With ``nn.BatchNorm`` the net is the zoo's own.
    norm_kwargs : mapping, optional
        Options of the norm layers.
    **options
        Passed to the net: ``classes=10``. Nothing is downloaded unless ``pretrained=True`` or
        ``pretrained_base=True`` is among them.

    Returns
    -------
    Block
        Not initialized, unless pretrained.

    Raises
    ------
    TypeError
        If `norm_layer` is not callable, or an option is not one of the net's.
    ValueError
        If the zoo has no net called `name`, or the net builds norm layers itself where
        `norm_layer` or `norm_kwargs` asks for something else.

    Examples
    --------
    >>> import mxnet as mx
    >>> net = get_model("cifar_resnet20_v1", classes=4)
    >>> net.initialize()
    >>> net(mx.nd.zeros((2, 3, 32, 32))).shape
    (2, 4)
    >>> type(net.features[1]).__name__
    'ScratchBatchNorm'
    """
    if not callable(norm_layer):
        raise TypeError(f"norm_layer must be a layer class, got {norm_layer!r}")
    if not isinstance(name, str) or name.lower() not in get_model_list():
        raise ValueError(
            f"name must be one of gluoncv.model_zoo.get_model_list(), such as "
            f"'cifar_resnet20_v1'; got {name!r}"
        )
    net, refused = _build(name, norm_layer, dict(norm_kwargs or {}), options)
    # Where the net's own layers and those asked for are of one class, only refusal tells.
    own = 0
    if refused or norm_layer is not nn.BatchNorm:
        own = sum(type(block) is nn.BatchNorm for block in blocks_of(net))
    if norm_kwargs and (own or "norm_kwargs" in refused):
        raise ValueError(
            f"norm_kwargs={dict(norm_kwargs)!r} cannot be applied: "
            f"{name} builds norm layers without them"
        )
    if own and norm_layer not in (ScratchBatchNorm, nn.BatchNorm):
        raise ValueError(
            f"norm_layer={norm_layer!r} cannot be applied: {name} builds {own} of its norm "
            "layers itself; ScratchBatchNorm and nn.BatchNorm can"
        )
    if norm_layer is not ScratchBatchNorm:
        return net
    net, report = to_scratch(net, report=True)
    if report.skipped:
        raise ValueError(f"{name} cannot be built with ScratchBatchNorm alone: {report}")
    return net


def _build(
    name: str,
    norm_layer: Callable[..., Any],
    norm_kwargs: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Any, set[str]]:
    """Build the net with as much of what is wanted as it accepts; name what it refused."""
    # Most nets with a backbone download it by default.
    wanted: dict[str, Any] = {"pretrained_base": False, "norm_layer": norm_layer}
    if norm_kwargs:
        wanted["norm_kwargs"] = norm_kwargs
    is_fixed = _PRUNED.fullmatch(name.lower()) and norm_layer is not nn.BatchNorm
    refused = {"norm_layer", "norm_kwargs"} if is_fixed else set()
    while True:
        offered = {key: value for key, value in wanted.items() if key not in refused}
        try:
            return gluoncv.model_zoo.get_model(name, **{**offered, **options}), refused
        except (TypeError, NotImplementedError) as error:
            more = _named_in(error, offered.keys() - options.keys())
            if not more:
                raise
            refused |= more


def _named_in(error: Exception, offered: set[str]) -> set[str]:
    """Return which of the offered options an error of GluonCV's refuses."""
    text = str(error)
    if "Only standard BatchNorm layer is supported" in text:
        return offered - {"pretrained_base"}
    if "unexpected keyword argument" in text or "multiple values for keyword argument" in text:
        return {key for key in offered if f"'{key}'" in text}
    return set()
