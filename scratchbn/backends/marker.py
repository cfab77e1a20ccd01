"""One node in place of a layer's graph, for those who lower the graph when values are known.

Parameter values are known when a graph is written to files and not when it is traced. So each
layer leaves a description of itself in an attribute of a node: of the marker where markers are
asked for, else of the last node of its training graph.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._graph.arrays import Array
from .way import Layer, State, named

KEY = "__batch_norm__"
PARAMETERS = ("gamma", "beta", "running_mean", "running_var")

_KINDS: dict[str, Any] = {
    "axis": int,
    "epsilon": (int, float),
    "fix_gamma": bool,
    "center": bool,
    **dict.fromkeys(PARAMETERS, str),
}

_here = threading.local()


@named
def marker(layer: Layer, F: Any, x: Array, state: State) -> Array:
    """Return `x` through a node that describes the layer."""
    return layer.activate(F, F.identity(x, attr=attributes(layer)))


@contextmanager
def inference_markers() -> Iterator[None]:
    """Make every layer called in this thread emit one marker node in place of its graph."""
    before, _here.marking = marking(), True
    try:
        yield
    finally:
        _here.marking = before


def marking() -> bool:
    """Tell whether layers are to emit markers."""
    return getattr(_here, "marking", False)


def attributes(layer: Layer) -> dict[str, str]:
    """Return the attribute of a node that describes the layer; none if no description fits."""
    description = describe(layer)
    return {} if description is None else {KEY: json.dumps(description, sort_keys=True)}


def describe(layer: Layer) -> dict[str, Any] | None:
    """Return the options and the names of the Parameters; None if inference is another."""
    changed = layer.overridden
    if changed - {"update"} and not layer.infers_as_batch_norm:
        return None
    options = layer.options
    in_training = () if changed else ("momentum", "use_global_stats", "unbiased_variance")
    return {
        **{name: options[name] for name in in_training},
        "axis": options.axis,
        "epsilon": options.epsilon,
        "fix_gamma": not options.scale,
        "center": options.center,
        "gamma": layer.gamma.name,
        "beta": layer.beta.name,
        "running_mean": layer.running_mean.name,
        "running_var": layer.running_var.name,
    }


def read_description(node: str, text: str) -> dict[str, Any]:
    """Return what the attribute of a node says about its layer; ValueError if it is damaged."""
    try:
        description = json.loads(text)
        damaged = [key for key, kind in _KINDS.items() if not isinstance(description[key], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"attribute {KEY} of node {node!r} is damaged: {text}") from error
    if damaged:
        raise ValueError(f"{damaged[0]} in {KEY} of node {node!r} is damaged: {text}")
    return dict(description)
