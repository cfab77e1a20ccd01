"""MXNet's ``BatchNorm`` nodes in a file -> the training graphs of our layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block

from .._conversion_report import ConversionReport, Entry
from .._graph.nodes import Graph, Node, Output
from .._net import BATCH_NORM_OPERATORS
from ..backends import use_backend
from ..backends.marker import KEY as MARKER
from ..layer import ScratchBatchNorm, ScratchBatchNormReLU
from ._inference import infer_types
from ._norm_nodes import (
    BEFORE_FREEZE,
    PARAMETERS,
    check_parameters,
    epsilon_of,
    layer_name,
    obstacle,
    out_of_reach,
    with_more_outputs,
)
from ._training_graph import ends_layer

_LAYERS = {
    "BatchNorm": ScratchBatchNorm,
    "BatchNorm_v1": ScratchBatchNorm,
    "_contrib_BatchNormWithReLU": ScratchBatchNormReLU,
    "_contrib_SyncBatchNorm": ScratchBatchNorm,
}
_SYNC = "it normalized over all devices, each device now has statistics of its own"


@dataclass(frozen=True)
class Call:
    """The last node of a norm, its parameters' names by role, and the layer that replaces it.

    `more` is put into the description of the layer.
    """

    node: Node
    names: dict[str, str]
    layer: ScratchBatchNorm
    more: dict[str, bool]

    @property
    def source(self) -> Output:
        """What is normalized."""
        return self.node.inputs[1 if ends_layer(self.node) else 0]


class _Calls(Block):
    """Layers called one after another in one trace, so that each sees what was written before."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__(prefix="")
        self._calls = calls

    def forward(self, *inputs: Any) -> list[Any]:
        return [call.layer(x) for call, x in zip(self._calls, inputs)]


def to_scratch(graph: Graph, values: Mapping[str, Any]) -> ConversionReport:
    """Put a training graph in the place of each ``BatchNorm`` node that can be our layer."""
    order, more = graph.nodes(), with_more_outputs(graph)
    skipped = [
        (node, reason.replace("it", op, 1)) for node in order for op, reason in out_of_reach(node)
    ]
    nodes = []
    for node in order:
        if node.op in BATCH_NORM_OPERATORS:
            reason = _why_not(node, has_more=node in more)
            if reason is None:
                nodes.append(node)
            else:
                skipped.append((node, reason))
    calls = []
    layers: dict[tuple[str, str], tuple[Any, ScratchBatchNorm]] = {}
    for node, dtype in zip(nodes, _dtypes(graph, nodes, values)):
        names = {role: source.node.name for role, source in zip(PARAMETERS, node.inputs[1:])}
        check_parameters(node, names, values)
        statistics = names["running_mean"], names["running_var"]
        settings = node.op, names, _options(node), dtype
        if statistics not in layers:
            taken = {layer.prefix for _, layer in layers.values()}
            layers[statistics] = settings, _layer(node, names["running_mean"], dtype, taken)
        first, layer = layers[statistics]
        if first == settings:
            before = node.attrs.get(BEFORE_FREEZE)
            kept = {} if before is None else {BEFORE_FREEZE: before == "True"}
            calls.append(Call(node, names, layer, kept))
        else:
            shared = f"it shares its running statistics with {layer.prefix}"
            skipped.append((node, f"{shared}, and differs otherwise"))
    converted = [_entry(call, f"now {type(call.layer).__name__}") for call in calls]
    notes = [_entry(call, _SYNC) for call in calls if call.node.op == "_contrib_SyncBatchNorm"]
    graft(graph, calls)
    left = [Entry(node.name, node.name, node.op, reason) for node, reason in skipped]
    return ConversionReport(tuple(converted), tuple(left), tuple(notes))


def _entry(call: Call, text: str) -> Entry:
    return Entry(call.layer.prefix.rstrip("_"), call.node.name, call.node.op, text)


def _why_not(node: Node, has_more: bool) -> str | None:
    """Say why a norm cannot become our layer; `has_more` if its other outputs are used."""
    if node.op not in _LAYERS:
        return f"{node.op} is not BatchNorm"
    return obstacle(node, has_more)


def _dtypes(graph: Graph, nodes: list[Node], values: Mapping[str, Any]) -> list[np.dtype[Any]]:
    """Return the dtype of each norm's input, as far as the parameters tell it."""
    if not nodes:
        return []
    part = graph.symbol([node.inputs[0] for node in nodes])
    _, found = infer_types(part, values, {})
    own = [getattr(values.get(n.inputs[1].node.name), "dtype", np.float32) for n in nodes]
    return [dtype or np.dtype(given) for dtype, given in zip(found, own)]


def _options(node: Node) -> dict[str, Any]:
    return {
        "axis": node.integer("axis", 1),
        "momentum": node.number("momentum", 0.9),
        "epsilon": epsilon_of(node),
        "scale": not node.flag("fix_gamma", True),
        "use_global_stats": node.flag("use_global_stats", False),
    }


def _layer(
    node: Node, running_mean: str, dtype: np.dtype[Any], taken: set[str]
) -> ScratchBatchNorm:
    prefix = f"{layer_name(running_mean, node.name)}_"
    while prefix in taken:
        prefix += "_"
    try:
        layer = _LAYERS[node.op](**_options(node), prefix=prefix)
        layer.cast(dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{node.name} ({node.op}) cannot be converted: {error}") from error
    return layer


def graft(graph: Graph, calls: list[Call]) -> None:
    """Put the training graph of each call in the place of its node."""
    if not calls:
        return
    stand_ins = [mx.sym.var(f"input{i} of a call") for i in range(len(calls))]
    # A file has stock operators, whichever backend was chosen.
    plainly = use_backend("portable")
    with autograd.pause(), mx.name.NameManager(), mx.util.np_array(False), plainly:
        traced = Graph(mx.sym.Group(_Calls(calls)(*stand_ins)))
    replacements = {Output(call.node): head for call, head in zip(calls, traced.heads)}
    inputs: dict[str, Output] = {}
    known = graph.variables()
    variables: dict[str, Node] = {}
    for call, stand_in in zip(calls, stand_ins):
        inputs[stand_in.name] = replacements.get(call.source, call.source)
        for role, name in call.names.items():
            variables[getattr(call.layer, role).name] = known[name]

    def connected(source: Output) -> Output:
        if not source.node.is_variable:
            return source
        name = source.node.name
        # The version, which counts the writes to a variable, is that of our graph.
        own = source._replace(node=variables.get(name, source.node))
        return inputs.get(name, own)

    for node in traced.nodes():
        node.inputs = [connected(source) for source in node.inputs]
    for call, head in zip(calls, traced.heads):
        node = head.node
        node.name = call.node.name
        while MARKER not in node.attrs:  # a relu, a cast
            node = node.inputs[0].node
        roles = {role: call.names[role] for role in PARAMETERS}
        description = {**json.loads(node.attrs[MARKER]), **roles, **call.more}
        node.attrs[MARKER] = json.dumps(description, sort_keys=True)
    graph.replace(replacements)
