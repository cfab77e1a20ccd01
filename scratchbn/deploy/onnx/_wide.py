"""Run a graph in MXNet, float16 as float32: MXNet has few operators for float16 on a CPU.

As Gluon runs it, not by ``bind``: oneDNN's fusion there computes a convolution and the activation
behind it as one, even where the convolution's own output is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd

from ..._text import first_line


def run_wide(
    symbol: Any, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Return the outputs in the graph's own types; ValueError if it cannot run."""
    arguments = {**values, **{name: mx.nd.array(a, dtype=a.dtype) for name, a in arrays.items()}}
    named = [arguments[name] for name in symbol.list_inputs()]
    try:
        _, types, _ = symbol.infer_type(**{n: a.dtype for n, a in zip(symbol.list_inputs(), named)})
        with autograd.pause():
            outputs = mx.nd.CachedOp(symbol)(*map(_widened, named))
        outputs = outputs if isinstance(outputs, list) else [outputs]
        results = [output.asnumpy() for output in outputs]
    except mx.MXNetError as error:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"the graph cannot run on {shapes}: {first_line(error)}") from error
    return [y.astype(np.float16) if t == np.float16 else y for y, t in zip(results, types)]


def _widened(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype == np.float16 else array
