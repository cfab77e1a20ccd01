"""Batch normalization with its running statistics in training too, and back.

The module is not called ``freeze``, so that ``scratchbn.freeze`` is always the function.
"""

from __future__ import annotations

from typing import Any, Literal, overload
from warnings import warn

import mxnet as mx

from ._checks import check_flag
from ._hidden import HiddenNorm, freeze_hidden, hidden_norms, warn_of_hidden
from ._net import Net, blocks_of, check_block, clear_graphs, norm_layers, options_of, values_of

__all__ = ["freeze", "unfreeze"]

_GLOBAL_STATS_BEFORE = "_use_global_stats_before_freeze"
_GRAD_REQ_BEFORE = "_grad_req_before_freeze"


@overload
def freeze(net: Net, parameters: bool = ..., *, report: Literal[False] = False) -> Net: ...


@overload
def freeze(
    net: Net, parameters: bool = ..., *, report: Literal[True]
) -> tuple[Net, tuple[str, ...]]: ...


def freeze(
    net: Net, parameters: bool = False, *, report: bool = False
) -> Net | tuple[Net, tuple[str, ...]]:
    """Make all batch normalization layers of a net use their running statistics, in training too.

    Works for :class:`ScratchBatchNorm`, ``nn.BatchNorm`` and subclasses of both, and for either
    in the graph of a ``SymbolBlock``, such as an imported net, which is rewritten. Each layer
    remembers its state for :func:`unfreeze`; to freeze twice changes nothing. Compiled graphs are
    dropped; they are built again when the net is called.

    GluonCV's ``freeze_bn``, and other code that asks ``isinstance(layer, nn.BatchNorm)``, passes
    :class:`ScratchBatchNorm` by without a word: call this in its place.

    Parameters
    ----------
    net : Block
        Any net, or a norm layer itself. If it is part of a hybridized net that has been called,
        hybridize that net again.
    parameters : bool, default False
        Also stop training gamma and beta: set their ``grad_req`` to ``'null'``. Once frozen, they
        stay so until :func:`unfreeze`.
    report : bool, default False
        Return the paths, too.

    Returns
    -------
    net : Block
        The same object.
    paths : tuple of str
        With ``report=True``: the paths of the layers that were not frozen, or not so far, before;
        in a graph, that of the ``SymbolBlock`` and the name of the layer.

    Raises
    ------
    TypeError
        If `net` is not a Block, or `parameters` or `report` is not True or False.

    Warns
    -----
    UserWarning
        If a layer's running statistics are those of a new layer, 0 and 1 throughout; if there is
        batch normalization in the graph of a ``SymbolBlock`` that does not tell its options (in a
        loop, of a variant) and is not frozen.

    Examples
    --------
    >>> from mxnet.gluon import nn
    >>> from scratchbn import ScratchBatchNorm
    >>> net = nn.HybridSequential()
    >>> net.add(nn.Dense(4), ScratchBatchNorm(), nn.Dense(2))
    >>> net, paths = freeze(net, parameters=True, report=True)
    >>> paths
    ('1',)
    >>> net[1]._kwargs["use_global_stats"], net[1].gamma.grad_req
    (True, 'null')
    >>> net = unfreeze(net)
    >>> net[1]._kwargs["use_global_stats"], net[1].gamma.grad_req
    (False, 'write')
    """
    check_block(net)
    check_flag("parameters", parameters)
    check_flag("report", report)
    blocks = blocks_of(net)
    warn_of_hidden(blocks, "were not frozen")
    norms = {**dict(norm_layers(blocks)), **hidden_norms(blocks)}
    hidden = freeze_hidden(blocks, frozen=True)
    changed = []
    for norm, path in norms.items():
        before = _frozen_state(norm)
        if not isinstance(norm, HiddenNorm):
            options = options_of(norm)
            vars(norm).setdefault(_GLOBAL_STATS_BEFORE, options["use_global_stats"])
            options["use_global_stats"] = True
        for parameter in (norm.gamma, norm.beta) if parameters else ():
            # Kept on the Parameter, which layers may share.
            vars(parameter).setdefault(_GRAD_REQ_BEFORE, parameter.grad_req)
            parameter.grad_req = "null"
        if norm.running_mean in hidden or _frozen_state(norm) != before:
            changed.append((norm, path))
    if changed:
        clear_graphs(blocks)
        _warn_of_untrained(changed)
    return (net, tuple(path for _, path in changed)) if report else net


@overload
def unfreeze(net: Net, *, report: Literal[False] = False) -> Net: ...


@overload
def unfreeze(net: Net, *, report: Literal[True]) -> tuple[Net, tuple[str, ...]]: ...


def unfreeze(net: Net, *, report: bool = False) -> Net | tuple[Net, tuple[str, ...]]:
    """Put back what :func:`freeze` changed; layers that were not frozen by it stay as they are.

    Parameters
    ----------
    net : Block
        Any net, or a norm layer itself.
    report : bool, default False
        Return the paths, too.

    Returns
    -------
    net : Block
        The same object.
    paths : tuple of str
        With ``report=True``: the paths of the layers that were frozen.

    Raises
    ------
    TypeError
        If `net` is not a Block or `report` is not True or False.
    """
    check_block(net)
    check_flag("report", report)
    blocks = blocks_of(net)
    norms = {**dict(norm_layers(blocks)), **hidden_norms(blocks)}
    hidden = freeze_hidden(blocks, frozen=False)
    changed = []
    for norm, path in norms.items():
        if _GLOBAL_STATS_BEFORE not in vars(norm) and norm.running_mean not in hidden:
            continue
        if _GLOBAL_STATS_BEFORE in vars(norm):
            options_of(norm)["use_global_stats"] = vars(norm).pop(_GLOBAL_STATS_BEFORE)
        for parameter in (norm.gamma, norm.beta):
            if _GRAD_REQ_BEFORE in vars(parameter):
                parameter.grad_req = vars(parameter).pop(_GRAD_REQ_BEFORE)
        changed.append(path)
    if changed:
        clear_graphs(blocks)
    return (net, tuple(changed)) if report else net


def _frozen_state(norm: Any) -> list[Any]:
    held = [_GLOBAL_STATS_BEFORE in vars(norm), options_of(norm)["use_global_stats"]]
    return [*held, norm.gamma.grad_req, norm.beta.grad_req]


def _warn_of_untrained(norms: list[tuple[Any, str]]) -> None:
    """Warn the caller's caller of norms whose statistics are those of a new layer."""
    mx.nd.waitall()  # graphs with static_shape write to the statistics behind the engine's back
    paths = [path or "the net" for norm, path in norms if _is_untrained(norm)]
    if paths:
        warn(
            f"running_mean is 0 and running_var is 1 throughout in {len(paths)} of {len(norms)} "
            f"frozen layers ({paths[0]}): train, load or recalibrate the statistics first, else "
            "these layers do not normalize",
            UserWarning,
            stacklevel=3,
        )


def _is_untrained(norm: Any) -> bool:
    means, variances = values_of(norm.running_mean), values_of(norm.running_var)
    return bool(means) and all(
        (array.asnumpy() == value).all()
        for arrays, value in ((means, 0), (variances, 1))
        for array in arrays
    )
