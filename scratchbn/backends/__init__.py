"""How a layer computes: three ways with the same semantics, and the choice between them.

A way is a function of (layer, F, x, state): ``portable``, stock operators; ``native``, one
compiled operator; ``marker``, a node that stands for the layer in a graph that will be lowered.
``inference`` gives a net that only infers a graph of its own, whichever way was chosen.
"""

from __future__ import annotations

from .._graph.trace import when_built
from .choice import BACKENDS, BackendError, choose, get_backend, set_backend, use_backend
from .inference.switch import inference_graph, set_inference_graph, use_inference_graph
from .inference.two_graphs import to_run
from .way import State

__all__ = [
    "BACKENDS",
    "BackendError",
    "State",
    "choose",
    "get_backend",
    "inference_graph",
    "set_backend",
    "set_inference_graph",
    "use_backend",
    "use_inference_graph",
]

when_built(to_run)
