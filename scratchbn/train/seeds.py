"""The same training with several seeds, and what of the result is not chance. Needs scipy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._text import rich_table

__all__ = ["MEASURES", "Paired", "Summary", "paired", "summarize"]

CONFIDENCE = 0.95
MEASURES = {"test_acc": "test accuracy", "train_acc": "train accuracy", "loss": "loss"}


class Paired(NamedTuple):
    """The mean of paired differences, and Student's interval of it."""

    mean: float
    low: float
    high: float


def paired(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> Paired:
    """Return how far the first of each pair is above the second, on average.

    Parameters
    ----------
    first, second : sequence of float
        One number of each for each seed, at least two.
    confidence : float
        How often the interval holds the true mean, where the differences are normal.

    Raises
    ------
    ValueError
        If the sequences differ in length or have fewer than two numbers.

    Examples
    --------
    >>> paired([0.99, 0.97], [0.98, 0.98])
    Paired(mean=0.0, low=-0.12706..., high=0.12706...)
    """
    from scipy.stats import t

    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"pairs of at least two seeds are needed, got {len(first)} and {len(second)} numbers"
        )
    differences = np.subtract(first, second)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / np.sqrt(len(differences))
    half = float(t.ppf((1 + confidence) / 2, len(differences) - 1) * error)
    return Paired(mean, mean - half, mean + half)


class Summary(NamedTuple):
    """What several seeds gave: of each net its results, by measure, one number for each seed."""

    seeds: list[int]
    epochs: int
    results: dict[str, dict[str, list[float]]]  # by name of the net, then of the measure

    def differences(self) -> dict[str, Paired]:
        """Return the first net's difference to the second by measure; empty for one net."""
        if len(self.results) < 2:
            return {}
        first, second = self.results.values()
        return {measure: paired(first[measure], second[measure]) for measure in MEASURES}

    def to_dict(self) -> dict[str, Any]:
        """Return what a JSON file holds of it."""
        differences = {name: found._asdict() for name, found in self.differences().items()}
        return {**self._asdict(), "confidence": CONFIDENCE, "difference": differences}

    def table(self) -> Any:
        """Return a ``rich.table.Table``: mean and standard deviation, and the difference."""
        nets, differences = list(self.results), self.differences()
        header = ["", *nets]
        if differences:
            header.append(f"difference ± {CONFIDENCE:.0%}")
        rows = []
        for measure, words in MEASURES.items():
            values = [self.results[net][measure] for net in nets]
            row = [words, *(f"{np.mean(v):.4f} ± {np.std(v, ddof=1):.4f}" for v in values)]
            if differences:
                found = differences[measure]
                row.append(f"{found.mean:+.4f} ± {found.high - found.mean:.4f}")
            rows.append(row)
        after = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        title = f"{len(self.seeds)} seeds after {after}, mean ± standard deviation"
        return rich_table(title, header, rows)


def summarize(metrics: Mapping[int, Mapping[str, Any]]) -> Summary:
    """Return the results of the last epoch, from the ``metrics.json`` of each seed."""
    results: dict[str, dict[str, list[float]]] = {}
    last = 0
    for of_seed in metrics.values():
        last = max(epoch["epoch"] for epoch in of_seed["epochs"])
        for epoch in of_seed["epochs"]:
            if epoch["epoch"] == last:
                net = results.setdefault(epoch["norm"], {measure: [] for measure in MEASURES})
                for measure in MEASURES:
                    net[measure].append(float(epoch[measure]))
    return Summary(list(metrics), last, results)
