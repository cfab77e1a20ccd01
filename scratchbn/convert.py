"""``nn.BatchNorm`` <-> ``ScratchBatchNorm`` in any net, in place.

A layer is converted where it stands: it stays the same object, and changes its class. Whatever
refers to it (parents, lists, closures, hooks) still does. Its attributes are of two kinds:

=====================  ==============================  ==================================
                       what its class gives a layer    everything else
=====================  ==============================  ==================================
for example            ``_kwargs`` (the options)       name, Parameters, hooks, flags
after a conversion     those of a fresh layer of the   the same objects as before
                       new class and equal options
=====================  ==============================  ==================================

A subclass that computes what its base does is remembered in one attribute more, so that the
conversion back restores it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload
from warnings import warn

import numpy as np
from mxnet.gluon import Block, SymbolBlock, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm

from ._checks import check_flag
from ._conversion_report import ConversionReport, Entry
from ._exchange import Exchange, exchange_for_builtin, exchange_for_scratch, sync_class
from ._graph.nodes import Graph
from ._hidden import converted_graph
from ._net import (
    BuiltInBatchNorm,
    Net,
    blocks_of,
    check_block,
    clear_graphs,
    options_of,
    own_parameters,
    set_graph,
)
from .deploy._to_builtin import to_builtin as graph_to_builtin
from .deploy._to_scratch import to_scratch as graph_to_scratch
from .freezing import freeze, unfreeze
from .layer import ScratchBatchNorm, ScratchBatchNormReLU

__all__ = ["ConversionReport", "Entry", "freeze", "to_builtin", "to_scratch", "unfreeze"]

_BUILT_IN_OPTIONS = frozenset({"axis", "eps", "momentum", "fix_gamma", "use_global_stats"})
_SYNC_OPTIONS = frozenset({"ndev", "key"})
# What a subclass may define and still compute what its base does.
_HARMLESS = frozenset(
    {
        "__annotations__",
        "__dict__",
        "__doc__",
        "__init__",
        "__module__",
        "__repr__",
        "__weakref__",
        "_alias",
    }
)
# The same function as the base's, computed by another implementation. By name: GluonCV is optional.
_EQUIVALENT = frozenset({"gluoncv.nn.block.BatchNormCudnnOff"})


@overload
def to_scratch(net: Net, *, report: Literal[False] = False) -> Net: ...


@overload
def to_scratch(net: Net, *, report: Literal[True]) -> tuple[Net, ConversionReport]: ...


def to_scratch(net: Net, *, report: bool = False) -> Net | tuple[Net, ConversionReport]:
    """Turn every ``nn.BatchNorm`` of a net into a :class:`ScratchBatchNorm`, in place.

    Layers stay the same objects, with the same Parameters, names, hooks and hybridize flags: an
    existing Trainer stays valid, and layers in lists or used twice need no care. All options are
    kept, and :func:`to_builtin` restores exactly what was here. Compiled graphs are dropped; they
    are built again when the net is called.

    In the graph of a ``SymbolBlock`` the norms are nodes: the graph is rewritten, on the same
    Parameters, as :func:`scratchbn.convert_files` does it in files.

    Subclasses are converted if they differ in ``__init__``, ``__repr__`` or ``_alias`` only (and
    GluonCV's ``BatchNormCudnnOff``); ``nn.BatchNormReLU`` becomes :class:`ScratchBatchNormReLU`,
    ``SyncBatchNorm`` becomes :class:`ScratchSyncBatchNorm` for as many devices.

    Parameters
    ----------
    net : Block
        Any net, or a norm layer itself; initialized or not, hybridized or not. If it is part of
        a hybridized net that has been called, convert that net instead, or hybridize it again.
    report : bool, default False
        Return a report, too.

    Returns
    -------
    net : Block
        The same object.
    report : ConversionReport
        With ``report=True``: what was converted and what was not: layers with a forward of their
        own, loops in the graph of a ``SymbolBlock``. Operators that a block calls itself in its
        ``hybrid_forward`` are not seen.

    Raises
    ------
    TypeError
        If `net` is not a Block, `report` is not True or False, or a layer has an option or a
        dtype of the wrong type.
    ValueError
        If a layer has an option :class:`ScratchBatchNorm` does not accept, such as a momentum
        greater than 1. Nothing has been changed then.

    Warns
    -----
    UserWarning
        Without ``report=True``, if a layer was not converted or gives other results now.

    Examples
    --------
    >>> from mxnet.gluon import nn
    >>> net = nn.HybridSequential()
    >>> net.add(nn.Conv2D(4, kernel_size=3), nn.BatchNorm(), nn.Activation("relu"))
    >>> net = to_scratch(net)
    >>> type(net[1]).__name__
    'ScratchBatchNorm'
    >>> net, report = to_scratch(net, report=True)
    >>> len(report.converted), len(report.skipped)
    (0, 0)
    """
    check_block(net)
    check_flag("report", report)
    made = _convert(
        net, BuiltInBatchNorm, graph_to_scratch, _why_not_to_scratch, exchange_for_scratch
    )
    return _answer(net, made, report)


@overload
def to_builtin(net: Net, *, report: Literal[False] = False) -> Net: ...


@overload
def to_builtin(net: Net, *, report: Literal[True]) -> tuple[Net, ConversionReport]: ...


def to_builtin(net: Net, *, report: bool = False) -> Net | tuple[Net, ConversionReport]:
    """Turn every :class:`ScratchBatchNorm` of a net into ``nn.BatchNorm``, in place.

    The inverse of :func:`to_scratch`, see there. A layer that was converted from a
    subclass of ``nn.BatchNorm`` gets its subclass back.

    Parameters
    ----------
    net : Block
        Any net, or a norm layer itself.
    report : bool, default False
        Return a report, too.

    Returns
    -------
    net : Block
        The same object.
    report : ConversionReport
        With ``report=True``: what was converted and what was not: variants, which compute
        something else.

    Raises
    ------
    TypeError
        If `net` is not a Block or `report` is not True or False.
    ValueError
        If a layer has an option the built-in does not have: ``momentum=None``,
        ``unbiased_variance=True``, or a ``center`` that was changed after it was built. Nothing
        has been changed then.

    Warns
    -----
    UserWarning
        Without ``report=True``, if a layer was not converted or gives other results now.

    Examples
    --------
    >>> layer, report = to_builtin(ScratchBatchNorm(epsilon=1e-3, in_channels=4), report=True)
    >>> type(layer).__name__, layer._kwargs["eps"]
    ('BatchNorm', 0.001)
    >>> print(report)
    1 converted, 0 skipped
    """
    check_block(net)
    check_flag("report", report)
    made = _convert(
        net, ScratchBatchNorm, graph_to_builtin, _why_not_to_builtin, exchange_for_builtin
    )
    return _answer(net, made, report)


def _answer(net: Net, made: ConversionReport, report: bool) -> Net | tuple[Net, ConversionReport]:
    """Return the net and the report; who wants no report is warned of what is not conversions."""
    if report:
        return net, made
    if made.skipped or made.notes:
        warn(str(made), UserWarning, stacklevel=3)
    return net


def _convert(
    net: Block,
    family: type[Block],
    convert_graph: Callable[[Graph, dict[str, Any]], ConversionReport],
    why_not: Callable[[Any], str],
    plan: Callable[[Any, bool], Exchange],
) -> ConversionReport:
    """Plan all conversions, which may fail, then make them, which cannot."""
    blocks = blocks_of(net)
    is_float16 = _has_float16(blocks)
    exchanges: list[Exchange] = []
    graphs: dict[SymbolBlock, Any] = {}
    converted: list[Entry] = []
    skipped: list[Entry] = []
    notes: list[Entry] = []
    for block, path in blocks.items():
        entry = partial(Entry, path, block.name, type(block).__name__)
        if isinstance(block, SymbolBlock):
            try:
                graph, inside = converted_graph(block, convert_graph)
            except (TypeError, ValueError) as error:
                where = f"{path or 'the net'} ({block.name})"
                raise type(error)(f"{where} cannot be converted: {error}") from error
            if inside.converted:
                graphs[block] = graph
            for all_lines, lines in zip(
                (converted, skipped, notes), (inside.converted, inside.skipped, inside.notes)
            ):
                all_lines += [replace(e, path=f"{path}.{e.path}".lstrip(".")) for e in lines]
        elif isinstance(block, family):
            reason = why_not(block)
            if reason:
                skipped.append(entry(reason))
                continue
            try:
                exchange = plan(block, is_float16)
            except (TypeError, ValueError) as error:
                where = f"{path or 'the net'} ({block.name})"
                raise type(error)(f"{where} cannot be converted: {error}") from error
            exchanges.append(exchange)
            converted.append(entry(f"now {exchange.new_class.__name__}"))
            if exchange.note:
                notes.append(entry(exchange.note))
    for exchange in exchanges:
        exchange.carry_out()
    for block, graph in graphs.items():
        set_graph(block, graph)
    if exchanges or graphs:
        clear_graphs(blocks)
    return ConversionReport(tuple(converted), tuple(skipped), tuple(notes))


def _has_float16(blocks: dict[Block, str]) -> bool:
    parameters = (p for block in blocks for p in own_parameters(block).values())
    return any(np.dtype(parameter.dtype) == np.float16 for parameter in parameters)


# --- which layers compute what their base class does ------------------------------------------


def _why_not_to_scratch(layer: Any) -> str:
    cls = type(layer)
    if f"{cls.__module__}.{cls.__qualname__}" not in _EQUIVALENT:
        own = _own_members(layer, SyncBatchNorm, nn.BatchNormReLU, nn.BatchNorm, BuiltInBatchNorm)
        if own:
            return f"has {own} of its own"
    known = _BUILT_IN_OPTIONS | (_SYNC_OPTIONS if isinstance(layer, SyncBatchNorm) else set())
    unknown = ", ".join(sorted(set(options_of(layer)) - known))
    return f"has operator options of its own: {unknown}" if unknown else ""


def _why_not_to_builtin(layer: Any) -> str:
    own = _own_members(layer, *sync_class(layer), ScratchBatchNormReLU, ScratchBatchNorm)
    return f"has {own} of its own" if own else ""


def _own_members(layer: Any, *bases: type) -> str:
    """Name what a layer has beyond the first of the classes it belongs to, if that matters."""
    base = next(cls for cls in bases if isinstance(layer, cls))
    added = [cls for cls in type(layer).__mro__ if not issubclass(base, cls)]
    names = {name for cls in added for name in vars(cls)} - _HARMLESS
    names |= {name for name in vars(layer) if callable(getattr(base, name, None))}
    return ", ".join(sorted(names))
