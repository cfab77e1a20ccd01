"""How two nets are compared: what is asked for, checked, and what differences are allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import check_choice, check_flag, check_integer, check_number
from .row import STATISTIC
from .where import facts

MODES: dict[str, dict[str, bool]] = {
    "eager": {"active": False},
    "hybrid": {"active": True},
    "static": {"active": True, "static_alloc": True, "static_shape": True},
}

Tolerance = tuple[float, float]  # rtol, atol

# (rtol, atol) by dtype: some thousand roundings, so that the order of a sum does not matter.
TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-5), "float16": (5e-3, 5e-3)}
# Running statistics are one mean and one weighted sum away from the data: a few roundings.
_STATISTICS = {"float64": (1e-12, 1e-14), "float32": (1e-5, 1e-7), "float16": (1e-5, 1e-7)}
# The built-in multiplies by a float32 momentum (0.9 is off by 2.4e-8, each step anew) and, for
# float16, rebuilds the variance from its sum with epsilon, rounded to float16.
_BUILTIN_STATISTICS = {"float64": (1e-6, 1e-8), "float32": (1e-5, 1e-6), "float16": (1e-3, 1e-5)}

# Streams of their own: output gradients drawn from the data's stream would be the data, for which
# the gradient of a normalization is zero.
_HEADS, _VALUES = 1, 2


@dataclass(frozen=True)
class Settings:
    """The arguments of a comparison, checked."""

    steps: int
    train: bool
    dtype: str
    modes: Sequence[str]
    learning_rate: float
    seed: int
    loss: Callable[[Any], Any] | None
    rtol: float | None
    atol: float | None
    statistics_rtol: float | None
    statistics_atol: float | None
    builtin: bool  # takes part
    backend: str

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, least=1)
        check_integer("seed", self.seed, least=0)
        check_flag("train", self.train)
        check_choice("dtype", self.dtype, TOLERANCES)
        modes = self.modes
        if isinstance(modes, str) or not modes or any(mode not in MODES for mode in modes):
            raise ValueError(f"modes must be a sequence of {', '.join(MODES)}, got {modes!r}")
        for name in ("learning_rate", "rtol", "atol", "statistics_rtol", "statistics_atol"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, math.inf, "finite and not negative")
        if self.loss is not None and not callable(self.loss):
            raise TypeError(f"loss must be callable, got {self.loss!r}")

    def tolerance(self, kind: str = "") -> Tolerance:
        """Return what is allowed for one kind of tensor."""
        if kind == STATISTIC:
            rtol, atol = (_BUILTIN_STATISTICS if self.builtin else _STATISTICS)[self.dtype]
            given = self.statistics_rtol, self.statistics_atol
        else:
            rtol, atol = TOLERANCES[self.dtype]
            given = self.rtol, self.atol
        return (
            rtol if given[0] is None else float(given[0]),
            atol if given[1] is None else float(given[1]),
        )

    def head_stream(self, step: int) -> np.random.Generator:
        """Return the generator of a step's output gradients."""
        return np.random.default_rng((self.seed, step, _HEADS))

    def value_stream(self) -> np.random.Generator:
        """Return the generator of parameters without values."""
        return np.random.default_rng((self.seed, 0, _VALUES))

    def described(self) -> dict[str, Any]:
        """Return what a report says about how it was made."""
        return {
            "dtype": self.dtype,
            "steps": self.steps,
            "modes": list(self.modes),
            "train": self.train,
            "tolerance": list(self.tolerance()),
            "statistics_tolerance": list(self.tolerance(STATISTIC)),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            **({} if self.loss is None else {"loss": name_of(self.loss)}),
            "backend": self.backend,
            **facts(),
        }


def name_of(function: Callable[..., Any]) -> str:
    """Return a name for a loss, which may be a function or a block."""
    return getattr(function, "__name__", type(function).__name__)
