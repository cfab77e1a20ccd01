"""Second pass: read the batch normalizations, and what each of them computes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..._graph.nodes import Node
from ..._net import BATCH_NORM_OPERATORS
from ...backends.marker import KEY as MARKER
from .._norm_nodes import (
    PARAMETERS,
    check_parameters,
    description_of,
    epsilon_of,
    name_norm,
    obstacle,
    with_more_outputs,
)
from .._report import Outcome
from .state import Lowering, Norm
from .weights import scale_and_shift


def read(lowering: Lowering) -> list[Norm]:
    """Return the batch normalizations; those that cannot be lowered are reported as kept."""
    graph = lowering.graph
    more = with_more_outputs(graph)
    norms = []
    for node in graph.nodes():
        if MARKER in node.attrs:
            norms.append(_described(lowering, node))
        elif node.op in BATCH_NORM_OPERATORS:
            reason = obstacle(node, has_more=node in more)
            if reason is None:
                norms.append(_builtin(lowering, node))
            else:
                node.attrs["use_global_stats"] = "True"
                lowering.kept.append(Outcome(node.name, f"left as {node.op}", reason))
    return norms


def _described(lowering: Lowering, node: Node) -> Norm:
    description = description_of(node)
    del node.attrs[MARKER]
    name_norm(node, lowering.graph, description["running_mean"])
    names = {role: description[role] for role in PARAMETERS}
    options = (description[key] for key in ("axis", "epsilon", "fix_gamma", "center"))
    return _norm(lowering, node, names, *options)


def _builtin(lowering: Lowering, node: Node) -> Norm:
    names = {role: source.node.name for role, source in zip(PARAMETERS, node.inputs[1:])}
    axis, fix_gamma = node.integer("axis", 1), node.flag("fix_gamma", True)
    norm = _norm(lowering, node, names, axis, epsilon_of(node), fix_gamma)
    norm.relu = node.op == "_contrib_BatchNormWithReLU"
    return norm


def _norm(
    lowering: Lowering,
    node: Node,
    names: Mapping[str, str],
    axis: int,
    epsilon: float,
    fix_gamma: bool,
    center: bool = True,
) -> Norm:
    check_parameters(node, names, lowering.values)
    gamma, beta, mean, variance = (lowering.value(names[role]) for role in PARAMETERS)
    total = variance + epsilon
    if (total < 0).any():
        name = names["running_var"]
        raise ValueError(f"parameter {name!r} must not be negative, got {variance.min()}")
    beta = beta if center else np.zeros_like(beta)
    attrs = {"axis": str(axis), "eps": repr(epsilon), "fix_gamma": str(fix_gamma)}
    values = {names[role]: v for role, v in zip(PARAMETERS, (gamma, beta, mean, variance))}
    scale, shift = scale_and_shift(None if fix_gamma else gamma, beta, mean, variance, epsilon)
    return Norm(
        node,
        axis,
        scale,
        shift,
        original=(attrs, values) if (total > 0).all() else None,
        dtype=np.dtype(lowering.values[names["gamma"]].dtype),
    )
