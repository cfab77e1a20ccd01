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
from typing import Any, Literal, TypeVar, overload
from warnings import warn

import numpy as np
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm

from ._checks import check_flag
from ._conversion_report import ConversionReport, Entry
from ._graph.nodes import Graph
from ._hidden import converted_graph
from ._net import (
    BuiltInBatchNorm,
    blocks_of,
    can_have_gradient,
    check_block,
    clear_graphs,
    options_of,
    own_parameters,
    set_graph,
    values_of,
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
_REMEMBERED = "_class_before_conversion"

Net = TypeVar("Net", bound=Block)


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
    made = _convert(net, BuiltInBatchNorm, graph_to_scratch, _why_not_to_scratch, _to_scratch)
    if report:
        return net, made
    _warn_of_others(made)
    return net


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
    made = _convert(net, ScratchBatchNorm, graph_to_builtin, _why_not_to_builtin, _to_builtin)
    if report:
        return net, made
    _warn_of_others(made)
    return net


def _warn_of_others(report: ConversionReport) -> None:
    """Warn the caller's caller, who reads no report, of what it has beside conversions."""
    if report.skipped or report.notes:
        warn(str(report), UserWarning, stacklevel=3)


def _convert(
    net: Block,
    family: type[Block],
    convert_graph: Callable[[Graph, dict[str, Any]], ConversionReport],
    why_not: Callable[[Any], str],
    plan: Callable[[Any, bool], _Exchange],
) -> ConversionReport:
    """Plan all conversions, which may fail, then make them, which cannot."""
    blocks = blocks_of(net)
    is_float16 = _has_float16(blocks)
    exchanges: list[_Exchange] = []
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
    own = _own_members(layer, *_sync_class(layer), ScratchBatchNormReLU, ScratchBatchNorm)
    return f"has {own} of its own" if own else ""


def _own_members(layer: Any, *bases: type) -> str:
    """Name what a layer has beyond the first of the classes it belongs to, if that matters."""
    base = next(cls for cls in bases if isinstance(layer, cls))
    added = [cls for cls in type(layer).__mro__ if not issubclass(base, cls)]
    names = {name for cls in added for name in vars(cls)} - _HARMLESS
    names |= {name for name in vars(layer) if callable(getattr(base, name, None))}
    return ", ".join(sorted(names))


# --- what a layer exchanges -------------------------------------------------------------------


def _to_scratch(layer: Any, is_float16: bool) -> _Exchange:
    options = options_of(layer)
    if options["momentum"] is None:  # which means something else here
        raise ValueError("momentum must be between 0 and 1, got None")
    sync = isinstance(layer, SyncBatchNorm)
    new = _scratch_class(layer)(
        **(_sharing_of(layer) if sync else {"axis": options["axis"]}),
        momentum=options["momentum"],
        epsilon=options["eps"],
        # The built-in has no such option: a Parameter that can have no gradient is its record.
        center=can_have_gradient(layer.beta),
        scale=not options["fix_gamma"],
        use_global_stats=bool(options["use_global_stats"]),
        prefix="fresh_",
        **_initializers(layer),
    )
    # Parameters do not tell float16 from float32; the parameters of the other layers do.
    new.cast("float16" if is_float16 else layer.running_mean.dtype)
    if sync:
        old = SyncBatchNorm(num_devices=1, prefix="fresh_")
    else:
        old = (nn.BatchNormReLU if layer.fuse_relu else nn.BatchNorm)(prefix="fresh_")
    return _Exchange(layer, old, new, "beta is not 0; with center=False it is ignored")


def _scratch_class(layer: Any) -> Callable[..., Any]:
    if isinstance(layer, SyncBatchNorm):
        from .sync import ScratchSyncBatchNorm  # it changes how MXNet words errors

        return ScratchSyncBatchNorm
    return ScratchBatchNormReLU if layer.fuse_relu else ScratchBatchNorm


def _sharing_of(layer: Any) -> dict[str, Any]:
    """Return which devices share; the key is the layer's own unless somebody has changed it."""
    options = options_of(layer)
    own = options["key"] == layer.prefix
    return {"num_devices": options["ndev"], "key": None if own else options["key"]}


def _sync_class(layer: Any) -> list[type]:
    """Return the class of our layers that share, if a layer is one."""
    return [cls for cls in type(layer).__mro__ if cls.__name__ == "ScratchSyncBatchNorm"]


def _initializers(layer: Any) -> dict[str, Any]:
    """Return the initializers as options; None means the initializer that fits the name."""
    found = {
        "beta_initializer": layer.beta.init,
        "gamma_initializer": layer.gamma.init,
        "running_mean_initializer": layer.running_mean.init,
        "running_variance_initializer": layer.running_var.init,
    }
    return {name: init for name, init in found.items() if init is not None}


def _to_builtin(layer: Any, is_float16: bool) -> _Exchange:
    options = options_of(layer)
    if options["momentum"] is None or hasattr(layer, "num_batches"):
        raise ValueError("momentum=None has no counterpart in nn.BatchNorm")
    if options["unbiased_variance"]:
        raise ValueError("unbiased_variance=True has no counterpart in nn.BatchNorm")
    if options["center"] != can_have_gradient(layer.beta):
        raise ValueError(
            f"center was changed to {options['center']} after the layer was built; "
            "nn.BatchNorm cannot do that"
        )
    has_relu, sync = isinstance(layer, ScratchBatchNormReLU), _sync_class(layer)
    if sync and options["axis"] != 1:
        raise ValueError(f"axis={options['axis']} has no counterpart in SyncBatchNorm")
    built_in = nn.BatchNormReLU if has_relu else SyncBatchNorm if sync else nn.BatchNorm
    new = built_in(
        **({"num_devices": _number_of_devices(layer)} if sync else {"axis": options["axis"]}),
        momentum=options["momentum"],
        epsilon=options["eps"],
        center=options["center"],
        scale=not options["fix_gamma"],
        use_global_stats=options["use_global_stats"],
        prefix="fresh_",
    )
    if sync:
        options_of(new)["key"] = options["key"] or layer.prefix
        old = sync[0](num_devices=1, prefix="fresh_")
    else:
        old = (ScratchBatchNormReLU if has_relu else ScratchBatchNorm)(prefix="fresh_")
    return _Exchange(layer, old, new, "center=False, but beta is not 0, and the built-in adds it")


def _number_of_devices(layer: Any) -> int:
    """Return how many devices share in a layer of ours; 1 if that is not known yet."""
    return layer.options.num_devices or max(len(values_of(layer.gamma)), 1)


class _Exchange:
    """A layer's attributes to exchange, given a fresh layer of the class it has and will have.

    `old` is of the class that a conversion back would choose by itself; a layer of another one
    remembers its own.
    """

    def __init__(self, layer: Any, old: Any, new: Any, note: str) -> None:
        self._layer = layer
        self._loses = {*_given_by_class(old), _REMEMBERED}
        self._gains = _given_by_class(new)
        if type(layer) is not type(old):
            self._gains[_REMEMBERED] = type(layer)
        self.new_class: type = vars(layer).get(_REMEMBERED, type(new))
        self.note = note if _has_ignored_offset(layer) else ""

    def carry_out(self) -> None:
        attributes = vars(self._layer)
        for name in self._loses:
            attributes.pop(name, None)
        attributes.update(self._gains)
        self._layer.__class__ = self.new_class


def _given_by_class(fresh: Any) -> dict[str, Any]:
    """Return the attributes that a layer has over any block without Parameters."""
    others = {*vars(HybridBlock(prefix="fresh_")), *own_parameters(fresh)}
    return {name: value for name, value in vars(fresh).items() if name not in others}


def _has_ignored_offset(layer: Any) -> bool:
    """Tell whether beta is not trained and not 0, which the families treat differently."""
    values = values_of(layer.beta)
    return not can_have_gradient(layer.beta) and any(v.asnumpy().any() for v in values)
