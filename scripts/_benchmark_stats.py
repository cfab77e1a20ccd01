"""The arithmetic of the benchmark: ratios with intervals, the memory floor, cache sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# How often a tensor has to pass between memory and CPU at least, once it exceeds the caches.
# Training: the forward reads x for the statistics, reads x again and writes y; the backward reads
# x and dy for the sums, reads both again and writes dx. Inference: read x, write y.
FLOOR_PASSES = {"train": 8, "inference": 2}
COPY_PASSES = 2

_RESAMPLES = 2000
_CONFIDENCE = 0.95
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHES = {2: 2**20, 3: 2**25}  # bytes, where the system does not say


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

    Parameters
    ----------
    times, reference : sequence of float, of one length
        Seconds; element i of both was measured in round i.
    seed : int
        For the resampling.

    Returns
    -------
    Interval
        The percentile interval: rounds are drawn with replacement, 2,000 times, and a round takes
        both its times along, so that what slowed a whole round down cancels.

    Raises
    ------
    ValueError
        If there are no times, the lengths differ, or a time is not positive and finite.

    Notes
    -----
    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
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
    drawn = np.random.default_rng(seed).integers(above.size, size=(_RESAMPLES, above.size))
    ratios = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(ratios, (tail, 100 - tail))
    return Interval(float(np.median(above) / np.median(below)), float(low), float(high))


def bandwidth(nbytes: int, copy_seconds: float) -> float:
    """Return bytes per second, read and written, of copying a tensor of `nbytes`."""
    return COPY_PASSES * nbytes / copy_seconds


def floor_seconds(work: str, nbytes: int, bytes_per_second: float) -> float:
    """Return how long memory alone needs for a norm layer on a tensor of `nbytes`.

    Parameters
    ----------
    work : {'train', 'inference'}
        Training is forward and backward, 8 passes of the tensor; inference is 2.
    nbytes : int
        Bytes of the tensor.
    bytes_per_second : float
        As :func:`bandwidth` measures it.

    Raises
    ------
    ValueError
        If `work` is neither of the two.
    """
    if work not in FLOOR_PASSES:
        raise ValueError(f"work must be one of {', '.join(FLOOR_PASSES)}, got {work!r}")
    return FLOOR_PASSES[work] * nbytes / bytes_per_second


def floor_multiple(work: str, times: Sequence[float], copies: Sequence[float]) -> Interval:
    """Return times as a multiple of the memory floor, paired by round with those of a copy."""
    if work not in FLOOR_PASSES:
        raise ValueError(f"work must be one of {', '.join(FLOOR_PASSES)}, got {work!r}")
    return ratio_of_medians(times, copies).scaled(COPY_PASSES / FLOOR_PASSES[work])


def cache_sizes(directory: Path = _CACHES) -> dict[int, int]:
    """Return the bytes of the level 2 and level 3 caches of the first CPU.

    Parameters
    ----------
    directory : Path
        Where Linux describes them; a level that is not there gets a usual size.
    """
    sizes = dict(_USUAL_CACHES)
    for cache in sorted(directory.glob("index*")):
        try:
            level = int((cache / "level").read_text())
            text = (cache / "size").read_text().strip()
            nbytes = int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        except (OSError, ValueError):
            continue
        if level in sizes:
            sizes[level] = nbytes
    return sizes


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return how many bytes can still be had, or None where the system does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


def sweep_sizes(level2: int, level3: int) -> list[int]:
    """Return the bytes per tensor of the sweep: level 2, between, level 3, and ten times that."""
    return [level2, int((level2 * level3) ** 0.5), level3, 10 * level3]
