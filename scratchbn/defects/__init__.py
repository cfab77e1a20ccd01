"""The defects of ``gluon.nn.BatchNorm`` in MXNet 1.9.1 on a CPU, each as one measurement.

A measurement runs the same few lines with the built-in layer or with ours, eagerly or in a graph,
and compares what it sees with the float64 oracle. ``docs/builtin-defects.md`` is their table.
"""

from . import batches, gradients, numerics, options, relu, updates
from .case import LAYERS, MODES, Bench, Defect, Outcome
from .survey import Finding, survey

__all__ = ["DEFECTS", "LAYERS", "MODES", "Bench", "Defect", "Finding", "Outcome", "survey"]

DEFECTS: dict[str, Defect] = {
    found.key: found
    for theme in (updates, gradients, numerics, options, batches, relu)  # the order of the table
    for found in vars(theme).values()
    if isinstance(found, Defect)
}
