"""Checks of the options that all model builders have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scratchbn._checks import check_integer


def check_options(norm_layer: Any, norm_kwargs: Mapping[str, Any] | None, classes: Any) -> None:
    """Raise TypeError or ValueError for options no net can be built with."""
    if norm_layer is not None and not callable(norm_layer):
        raise TypeError(f"norm_layer must be a layer class or None, got {norm_layer!r}")
    if norm_layer is None and norm_kwargs:
        raise TypeError(f"norm_kwargs={dict(norm_kwargs)!r} needs a norm_layer, got None")
    check_integer("classes", classes, 1)
