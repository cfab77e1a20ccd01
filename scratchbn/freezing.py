"""Batch normalization with its running statistics in training too, and back.

The module is not called ``freeze``, so that ``scratchbn.freeze`` is always the function.
"""

from __future__ import annotations

from typing import Any

from mxnet.gluon import Block

from ._checks import check_flag
from ._hidden import warn_of_hidden
from ._net import blocks_of, check_block, clear_graphs, norm_layers, options_of

__all__ = ["freeze", "unfreeze"]

_GLOBAL_STATS_BEFORE = "_use_global_stats_before_freeze"
_GRAD_REQ_BEFORE = "_grad_req_before_freeze"


def freeze(net: Block, parameters: bool = False) -> tuple[str, ...]:
    """Make all batch normalization layers of a net use their running statistics, in training too.

    Works for :class:`ScratchBatchNorm`, ``nn.BatchNorm`` and subclasses of both. Each layer
    remembers its state for :func:`unfreeze`; to freeze twice changes nothing. Compiled graphs are
    dropped; they are built again when the net is called.

    Parameters
    ----------
    net : Block
        Any net, or a norm layer itself. If it is part of a hybridized net that has been called,
        hybridize that net again.
    parameters : bool, default False
        Also stop training gamma and beta: set their ``grad_req`` to ``'null'``. Once frozen, they
        stay so until :func:`unfreeze`.

    Returns
    -------
    tuple of str
        The paths of the layers that were not frozen, or not so far, before.

    Raises
    ------
    TypeError
        If `net` is not a Block or `parameters` is not True or False.

    Warns
    -----
    UserWarning
        If there is batch normalization in the graph of a ``SymbolBlock``, where it cannot be
        frozen.

    Examples
    --------
    >>> from mxnet.gluon import nn
    >>> from scratchbn import ScratchBatchNorm
    >>> net = nn.HybridSequential()
    >>> net.add(nn.Dense(4), ScratchBatchNorm(), nn.Dense(2))
    >>> freeze(net, parameters=True)
    ('1',)
    >>> net[1]._kwargs["use_global_stats"], net[1].gamma.grad_req
    (True, 'null')
    >>> unfreeze(net)
    ('1',)
    >>> net[1]._kwargs["use_global_stats"], net[1].gamma.grad_req
    (False, 'write')
    """
    check_block(net)
    check_flag("parameters", parameters)
    blocks = blocks_of(net)
    warn_of_hidden(blocks, "were not frozen")
    changed = []
    for layer, path in norm_layers(blocks):
        before = _frozen_state(layer)
        options = options_of(layer)
        vars(layer).setdefault(_GLOBAL_STATS_BEFORE, options["use_global_stats"])
        options["use_global_stats"] = True
        for parameter in (layer.gamma, layer.beta) if parameters else ():
            # Kept on the Parameter, which layers may share.
            vars(parameter).setdefault(_GRAD_REQ_BEFORE, parameter.grad_req)
            parameter.grad_req = "null"
        if _frozen_state(layer) != before:
            changed.append(path)
    if changed:
        clear_graphs(blocks)
    return tuple(changed)


def unfreeze(net: Block) -> tuple[str, ...]:
    """Put back what :func:`freeze` changed; layers that were not frozen by it stay as they are.

    Parameters
    ----------
    net : Block
        Any net, or a norm layer itself.

    Returns
    -------
    tuple of str
        The paths of the layers that were frozen.

    Raises
    ------
    TypeError
        If `net` is not a Block.
    """
    check_block(net)
    blocks = blocks_of(net)
    changed = []
    for layer, path in norm_layers(blocks):
        if _GLOBAL_STATS_BEFORE not in vars(layer):
            continue
        options_of(layer)["use_global_stats"] = vars(layer).pop(_GLOBAL_STATS_BEFORE)
        for parameter in (layer.gamma, layer.beta):
            if _GRAD_REQ_BEFORE in vars(parameter):
                parameter.grad_req = vars(parameter).pop(_GRAD_REQ_BEFORE)
        changed.append(path)
    if changed:
        clear_graphs(blocks)
    return tuple(changed)


def _frozen_state(layer: Any) -> list[Any]:
    held = [_GLOBAL_STATS_BEFORE in vars(layer), options_of(layer)["use_global_stats"]]
    return [*held, layer.gamma.grad_req, layer.beta.grad_req]
