"""A model in float64, in which rounding hides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._graph.nodes import Graph
from .check import Model

_NARROW = ("float16", "float32")
_NARROW_CODES = ("0", "2")  # of float32 and float16, in the attributes of variables
_OWN_TYPE = {
    "_arange",
    "_full",
    "_ones",
    "_zeros",
    "argsort",
    "one_hot",
    "topk",
}  # float32 unstated
_SINGLE_ONLY = ("_contrib_BatchNormWithReLU", "_contrib_SyncBatchNorm", "_sg_", "_contrib_quantize")


def widened(model: Model) -> Model | None:
    """Return a model with float64 in the place of narrower types; None if an operator has none."""
    symbol, values = model
    graph = Graph(symbol)
    for node in graph.nodes():
        if node.op.startswith(_SINGLE_ONLY):
            return None
        if node.attrs.get("dtype", node.op in _OWN_TYPE and "float32") in _NARROW:
            node.attrs["dtype"] = "float64"
        if node.attrs.get("__dtype__") in _NARROW_CODES:
            node.attrs["__dtype__"] = "1"
    return graph.symbol(), widened_arrays(values)


def widened_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays as float64, integers as they are."""
    return {
        name: array.astype(np.float64) if np.dtype(array.dtype).kind == "f" else array
        for name, array in arrays.items()
    }
