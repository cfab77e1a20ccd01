"""Batch normalizations in a graph, MXNet's and ours: what a node says, and when it is left alone.

A marker and the last node of a layer's training graph carry a description of the layer, as JSON
in the attribute ``MARKER``: its options, and its parameters' names by role.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backends.marker import KEY as MARKER
from ..backends.marker import PARAMETERS as PARAMETERS
from ..backends.marker import read_description
from ._ir import Graph, Node

CUDNN_LEAST_EPSILON = 1e-5


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
