"""``nn.BatchNorm`` <-> ``ScratchBatchNorm`` in any net, and freezing either of them.

A layer is converted where it stands: the object stays, its class and the attributes that belong to
the class change. So whatever refers to the layer (parents, lists, closures, hooks) still does, and
its Parameters, name, hooks and hybridize flags are the same objects as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm
from mxnet.gluon.nn.basic_layers import _BatchNorm

from ._checks import check_flag
from ._net import (
    blocks_of,
    check_block,
    clear_graphs,
    hidden_builtin,
    hidden_scratch,
    norm_layers,
    warn_of_hidden,
)
from .layer import ScratchBatchNorm, ScratchBatchNormReLU

__all__ = ["ConversionReport", "Entry", "freeze", "to_builtin", "to_scratch", "unfreeze"]

_BUILT_IN_OPTIONS = frozenset({"axis", "eps", "momentum", "fix_gamma", "use_global_stats"})
# What a subclass may define without computing anything else than its base does.
_HARMLESS = frozenset(
    {
        "__annotations__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__init__",
        "__module__",
        "__qualname__",
        "__repr__",
        "__static_attributes__",
        "__weakref__",
        "_alias",
    }
)
# The same function as the base's, computed by another implementation. By name: GluonCV is optional.
_EQUIVALENT = frozenset({"gluoncv.nn.block.BatchNormCudnnOff"})


# --- reports ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of a report.

    Attributes
    ----------
    path : str
        Where the block is, ``'features.0.body.1'``; empty for the net itself.
    name : str
        Its Gluon name.
    kind : str
        Its class, before the conversion.
    text : str
        What became of it, or why nothing did.
    """

    path: str
    name: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path or '(the net)'} [{self.name}] {self.kind}: {self.text}"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes
    ----------
    converted, skipped, notes : tuple of Entry
        The layers that were converted; the normalization that was left alone, and why; converted
        layers that will compute something else than before, and what.

    Examples
    --------
    >>> print(ConversionReport((Entry("0", "bn0", "BatchNorm", "now ScratchBatchNorm"),)))
    1 converted, 0 skipped
    """

    converted: tuple[Entry, ...] = ()
    skipped: tuple[Entry, ...] = ()
    notes: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.skipped)} skipped"]
        lines += [f"  skipped {entry}" for entry in self.skipped]
        lines += [f"  note {entry}" for entry in self.notes]
        return "\n".join(lines)


# --- conversion -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A conversion that has been checked and cannot fail any more."""

    layer: Any
    cls: type
    remove: frozenset[str]
    add: dict[str, Any]
    note: str | None

    def carry_out(self) -> None:
        attributes = vars(self.layer)
        for name in self.remove:
            attributes.pop(name, None)
        attributes.update(self.add)
        self.layer.__class__ = self.cls


def to_scratch(net: Block) -> tuple[Block, ConversionReport]:
    """Turn every ``nn.BatchNorm`` of a net into a :class:`ScratchBatchNorm`, in place.

    Layers stay the objects they are, wherever they are referred to, with the same Parameters,
    names, hooks and hybridize flags: a Trainer made earlier goes on, layers in lists or used twice
    need no care. All options are kept, and :func:`to_builtin` restores exactly what was here.
    Compiled graphs are dropped; they are built again when the net is called.

    Subclasses are converted if they differ in ``__init__``, ``__repr__`` or ``_alias`` only (and
    GluonCV's ``BatchNormCudnnOff``); ``nn.BatchNormReLU`` becomes :class:`ScratchBatchNormReLU`.

    Parameters
    ----------
    net : Block
        Any net, or a norm layer itself; initialized or not, hybridized or not. If it is part of
        a hybridized net that has been called, convert that net instead, or hybridize it again.

    Returns
    -------
    net : Block
        The same object.
    report : ConversionReport
        What was converted and what was not: ``SyncBatchNorm``, layers with a forward of their own,
        batch normalization inside the graph of a ``SymbolBlock``. Operators that a block calls
        itself in its ``hybrid_forward`` are not seen.

    Raises
    ------
    TypeError
        If `net` is not a Block, or a layer has an option or a dtype of the wrong type.
    ValueError
        If a layer has an option :class:`ScratchBatchNorm` does not accept, such as a momentum
        greater than 1. Nothing has been changed then.

    Examples
    --------
    >>> from mxnet.gluon import nn
    >>> net = nn.HybridSequential()
    >>> net.add(nn.Conv2D(4, kernel_size=3), nn.BatchNorm(), nn.Activation("relu"))
    >>> net, report = to_scratch(net)
    >>> type(net[1]).__name__, len(report.converted), len(report.skipped)
    ('ScratchBatchNorm', 1, 0)
    """
    check_block(net)
    return _convert(net, _BatchNorm, _why_not_to_scratch, _plan_to_scratch)


