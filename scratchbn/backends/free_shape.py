"""A graph through which devices share is not run with ``static_shape``.

With it MXNet creates the operators of a graph once and runs them again and again, in an order that
may differ from that of the calls where two calls overlap; without it, it creates them in each call,
and that is how the exchange knows which call an operator belongs to.
"""

from __future__ import annotations

from typing import Any

from .._graph.trace import EXCHANGE

Flags = list[tuple[str, Any]]


def free_shape(text: str, flags: Flags) -> Flags:
    """Return the flags that a graph with this JSON may be run with."""
    if f'"{EXCHANGE}"' not in text:
        return flags
    return [(flag, value) for flag, value in flags if flag != "static_shape"]
