"""What two nets computed, compared tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from .phases import Computed, Tensors
from .row import ERROR, PARAMETER_GRADIENT, Row
from .settings import Settings, Tolerance


def differences(
    one: Computed, two: Computed, mode: str, phase: str, settings: Settings
) -> list[Row]:
    """Return a row for every tensor of every step, and one for a net that could not be run."""
    rows = []
    for step, (mine, other) in enumerate(zip(one.steps, two.steps), start=1):
        for key in dict.fromkeys([*mine, *other]):
            kind, tensor = key
            a, b = mine.get(key), other.get(key)
            if kind == PARAMETER_GRADIENT:
                # A parameter without a gradient does not move: that is a gradient of zero.
                a = np.zeros_like(b) if a is None else a
                b = np.zeros_like(a) if b is None else b
            least = _beside(tensor, mine, other) if kind == PARAMETER_GRADIENT else 0.0
            found = _difference(a, b, settings.tolerance(kind), least)
            rows.append(Row(kind, tensor, mode, phase, step, **found, backend=settings.backend))
    for name, computed in (("a", one), ("b", two)):
        if computed.error:
            step, nan = len(computed.steps) + 1, math.nan
            row = Row(ERROR, name, mode, phase, step, nan, nan, 0.0, note=computed.error)
            rows.append(replace(row, backend=settings.backend))
    return rows


def _beside(tensor: str, *steps: Tensors) -> float:
    """Return the largest gradient of the layer that a parameter is of.

    The bias of a layer before a norm has a gradient of zero, a sum that cancels: what is left of
    it is as rough as the gradients beside it.
    """
    layer = tensor.rpartition(".")[0]
    largest = 0.0
    for tensors in steps:
        for (kind, name), values in tensors.items():
            if kind == PARAMETER_GRADIENT and name.rpartition(".")[0] == layer and values.size:
                largest = max(largest, float(np.abs(values).max()))
    return largest if math.isfinite(largest) else 0.0


def _difference(
    a: np.ndarray | None, b: np.ndarray | None, tolerance: Tolerance, least_scale: float = 0.0
) -> dict[str, Any]:
    """Return the numbers of a row, or why there are none."""
    rtol, atol = tolerance
    note = ""
    if a is None or b is None:
        note = f"only {'a' if b is None else 'b'} has it"
    elif a.shape != b.shape:
        note = f"shape {a.shape} in a, {b.shape} in b"
    elif a.dtype != b.dtype:
        note = f"dtype {a.dtype} in a, {b.dtype} in b"
    if a is None or b is None or note:
        return {"absolute": math.nan, "relative": math.nan, "allowed": atol, "note": note}
    if a.size == 0:
        return {"absolute": 0.0, "relative": 0.0, "allowed": atol}
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    finite = np.isfinite(difference)
    place = int(np.argmin(finite)) if not finite.all() else int(np.argmax(difference))
    index = tuple(int(i) for i in np.unravel_index(place, a.shape))
    absolute = float(difference[index]) if finite.all() else math.nan
    scale = float(max(np.abs(a).max(), np.abs(b).max()))
    return {
        "absolute": absolute,
        "relative": absolute / scale if absolute else 0.0,
        "allowed": atol + rtol * max(scale, least_scale) if math.isfinite(scale) else atol,
        "index": index,
        "note": "" if finite.all() else f"not finite: {a[index]} and {b[index]} at {index}",
    }