def to_builtin(net: Block) -> tuple[Block, ConversionReport]:
    """Turn every :class:`ScratchBatchNorm` of a net into ``nn.BatchNorm``, in place.

    The inverse of :func:`to_scratch`, see there. A layer that was of a subclass of
    ``nn.BatchNorm`` is of that subclass again.

    Parameters
    ----------
    net : Block
        Any net, or a norm layer itself.

    Returns
    -------
    net : Block
        The same object.
    report : ConversionReport
        What was converted and what was not: variants, which compute something else, and layers
        inside the graph of a ``SymbolBlock``.

    Raises
    ------
    TypeError
        If `net` is not a Block.
    ValueError
        If a layer has an option the built-in does not have: ``momentum=None``,
        ``unbiased_variance=True``, or a ``center`` that was changed after it was built. Nothing
        has been changed then.

    Examples
    --------
    >>> layer, report = to_builtin(ScratchBatchNorm(epsilon=1e-3, in_channels=4))
    >>> type(layer).__name__, layer._kwargs["eps"]
    ('BatchNorm', 0.001)
    >>> print(report)
    1 converted, 0 skipped
    """
    check_block(net)
    return _convert(net, ScratchBatchNorm, _why_not_to_built_in, _plan_to_built_in)


def _convert(
    net: Block,
    family: type,
    why_not: Callable[[Block], str | None],
    plan: Callable[[Any, bool], _Plan],
) -> tuple[Block, ConversionReport]:
    blocks = blocks_of(net)
    is_float16 = _holds_float16(blocks)
    plans, converted, skipped, notes = [], [], [], []
    for block, path in blocks.items():
        reason = why_not(block)
        if reason is not None:
            skipped.append(_entry(block, path, reason))
        elif isinstance(block, family):
            planned = _checked(plan, block, path, is_float16)
            plans.append(planned)
            converted.append(_entry(block, path, f"now {planned.cls.__name__}"))
            if planned.note:
                notes.append(_entry(block, path, planned.note))
    for planned in plans:
        planned.carry_out()
    if plans:
        clear_graphs(blocks)
    return net, ConversionReport(tuple(converted), tuple(skipped), tuple(notes))


def _holds_float16(blocks: dict[Block, str]) -> bool:
    parameters = (p for block in blocks for p in block._reg_params.values())
    return any(np.dtype(parameter.dtype) == np.float16 for parameter in parameters)


def _entry(block: Block, path: str, text: str) -> Entry:
    return Entry(path, block.name, type(block).__name__, text)


def _checked(
    plan: Callable[[Any, bool], _Plan], block: Block, path: str, is_float16: bool
) -> _Plan:
    try:
        return plan(block, is_float16)
    except (TypeError, ValueError) as error:
        message = f"{path or 'the net'} ({block.name}) cannot be converted: {error}"
        raise type(error)(message) from error


def _own_members(layer: Block, base: type) -> str:
    """Name what a layer has beyond its base class, apart from what does not matter."""
    added = [c for c in type(layer).__mro__ if not issubclass(base, c)]
    names = {name for c in added for name in vars(c)} - _HARMLESS
    names |= {name for name in vars(layer) if callable(getattr(base, name, None))}
    return ", ".join(sorted(names))


def _why_not_to_scratch(block: Block) -> str | None:
    if isinstance(block, SymbolBlock):
        hidden = hidden_builtin(block)
        return f"{hidden} batch normalizations are nodes of its graph" if hidden else None
    if not isinstance(block, _BatchNorm):
        return None
    if isinstance(block, SyncBatchNorm):
        return "it normalizes over all devices"
    own = "" if _is_equivalent(type(block)) else _own_members(block, _built_in_base(block))
    if own:
        return f"has {own} of its own"
    unknown = ", ".join(sorted(set(block._kwargs) - _BUILT_IN_OPTIONS))
    return f"has operator options of its own: {unknown}" if unknown else None


def _is_equivalent(cls: type) -> bool:
    return f"{cls.__module__}.{cls.__qualname__}" in _EQUIVALENT


def _why_not_to_built_in(block: Block) -> str | None:
    if isinstance(block, SymbolBlock):
        hidden = hidden_scratch(block)
        return f"{hidden} batch normalizations are nodes of its graph" if hidden else None
    if not isinstance(block, ScratchBatchNorm):
        return None
    own = _own_members(block, _scratch_base(block))
    return f"has {own} of its own" if own else None


def _built_in_base(block: _BatchNorm) -> type:
    return next(c for c in (nn.BatchNormReLU, nn.BatchNorm, _BatchNorm) if isinstance(block, c))


def _scratch_base(block: ScratchBatchNorm) -> type:
    return next(c for c in (ScratchBatchNormReLU, ScratchBatchNorm) if isinstance(block, c))


