"""A graph through which devices share is not run with ``static_shape``.

With it MXNet creates the operators of a graph once and runs them again and again, in an order that
may differ from that of the calls where two calls overlap; without it, it creates them in each call,
and that is how the exchange knows which call an operator belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mxnet as mx

from .._graph.trace import EXCHANGE


def with_free_shape(
    own: Any, symbol: Any, is_data: list[bool], flags: Sequence[tuple[str, Any]]
) -> Any:
    """Return what is to run a block whose graph was just built."""
    if not dict(flags).get("static_shape") or f'"{EXCHANGE}"' not in symbol.tojson():
        return own
    inputs = [
        ("data_indices", [i for i, data in enumerate(is_data) if data]),
        ("param_indices", [i for i, data in enumerate(is_data) if not data]),
    ]
    others = [(flag, value) for flag, value in flags if flag != "static_shape"]
    return mx.nd.CachedOp(symbol, [*inputs, *others])
