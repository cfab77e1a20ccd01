"""What BatchNormReLU does not do."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..parity.oracle import OracleBatchNorm
from .case import Bench, Outcome, defect
from .measuring import batch, complaint, numpy_semantics, off


def relu_step(
    bench: Bench, shape: tuple[int, ...], axis: int = 1, dtype: str = "float32"
) -> tuple[np.ndarray, float]:
    """Return the output of a training step, and the largest error of it and of the gradient."""
    x, dy = (batch(shape, 0, 1, seed).astype(dtype) for seed in (0, 1))
    layer = bench.layer(shape[axis], dtype, relu=True, axis=axis)
    y, dx = bench.step(bench.net(layer), x, dy, dtype=dtype)
    exact = OracleBatchNorm.fresh(shape[axis], axis=axis, relu=True).train_step(x, dy)
    return y, max(off(y, exact.y), off(dx, exact.dx))


@defect("`BatchNormReLU` with `npx.set_np()`: no relu", 17679)
def relu_in_numpy_mode(bench: Bench) -> Outcome:
    """The layer then calls `npx.batch_norm`, which has no relu."""
    with numpy_semantics():
        y, error = relu_step(bench, (4, 3, 5, 5))
    text = f"smallest output {y.min():.3g}"
    return Outcome(bool(y.min() == 0 and error < 1e-5), bool(y.min() < -1), text)


@defect("`BatchNormReLU` of float64, float16, 2-D, 3-D, or axis -1: fails", 17679)
def relu_formats(bench: Bench) -> Outcome:
    """The fused operator exists for float32, four axes and axis 1 only."""
    formats: dict[str, dict[str, Any]] = {
        "float64": {"shape": (4, 3, 5, 5), "dtype": "float64"},
        "float16": {"shape": (4, 3, 5, 5), "dtype": "float16"},
        "2-D": {"shape": (8, 3)},
        "3-D": {"shape": (4, 3, 5)},
        "axis -1": {"shape": (4, 5, 5, 3), "axis": -1},
    }
    worst: dict[str, float] = {}
    errors: dict[str, str | None] = {}
    for name, arguments in formats.items():

        def run(name: str = name, arguments: dict[str, Any] = arguments) -> None:
            worst[name] = relu_step(bench, **arguments)[1]

        errors[name] = complaint(run)
    failed = [name for name, error in errors.items() if error]
    if failed:
        text = f"{errors[failed[0]]} ({', '.join(failed)})"
    else:
        text = f"runs; output and gradient at most {max(worst.values()):.1g} off, in float16"
    close = not failed and all(w < (2e-3 if n == "float16" else 1e-5) for n, w in worst.items())
    return Outcome(close, len(failed) == len(formats), text)