def _has_ignored_offset(layer: Any) -> bool:
    if layer.beta._differentiable or layer.beta._data is None:
        return False
    return any(value.asnumpy().any() for value in layer.beta._data)


def _plan_to_scratch(layer: _BatchNorm, is_float16: bool) -> _Plan:
    options = layer._kwargs
    base = ScratchBatchNormReLU if layer.fuse_relu else ScratchBatchNorm
    template = base(
        axis=options["axis"],
        momentum=options["momentum"],
        epsilon=options["eps"],
        # The built-in has no such option: a Parameter that can have no gradient is its record.
        center=layer.beta._differentiable,
        scale=not options["fix_gamma"],
        use_global_stats=bool(options["use_global_stats"]),
        prefix="template_",
        **_initializers(layer),
    )
    if template._kwargs["momentum"] is None:
        raise ValueError("momentum must be between 0 and 1, got None")
    # Parameters do not tell float16 from float32; the parameters of the other layers do.
    template.cast("float16" if is_float16 else layer.running_mean.dtype)
    plain = nn.BatchNormReLU if layer.fuse_relu else nn.BatchNorm
    note = "beta is not 0; with center=False it is ignored"
    return _plan(layer, template, nn.BatchNorm(prefix="template_"), plain, note)


def _plan_to_built_in(layer: ScratchBatchNorm, is_float16: bool) -> _Plan:
    options = layer._kwargs
    if options["momentum"] is None or hasattr(layer, "num_batches"):
        raise ValueError("momentum=None has no counterpart in nn.BatchNorm")
    if options["unbiased_variance"]:
        raise ValueError("unbiased_variance=True has no counterpart in nn.BatchNorm")
    if options["center"] != layer.beta._differentiable:
        raise ValueError(
            f"center was changed to {options['center']} after the layer was built; "
            "nn.BatchNorm cannot do that"
        )
    relu = isinstance(layer, ScratchBatchNormReLU)
    template = (nn.BatchNormReLU if relu else nn.BatchNorm)(
        axis=options["axis"],
        momentum=options["momentum"],
        epsilon=options["eps"],
        center=options["center"],
        scale=not options["fix_gamma"],
        use_global_stats=options["use_global_stats"],
        prefix="template_",
    )
    base = _scratch_base(layer)
    note = "center=False, but beta is not 0, and the built-in adds it"
    return _plan(layer, template, base(prefix="template_"), base, note)


def _plan(layer: Any, template: Any, old_template: Any, plain: type, note: str) -> _Plan:
    """Plan to give a layer the class and the attributes of a template.

    Parameters
    ----------
    layer : Block
        The layer to convert.
    template : Block
        A layer of the new family with its options.
    old_template : Block
        A layer of the old family.
    plain : type
        The class of the old family that a conversion back would choose by itself.
    note : str
        For the report, if the layer does not center but has an offset.
    """
    remembered = vars(layer).get("_class_before_conversion", type(template))
    add = _attributes_of_class(template)
    if type(layer) is not plain:
        add["_class_before_conversion"] = type(layer)
    remove = frozenset({*_attributes_of_class(old_template), "_class_before_conversion"})
    return _Plan(layer, remembered, remove, add, note if _has_ignored_offset(layer) else None)


def _attributes_of_class(layer: Any) -> dict[str, Any]:
    """Return the attributes of a fresh layer that its class gave it, Parameters apart."""
    given = {*vars(HybridBlock(prefix="template_")), *layer._reg_params}
    return {name: value for name, value in vars(layer).items() if name not in given}


def _initializers(layer: _BatchNorm) -> dict[str, Any]:
    """Return the initializers as options; None means the initializer that fits the name."""
    found = {
        "beta_initializer": layer.beta.init,
        "gamma_initializer": layer.gamma.init,
        "running_mean_initializer": layer.running_mean.init,
        "running_variance_initializer": layer.running_var.init,
    }
    return {name: init for name, init in found.items() if init is not None}


# --- freezing ---------------------------------------------------------------------------------

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
        vars(layer).setdefault(_GLOBAL_STATS_BEFORE, layer._kwargs["use_global_stats"])
        layer._kwargs["use_global_stats"] = True
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
        layer._kwargs["use_global_stats"] = vars(layer).pop(_GLOBAL_STATS_BEFORE)
        for parameter in (layer.gamma, layer.beta):
            if _GRAD_REQ_BEFORE in vars(parameter):
                parameter.grad_req = vars(parameter).pop(_GRAD_REQ_BEFORE)
        changed.append(path)
    if changed:
        clear_graphs(blocks)
    return tuple(changed)


def _frozen_state(layer: Any) -> list[Any]:
    grad_reqs = [parameter.grad_req for parameter in (layer.gamma, layer.beta)]
    held = [_GLOBAL_STATS_BEFORE in vars(layer), layer._kwargs["use_global_stats"]]
    return [*held, *grad_reqs]
