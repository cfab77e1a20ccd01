"""Last pass: write the norms that could not be folded as the operators that compute them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..._graph.nodes import Node, Output
from .._norm_nodes import CUDNN_LEAST_EPSILON
from .._report import Outcome
from .state import Lowering, Norm, rounded


def emit(lowering: Lowering, norm: Norm, reason: str, style: str) -> None:
    """Turn a norm's node into the operators that compute it; `reason` is why it was kept."""
    node, rank = norm.node, norm.rank
    if style == "batchnorm":
        result = _as_batch_norm(lowering, norm)
    elif rank is None:
        result = _as_batch_norm(lowering, norm)
        reason = norm.why_no_rank
    elif (
        style == "dwconv"
        and 3 <= rank <= 5
        and norm.axis % rank == 1
        and norm.dtype != np.float16  # MXNet has no such convolution on a CPU
    ):
        result = _as_convolution(lowering, norm, rank)
    else:
        result = _as_arithmetic(lowering, norm, rank)
    lowering.kept.append(Outcome(node.name, result, reason))
    if norm.relu:
        rectified = norm.with_relu(Output(node))
        node.name = f"{node.name}_norm"
        lowering.graph.replace({Output(node): rectified})


def _as_batch_norm(lowering: Lowering, norm: Norm) -> str:
    node = norm.node
    attrs, values = norm.original or _standing_in(norm)
    attrs = {**attrs, "use_global_stats": "True"}
    attrs["cudnn_off"] = str(float(attrs["eps"]) < CUDNN_LEAST_EPSILON)
    dtype = np.dtype(np.float64 if norm.dtype == np.float64 else np.float32)
    parameters = [_constant(lowering, node, name, v, dtype) for name, v in values.items()]
    node.op, node.attrs, node.inputs = "BatchNorm", attrs, [node.inputs[0], *parameters]
    return "BatchNorm with use_global_stats"


def _standing_in(norm: Norm) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return attributes and parameters of a BatchNorm node that computes a norm."""
    epsilon, name = CUDNN_LEAST_EPSILON, _layer(norm.node)
    attrs = {"axis": str(norm.axis), "eps": repr(epsilon), "fix_gamma": "False"}
    return attrs, {
        f"{name}_gamma": norm.scale * np.sqrt(1 + epsilon),
        f"{name}_beta": norm.shift,
        f"{name}_running_mean": np.zeros_like(norm.scale),
        f"{name}_running_var": np.ones_like(norm.scale),
    }


def _as_convolution(lowering: Lowering, norm: Norm, rank: int) -> str:
    node, channels, ones = norm.node, len(norm.scale), (1,) * (rank - 2)
    weight = norm.scale.reshape((channels, 1, *ones))
    node.op = "Convolution"
    node.attrs = {
        "kernel": str(ones),
        "num_filter": str(channels),
        "num_group": str(channels),
        "no_bias": "False",
    }
    node.inputs = [
        node.inputs[0],
        _constant(lowering, node, f"{_layer(node)}_weight", weight, norm.dtype),
        _constant(lowering, node, f"{_layer(node)}_bias", norm.shift, norm.dtype),
    ]
    return "1x1 depthwise Convolution"


def _as_arithmetic(lowering: Lowering, norm: Norm, rank: int) -> str:
    node = norm.node
    shape = [1] * rank
    shape[norm.axis] = len(norm.scale)
    factor, term = (
        _constant(lowering, node, f"{_layer(node)}_{word}", value.reshape(shape), norm.dtype)
        for word, value in (("scale", norm.scale), ("shift", norm.shift))
    )
    scaled = Node("broadcast_mul", f"{node.name}_scaled", {}, [node.inputs[0], factor])
    node.op, node.attrs, node.inputs = "broadcast_add", {}, [Output(scaled), term]
    return "multiplication and addition"


def _layer(node: Node) -> str:
    """Return the name that all calls of a layer have in common, and so their constants."""
    return re.sub(r"_fwd\d+$", "_fwd", node.name)


def _constant(lowering: Lowering, node: Node, name: str, value: np.ndarray, dtype: Any) -> Output:
    array = rounded(value, dtype)
    if array is None:
        raise ValueError(
            f"constants of {node.name!r} do not fit {np.dtype(dtype).name}: "
            f"the largest is {np.abs(value).max():g}"
        )
    return lowering.variable(name, array)
