"""The training graphs of our layers in a file -> MXNet's ``BatchNorm`` nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from .._conversion_report import ConversionReport, Entry
from .._graph.nodes import Graph, Output
from ..backends.marker import KEY as MARKER
from ._norm_nodes import (
    BEFORE_FREEZE,
    CUDNN_LEAST_EPSILON,
    PARAMETERS,
    check_parameters,
    description_of,
    layer_name,
    name_norm,
)
from ._training_graph import ends_layer, running_means, undescribed

_TRAINING_OPTIONS = ("momentum", "use_global_stats", "unbiased_variance")


def to_builtin(graph: Graph, values: Mapping[str, Any]) -> ConversionReport:
    """Put a ``BatchNorm`` node in the place of each training graph that can be one."""
    order, variables, means = graph.nodes(), graph.variables(), running_means(graph)
    converted: list[Entry] = []
    notes: list[Entry] = []
    skipped = [
        Entry(node.name, node.name, node.op, "ScratchBatchNorm is inside a loop")
        for node in order
        if MARKER in node.body
    ]
    described = set()
    calls: Counter[str] = Counter()
    for node in order:
        if not ends_layer(node):
            continue
        description = description_of(node)
        names = {role: description[role] for role in PARAMETERS}
        running_mean = names["running_mean"]
        described.add(running_mean)
        layer = layer_name(running_mean, node.name)
        entry = partial(Entry, layer, node.name, "ScratchBatchNorm")
        absent = [key for key in _TRAINING_OPTIONS if key not in description]
        if absent:
            skipped.append(entry(f"the graph does not tell its {absent[0]}"))
            continue
        _check_counterpart(layer, description)
        check_parameters(node, names, values)
        missing = [name for name in names.values() if name not in variables]
        if missing:
            raise ValueError(f"{missing[0]!r}, which {MARKER} names, is no variable of the symbol")
        converted.append(entry("now BatchNorm"))
        notes += map(entry, _notes(description, values))
        calls[running_mean] += 1
        # MXNet numbers the writes to a variable; each call of a layer is one.
        written = dict.fromkeys(("running_mean", "running_var"), calls[running_mean])
        node.inputs = [
            node.inputs[1],
            *(Output(variables[name], 0, written.get(role, 0)) for role, name in names.items()),
        ]
        name_norm(node, graph, running_mean)
        node.op, node.attrs = "BatchNorm", _attributes(description)
    skipped += [
        Entry(layer, layer, "variant", "the graph has no description of the layer")
        for layer in undescribed(means, described)
    ]
    return ConversionReport(tuple(converted), tuple(skipped), tuple(notes))


def _attributes(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the attributes of the BatchNorm node for a layer."""
    attrs = {
        "axis": str(description["axis"]),
        "eps": repr(float(description["epsilon"])),
        "fix_gamma": str(description["fix_gamma"]),
        "momentum": repr(float(description["momentum"])),
        "use_global_stats": str(description["use_global_stats"]),
    }
    if description["epsilon"] < CUDNN_LEAST_EPSILON:
        attrs["cudnn_off"] = "True"
    if BEFORE_FREEZE in description:
        attrs[BEFORE_FREEZE] = str(description[BEFORE_FREEZE])
    return attrs


def _check_counterpart(layer: str, description: Mapping[str, Any]) -> None:
    """Raise ValueError if ``BatchNorm`` does not have the training options of a layer."""
    for key, value in (("momentum", None), ("unbiased_variance", True)):
        if description[key] is value:
            raise ValueError(
                f"{layer} cannot be converted: {key}={value} has no counterpart in BatchNorm"
            )
    number, flag = description["momentum"], description["use_global_stats"]
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise ValueError(f"momentum of {layer} must be between 0 and 1, got {number!r}")
    if not isinstance(flag, bool):
        raise ValueError(f"use_global_stats of {layer} must be True or False, got {flag!r}")


def _notes(description: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Say how a layer without centring will differ."""
    beta = description["beta"]
    if description["center"]:
        return
    if values[beta].asnumpy().any():
        yield f"center=False, but {beta} is not 0, and BatchNorm adds it"
    else:
        yield f"center=False has no counterpart; do not train {beta}"
