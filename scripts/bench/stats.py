"""The arithmetic: ratios with intervals, and the memory floor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

# How often a tensor has to pass between memory and CPU at least, once it exceeds the caches.
# Training: the forward reads x for the statistics, reads x again and writes y; the backward reads
# x and dy for the sums, reads both again and writes dx. Inference: read x, write y.
FLOOR_PASSES = {"train": 8, "inference": 2}
COPY_PASSES = 2

_RESAMPLES = 2000


class Interval(NamedTuple):
    """A number and the interval that holds it with 95% confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 1 if self.value >= 10 else 2
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def scaled(self, factor: float) -> Interval:
        """Return the interval in other units."""
        return Interval(*(factor * bound for bound in self))


def ratio_of_medians(times: Sequence[float], reference: Sequence[float], seed: int = 0) -> Interval:
    """Return the ratio of two medians with its bootstrap 95% interval, paired by round.

    Element i of both was measured in round i. A round that is drawn takes both its times along, so
    that what slowed a whole round down cancels.
    """
    above, below = (np.asarray(values, dtype=np.float64) for values in (times, reference))
    if above.ndim != 1 or above.shape != below.shape or not above.size:
        raise ValueError(
            "times and reference must have one time per round each, "
            f"got shapes {above.shape} and {below.shape}"
        )
    for name, values in (("times", above), ("reference", below)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{name} must be positive and finite, got {values.tolist()}")
    return _interval(tuple(above), tuple(below), seed)


@cache  # JSON, tables and picture show the same
def _interval(times: tuple[float, ...], reference: tuple[float, ...], seed: int) -> Interval:
    value = float(_ratio(times, reference))
    if len(times) == 1:  # scipy refuses to resample a single round
        return Interval(value, value, value)
    low, high = bootstrap(
        (times, reference),
        _ratio,
        paired=True,
        n_resamples=_RESAMPLES,
        method="percentile",
        random_state=seed,
    ).confidence_interval
    return Interval(value, float(low), float(high))


def _ratio(above: Any, below: Any, axis: int = -1) -> Any:
    return np.median(above, axis=axis) / np.median(below, axis=axis)


def bandwidth(nbytes: int, copy_seconds: float) -> float:
    """Return bytes per second, read and written, of copying a tensor of `nbytes`."""
    return COPY_PASSES * nbytes / copy_seconds


def floor_multiple(work: str, times: Sequence[float], copies: Sequence[float]) -> Interval:
    """Return times as a multiple of the memory floor, paired by round with those of a copy."""
    if work not in FLOOR_PASSES:
        raise ValueError(f"work must be one of {', '.join(FLOOR_PASSES)}, got {work!r}")
    return ratio_of_medians(times, copies).scaled(COPY_PASSES / FLOOR_PASSES[work])


def sweep_sizes(level2: int, level3: int) -> list[int]:
    """Return the bytes per tensor of the sweep: level 2, between, level 3, and ten times that."""
    return [level2, int((level2 * level3) ** 0.5), level3, 10 * level3]
