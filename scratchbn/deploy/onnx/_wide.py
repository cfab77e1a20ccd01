"""Run a graph in MXNet, float16 as float32: MXNet has few operators for float16 on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mxnet as mx
import numpy as np

from ..check import run_symbol


def run_wide(
    symbol: Any, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Return the outputs in the graph's own types; ValueError if it cannot run."""
    inputs = {name: mx.nd.array(a, dtype=a.dtype) for name, a in arrays.items()}
    arguments = {**values, **inputs}
    known = {n: arguments[n].dtype for n in symbol.list_inputs()}
    _, types, _ = symbol.infer_type(**known)
    wide = {name: _widened(value) for name, value in arguments.items()}
    outputs = run_symbol(symbol, wide, {name: wide[name] for name in inputs})
    return [y.astype(np.float16) if t == np.float16 else y for y, t in zip(outputs, types)]


def _widened(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype == np.float16 else array
