"""Batch normalizations in a graph told to use their running statistics in training too, and back.

What was before is kept in the graph itself, and so in its file: in an attribute of MXNet's node, in
the description of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._graph.nodes import Graph, Node
from .._net import BATCH_NORM_OPERATORS
from ..layer import ScratchBatchNorm
from ._norm_nodes import BEFORE_FREEZE, PARAMETERS, description_of, layer_name
from ._to_scratch import Call, graft
from ._training_graph import ends_layer

_OPTIONS = ("axis", "momentum", "epsilon", "center", "use_global_stats", "unbiased_variance")


def freeze_graph(graph: Graph, frozen: bool) -> set[str]:
    """Freeze the norms of a graph, or put back what they were; returns the running means of those.

    A norm is left alone if it does not say what it would need to: see :func:`may_be_frozen`.
    """
    changed: set[str] = set()
    calls: list[Call] = []
    layers: dict[str, ScratchBatchNorm] = {}
    for node in graph.nodes():
        if node.op in BATCH_NORM_OPERATORS:
            stated, before = node.flag("use_global_stats", False), node.attrs.get(BEFORE_FREEZE)
            value, kept = _exchanged(stated, None if before is None else before == "True", frozen)
            if (stated, before) == (value, None if kept is None else str(kept)):
                continue
            node.attrs["use_global_stats"] = str(value)
            node.attrs.pop(BEFORE_FREEZE, None)
            if kept is not None:
                node.attrs[BEFORE_FREEZE] = str(kept)
            changed.add(node.inputs[3].node.name)
        elif ends_layer(node) and may_be_frozen(node):
            about = description_of(node)
            stated, before = about["use_global_stats"], about.get(BEFORE_FREEZE)
            value, kept = _exchanged(stated, before, frozen)
            if (stated, before) == (value, kept):
                continue
            mean = about["running_mean"]
            layer = layers.setdefault(mean, _layer(about, value))
            names = {role: about[role] for role in PARAMETERS}
            if hasattr(layer, "num_batches"):
                names["num_batches"] = f"{mean.removesuffix('running_mean')}num_batches"
            calls.append(Call(node, names, layer, {} if kept is None else {BEFORE_FREEZE: kept}))
            changed.add(mean)
    graft(graph, calls)
    return changed


def may_be_frozen(node: Node) -> bool:
    """Tell whether the last node of one of our layers describes how the layer trains."""
    return all(key in description_of(node) for key in _OPTIONS)


def _exchanged(stated: bool, before: bool | None, frozen: bool) -> tuple[bool, bool | None]:
    """Return what ``use_global_stats`` is to be, and what is to be remembered."""
    if frozen:
        return True, stated if before is None else before
    return stated if before is None else before, None


def _layer(description: Mapping[str, Any], use_global_stats: bool) -> ScratchBatchNorm:
    options = {**{key: description[key] for key in _OPTIONS}, "use_global_stats": use_global_stats}
    prefix = f"{layer_name(description['running_mean'], 'norm')}_"
    return ScratchBatchNorm(**options, scale=not description["fix_gamma"], prefix=prefix)
