"""How a layer computes: three ways with the same semantics, and the choice between them.

A way is a function of (layer, F, x, state): ``portable``, stock operators; ``native``, one
compiled operator; ``marker``, a node that stands for the layer in a graph that will be lowered.
"""

from __future__ import annotations

from .choice import BACKENDS, BackendError, choose, get_backend, set_backend, use_backend
from .way import State

__all__ = [
    "BACKENDS",
    "BackendError",
    "State",
    "choose",
    "get_backend",
    "set_backend",
    "use_backend",
]
