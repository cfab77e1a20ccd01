"""Batch normalizations in a graph, MXNet's and ours: what a node says, and when it is left alone.

A marker and the last node of a layer's training graph carry a description of the layer, as JSON
in the attribute ``MARKER``: its options, and its parameters' names by role.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np

from .._graph.nodes import Graph, Node
from .._net import BATCH_NORM_OPERATORS
from ..backends.marker import KEY as MARKER
from ..backends.marker import PARAMETERS as PARAMETERS
from ..backends.marker import read_description

CUDNN_LEAST_EPSILON = 1e-5
# The option use_global_stats as it was before a norm was frozen, of nodes and descriptions alike.
BEFORE_FREEZE = "__use_global_stats_before_freeze__"

# What MXNet computes with where a file does not state eps: a float in C.
_EPSILON = float(np.float32(1e-3))
_SINGLE_PRECISION = {"BatchNorm_v1", "_contrib_SyncBatchNorm"}  # their eps is a float, stated too
_QUANTIZED = "_contrib_quantized_batch_norm"


def description_of(node: Node) -> dict[str, Any]:
    """Return what a node with a ``MARKER`` says about its layer."""
    return read_description(node.name, node.attrs[MARKER])


def descriptions(graph: Graph) -> list[dict[str, Any]]:
    """Return the descriptions in a graph."""
    return [description_of(node) for node in graph.nodes() if MARKER in node.attrs]


def layer_name(running_mean: str, default: str) -> str:
    """Return the name of a layer, which its parameters begin with."""
    for ending in ("_running_mean", "_moving_mean"):
        if running_mean.endswith(ending):
            return running_mean.removesuffix(ending)
    return default


def name_norm(node: Node, graph: Graph, running_mean: str) -> None:
    """Name a norm after its layer if its name is one that MXNet counted, as in older files.

    Where a relu or a cast follows, that one has the layer's name, and the norm's says nothing.
    """
    layer = layer_name(running_mean, "")
    if not layer or not re.fullmatch(rf"{re.escape(layer)}_(reshape_like|identity)\d+", node.name):
        return
    taken = {other.name for other in graph.nodes()}
    names = (f"{layer}_{end}{n or ''}" for n in count() for end in ("fwd", "norm"))
    node.name = next(name for name in names if name not in taken)


def check_parameters(node: Node, names: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter of a norm is missing or has another shape than the rest."""
    for name in names.values():
        if name not in values:
            raise ValueError(f"parameter {name!r} of node {node.name!r} is missing from params")
    shapes = {name: values[name].shape for name in names.values()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"parameters of {node.name!r} must have one shape (C,), got {shapes}")


def with_more_outputs(graph: Graph) -> set[Node]:
    """Return the nodes of which more than the first output is used."""
    return {output.node for output in graph.used() if output.number > 0}


def obstacle(node: Node, has_more: bool) -> str | None:
    """Say why one of MXNet's norms is not rewritten; `has_more` if its other outputs are used."""
    if has_more or node.flag("output_mean_var", False):
        return "its statistics are outputs too"
    computed = [source.node.name for source in node.inputs[1:] if not source.node.is_variable]
    return f"{computed[0]} is computed in the graph" if computed else None


def epsilon_of(node: Node) -> float:
    """Return the epsilon that one of MXNet's norms computes with."""
    epsilon = node.number("eps", _EPSILON)
    return float(np.float32(epsilon)) if node.op in _SINGLE_PRECISION else epsilon


def out_of_reach(node: Node, *operators: str) -> Iterator[tuple[str, str]]:
    """Yield norms, and other operators, that a node hides; each with the reason it is left."""
    if node.op == _QUANTIZED:
        yield node.op, "it is computed in int8"
    fused = node.op.startswith("_sg_")
    for op in sorted({*BATCH_NORM_OPERATORS, *operators}):
        if node.holds(op):
            yield op, "oneDNN has fused it" if fused else "it is inside a loop"
