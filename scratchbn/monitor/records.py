"""From the batches of a step to one record, a dict, for each norm layer that ran.

Each of these is summarized over the channels in three fields, as ``batch_mean_mean``,
``batch_mean_min`` and ``batch_mean_max``:

===================  ==========================================================================
``batch_mean``       mean of the layer's input
``batch_var``        its biased variance
``running_mean``     the running statistics after the step
``running_var``
``mean_distance``    ``|batch_mean - running_mean| / sqrt(running_var + epsilon)``: how many
                     standard deviations apart training and inference centre the input
``var_ratio``        ``(batch_var + epsilon) / (running_var + epsilon)``
``gamma``, ``beta``  after the step; 1 and 0 where the layer does not use them
===================  ==========================================================================

The other fields are single values:

=====================  ========================================================================
``step``, ``layer``    counted from 1; the layer's Gluon name
``calls``              how often the layer ran in the step: on several devices, or several times
                       in one forward. The batches are then taken together
``dead``               fraction of the channels whose output is not positive anywhere in the
                       batch: a ReLU after the layer puts out nothing but zeros
``saturated``          fraction of the outputs beyond :data:`~scratchbn.monitor.SATURATION` in
                       absolute value: a sigmoid after the layer is flat there
``nonfinite_batches``  how many observed batches so far had a mean or a variance that is not
                       finite. :class:`~scratchbn.ScratchBatchNorm` leaves the running statistics
                       as they are for these. For such a step `dead` and `saturated` are NaN
=====================  ========================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from .._net import options_of
from ..population import Population
from .measure import MeasuredBatch

Record = dict[str, Any]

QUANTITIES = (
    "batch_mean",
    "batch_var",
    "running_mean",
    "running_var",
    "mean_distance",
    "var_ratio",
    "gamma",
    "beta",
)
_SUMMARIES: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "min": np.min, "max": np.max}
FIELDS = (
    "step",
    "layer",
    "calls",
    *(f"{quantity}_{summary}" for quantity in QUANTITIES for summary in _SUMMARIES),
    "dead",
    "saturated",
    "nonfinite_batches",
)


class Recorder:
    """Makes records, and counts the batches of each layer that were not finite."""

    def __init__(self, channels: bool) -> None:
        self._channels = channels
        self._nonfinite: Counter[Any] = Counter()

    def record(self, step: int, layer: Any, batches: list[MeasuredBatch]) -> Record:
        """Return the record of a layer in a step; waits for what is measured."""
        counts = [batch.count for batch in batches]
        means, variances, positive, saturated = (
            np.stack([getattr(batch, name).asnumpy() for batch in batches]).astype(np.float64)
            for name in ("mean", "variance", "positive", "saturated")
        )
        is_finite = np.isfinite(means).all(axis=1) & np.isfinite(variances).all(axis=1)
        self._nonfinite[layer] += int(np.sum(~is_finite))
        dead = saturation = math.nan
        if is_finite.all():
            dead = float(np.mean(positive.sum(axis=0) == 0))
            saturation = float(np.average(saturated.mean(axis=1), weights=counts))
        together = Population()
        with np.errstate(all="ignore"):
            for part in zip(counts, means, variances):
                together.add(*part)
            values = _per_channel(layer, *together.statistics())
        return {
            "step": step,
            "layer": layer.name,
            "calls": len(batches),
            **{
                f"{quantity}_{name}": float(summarize(values[quantity]))
                for quantity in QUANTITIES
                for name, summarize in _SUMMARIES.items()
            },
            "dead": dead,
            "saturated": saturation,
            "nonfinite_batches": self._nonfinite[layer],
            **({name: value.tolist() for name, value in values.items()} if self._channels else {}),
        }


def _per_channel(layer: Any, mean: np.ndarray, variance: np.ndarray) -> dict[str, np.ndarray]:
    """Return the quantities of a layer, each of shape (C,); several devices are averaged."""
    options = options_of(layer)
    running_mean, running_var, gamma, beta = (
        np.mean([value.asnumpy().astype(np.float64) for value in p.list_data()], axis=0)
        for p in (layer.running_mean, layer.running_var, layer.gamma, layer.beta)
    )
    epsilon = options["eps"]
    return {
        "batch_mean": mean,
        "batch_var": variance,
        "running_mean": running_mean,
        "running_var": running_var,
        "mean_distance": np.abs(mean - running_mean) / np.sqrt(running_var + epsilon),
        "var_ratio": (variance + epsilon) / (running_var + epsilon),
        "gamma": np.ones_like(gamma) if options["fix_gamma"] else gamma,
        "beta": beta if options.get("center", True) else np.zeros_like(beta),
    }
