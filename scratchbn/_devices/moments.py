"""Moments of parts of a batch -> moments of the whole, and the gradient of that, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Moments:
    """Count, mean and biased variance of each channel; the mean is ``high + low``, (C,) each."""

    count: float
    high: Vector
    low: Vector
    variance: Vector

    @property
    def mean(self) -> Vector:
        """The mean as one number."""
        return self.high + self.low


def merge(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all elements together; a part of no elements counts for nothing.

    ``mean = sum(m_k mean_k) / m`` and ``variance = sum(m_k (variance_k + (mean_k - mean)^2)) / m``:
    no squares of large means, so none of their digits are lost. `high` is 0, and `low` the mean.
    """
    filled = [part for part in parts if part.count]
    if not filled:
        nothing = np.full_like(parts[0].high, np.nan)
        return Moments(0.0, np.zeros_like(nothing), nothing, nothing)
    count = sum(part.count for part in filled)
    # Near the means of all parts, so that the sum below is of small numbers.
    origin = filled[0].mean
    mean = origin + sum(p.count / count * (p.mean - origin) for p in filled)
    spread = (p.count / count * (p.variance + np.square(p.mean - mean)) for p in filled)
    return Moments(count, np.zeros_like(mean), mean, np.asarray(sum(spread)))


def gradient(part: Moments, whole: Moments, of_mean: Vector, of_variance: Vector) -> Any:
    """Return the gradient of a part's mean and variance, given that of the whole's."""
    if not part.count:
        return np.zeros_like(of_mean), np.zeros_like(of_variance)
    share = part.count / whole.count
    return (
        share * (of_mean + 2 * of_variance * (part.mean - whole.mean)),
        share * of_variance,
    )
