"""Layers with weights that a norm can be folded into."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._graph.nodes import Node
from .affine import Affine
from .state import Lowering, Obstacle, rounded


def check_parameters(lowering: Lowering, node: Node) -> None:
    """Raise an Obstacle if a layer's weights are computed, or come from outside."""
    for parameter in (source.node for source in node.inputs[1:]):
        if parameter.name not in lowering.values or not parameter.is_variable:
            raise Obstacle(f"{parameter.name} is not a parameter")


def fitting(lowering: Lowering, node: Node, fused: tuple[np.ndarray, np.ndarray]) -> list[Any]:
    """Return new weights in the type of the old ones; an Obstacle if they overflow it."""
    dtype = np.dtype(lowering.values[node.inputs[1].node.name].dtype)
    arrays = [rounded(value, dtype) for value in fused]
    if any(array is None for array in arrays):
        raise Obstacle(f"the folded weights of {node.name} do not fit {dtype.name}")
    return arrays


def set_weights(lowering: Lowering, node: Node, arrays: list[Any]) -> None:
    """Give a layer new weight and bias, and a bias if it had none."""
    names = [source.node.name for source in node.inputs[1:]]
    if len(names) == 1:
        name = f"{names[0].removesuffix('_weight')}_bias"
        node.inputs.append(lowering.variable(name, arrays[1]))
    lowering.values.update(zip(names, arrays))
    node.attrs["no_bias"] = "False"


def on_channel_axis(node: Node, affine: Affine) -> bool:
    """Tell whether an axis is the one that the weights of a layer belong to."""
    if node.op == "FullyConnected" and not node.flag("flatten", True):
        return affine.has_axis(-1)
    rank = 2 + len(node.integers("kernel"))
    layout = node.attrs.get("layout", "None")
    axis = 1 if layout == "None" else layout.index("C")
    return affine.axis % rank == axis and (axis == 1 or node.op == "Convolution")
