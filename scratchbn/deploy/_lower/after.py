"""Fold a norm into the layers that follow it, where each of their outputs sees all its channels.

At the border of a padded convolution some products are missing, and with them a part of what the
shift adds up to: there it is exact only if nothing is shifted.
"""

from __future__ import annotations

from typing import Any

from ..._graph.nodes import Node, Output
from .layers import check_parameters, fitting, set_weights
from .state import Lowering, Norm, Obstacle
from .weights import weights_before_norm


def fold_into_followers(lowering: Lowering, norm: Norm) -> list[Node]:
    """Fold a norm into all layers that use it, and return them; [] if one of them cannot."""
    graph = lowering.graph
    uses = graph.uses()
    if norm.relu or norm.node in (head.node for head in graph.heads):
        return []
    planned: list[tuple[Node, list[Any]]] = []
    try:
        for user in graph.nodes():
            if Output(norm.node) in user.inputs:
                layer = _layer(lowering, user)
                planned.append((layer, _weights(lowering, norm, layer, uses)))
        if uses[norm.node] != len(planned):
            return []
    except Obstacle:
        return []
    for layer, arrays in planned:
        set_weights(lowering, layer, arrays)
    graph.replace({Output(norm.node): norm.node.inputs[0]})
    return [layer for layer, _ in planned]


def _layer(lowering: Lowering, user: Node) -> Node:
    """Return the layer that uses a norm, through a Flatten if there is one."""
    if user.op != "Flatten":
        return user
    behind = [node for node in lowering.graph.nodes() if Output(user) in node.inputs]
    if len(behind) != 1 or behind[0].op != "FullyConnected" or lowering.graph.uses()[user] > 1:
        raise Obstacle(f"{user.name} is used otherwise")
    return behind[0]


def _weights(lowering: Lowering, norm: Norm, layer: Node, uses: Any) -> list[Any]:
    """Return the weights of a layer with a norm in them; an Obstacle if that is not exact."""
    if not _sees_all(norm, layer):
        raise Obstacle(f"{layer.name} ({layer.op}) does not see all channels everywhere")
    check_parameters(lowering, layer)
    names = [source.node.name for source in layer.inputs[1:]]
    if any(uses[source.node] > 1 for source in layer.inputs[1:]):
        raise Obstacle(f"{names[0]} is used by several layers")
    weight = lowering.value(names[0])
    bias = lowering.value(names[1]) if len(names) > 1 else None
    groups, channels = layer.integer("num_group", 1), len(norm.scale)
    if (weight.shape[1] * groups) % channels or (groups > 1 and channels % groups):
        raise Obstacle(f"{layer.name} has other channels")
    return fitting(
        lowering, layer, weights_before_norm(weight, bias, norm.scale, norm.shift, groups)
    )


def _sees_all(norm: Norm, layer: Node) -> bool:
    axis, rank = norm.channel_axis(), norm.rank
    if layer.op == "Convolution":
        unpadded = not any(layer.integers("pad")) or not norm.shift.any()
        usual = layer.attrs.get("layout", "None") in ("None", "NCW", "NCHW", "NCDHW")
        return unpadded and usual and axis % (2 + len(layer.integers("kernel"))) == 1
    if layer.op != "FullyConnected":
        return False
    behind_flatten = layer.inputs[0].node is not norm.node
    if layer.flag("flatten", True) or behind_flatten:
        return axis == 1
    return axis == (-1 if rank is None else rank - 1)
