"""The operator's results against a reference in float64, on arrays of any library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operator import DEFAULTS, Operator
from .steps import INFERENCE, TRAINING, Arrays, backward, forward

Reference = Callable[[Any, Any, "dict[str, Any]", "dict[str, Any]"], "dict[str, Any]"]

CLOSE = {"float64": 1e-13, "float32": 2e-6, "float16": 6e-4}  # float16: what rounding costs
SHAPES = [
    ((4, 3), 1), ((32, 64, 28, 28), 1), ((5, 50, 5, 5), 1), ((32, 28, 28, 64), 3), ((4096, 7), 1),
    ((256, 1000), 1), ((2, 3, 99991), 1), ((6, 5, 3), 0), ((4096, 128, 3), 1),
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"training": False}, {"relu": True}, {"relu": True, "training": False}, {"mean": 1e5},
]  # fmt: skip


def statistics_type(dtype: str) -> str:
    """Return the type of statistics and Parameters for data of a type."""
    return "float32" if dtype == "float16" else dtype


def make_state(arrays: Arrays, channels: int, dtype: str, mean: float, flag: float) -> Any:
    """Return Parameters of random values, the running mean near `mean`, and the flag."""
    rng = np.random.default_rng(channels)
    values = {
        "gamma": rng.uniform(0.5, 2, channels),
        "beta": rng.normal(size=channels),
        "running_mean": rng.normal(mean, 1, channels),
        "running_var": rng.uniform(0.5, 1.5, channels),
    }
    kind = statistics_type(dtype)
    state = {name: arrays.put(value.astype(kind)) for name, value in values.items()}
    return {**state, "flag": arrays.put(np.array([flag], "float32"))}


def errors(
    operator: Operator, arrays: Arrays, reference: Reference, shape: tuple[int, ...], axis: int,
    dtype: str, mean: float = 0.0, training: bool = True, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Take a step; return how far each result is from the reference, over what its type allows."""
    chosen = {**DEFAULTS, "axis": axis, **options}
    state = make_state(arrays, shape[axis], dtype, mean, TRAINING if training else INFERENCE)
    rng = np.random.default_rng(sum(shape))
    x = rng.normal(mean, 1.5, shape).astype(dtype)
    dy = rng.normal(size=shape).astype(dtype)
    # The reference sees data without their mean, exactly: float64 would lose digits to it too.
    near = x.astype("float64") - mean
    nearby = {name: arrays.take(value).astype("float64") for name, value in state.items()}
    nearby["running_mean"] -= mean
    if chosen["relu"]:  # elements at the kink, where rounding decides, take no part
        dy[np.abs(reference(near, dy, nearby, chosen)["z"]) < 1e-3] = 0
    want = reference(near, dy, nearby, chosen)
    constant = {**nearby, "flag": np.ones(1)}
    terms = np.abs(reference(near, dy, constant, chosen)["dx"]).max()
    x_there, dy_there = arrays.put(x), arrays.put(dy)
    outputs = forward(operator, arrays, x_there, state, chosen)
    gradients = backward(operator, arrays, dy_there, x_there, state, outputs, chosen)
    want["running_mean"] = want["running_mean"] + mean
    got = {"y": outputs.y, **gradients._asdict(), **state}
    sums = (x.size / shape[axis]) ** 0.5  # of terms that cancel
    floor = {"dx": float(terms), "dgamma": sums, "dbeta": sums}
    exact = CLOSE[statistics_type(dtype)]
    found = {}
    for name in ("y", "dx", "dgamma", "dbeta", "running_mean", "running_var"):
        scale = max(float(np.abs(want[name]).max()), floor.get(name, 0.0), 1e-30)
        error = float(np.abs(arrays.take(got[name]).astype("float64") - want[name]).max()) / scale
        found[name] = error / (CLOSE[dtype] if name in ("y", "dx") else exact)
    return found


def check_numbers(
    operator: Operator,
    arrays: Arrays,
    reference: Reference,
    shapes: list[tuple[tuple[int, ...], int]] = SHAPES,
) -> tuple[list[str], int]:
    """Return a Markdown table, a line each, and how many results are wrong."""
    rows, wrong = ["| type | options | largest error / allowed | where |", "| - | - | - | - |"], 0
    for dtype in CLOSE:
        for options in OPTIONS:
            if "mean" in options and dtype == "float16":
                continue  # it does not hold 1e5
            worst, where = 0.0, "-"
            for shape, axis in shapes:
                found = errors(operator, arrays, reference, shape, axis, dtype, **options)
                for name, error in found.items():
                    wrong += not error <= 1  # NaN is wrong, too
                    if not error <= worst and worst == worst:
                        worst, where = error, f"{name} of {shape}, axis {axis}"
            label = ", ".join(f"{k}={v}" for k, v in options.items()) or "-"
            rows.append(f"| {dtype} | {label} | {worst:.2f} | {where} |")
    return rows, wrong
