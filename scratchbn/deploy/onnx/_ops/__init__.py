"""Operators that MXNet's exporter translates wrong or not at all.

Lengths and types are known here, so that most become constants and need no arithmetic on shapes.
"""

from . import (
    activations,
    boxes,
    indexing,
    layers,
    normalization,
    pooling,
    reductions,
    scalars,
    shapes,
)
from .registry import TRANSLATIONS

__all__ = [
    "TRANSLATIONS",
    "activations",
    "boxes",
    "indexing",
    "layers",
    "normalization",
    "pooling",
    "reductions",
    "scalars",
    "shapes",
]
