"""Whether a rewritten model is the model that it was, or which node is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import mxnet as mx
import numpy as np

from .._comparison import Comparison
from .._conversion_report import ConversionReport
from ._files import plain_name
from ._inference import complete_shapes, is_complete
from ._report import FoldReport
from ._trial import Trial, first_wrong, not_of_rounding, without
from ._wide import widened, widened_arrays
from .check import Model, compare_outputs, disagreement, random_inputs, run_symbol, varied

Arrays = list[np.ndarray]
Arguments = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Report = TypeVar("Report", FoldReport, ConversionReport)

# How far two models may be apart, relative to the largest number, whatever rounding does: in
# float64, and where they can run in their own types only.
_FLOOR = {"float64": 1e-9, "float32": 2e-5, "float16": 5e-3}


def verified(
    report: Report, before: Model, after: Model, shapes: Shapes, inputs: Arguments | None = None
) -> Report:
    """Return a report with the comparison of both models; ValueError if they differ."""
    comparison = verify(before, after, shapes, inputs=inputs, about=partial(_outcome, report))
    return replace(report, comparison=comparison)


def _outcome(report: Any, node: str) -> str:
    """Say which norms became part of a node, or what the report notes of it."""
    folded = getattr(report, "folded", ())
    norms = [line.node for line in folded if node in re.split(r"[ ,]+", line.result)]
    if norms:
        return f", into which {', '.join(map(repr, norms))} was folded"
    notes = [entry.text for entry in getattr(report, "notes", ()) if entry.name == node]
    return f" ({'; '.join(notes)})" if notes else ""


def verify(
    before: Model,
    after: Model,
    shapes: Shapes,
    *,
    inputs: Arguments | None = None,
    about: Callable[[str], str] = lambda node: "",
) -> Comparison:
    """Run two models on the same inputs; ValueError, with the node's name, if they differ.

    The inputs are random, of these shapes, if none are given. Rounding is told from what is wrong
    by what it does to the model before, in float64 where the models can run in it. `about` may say
    more of a node.
    """
    before, after = _plain(before), _plain(after)
    if inputs is None:
        shapes = complete_shapes(*before, shapes)
        unknown = [n for n in before[0].list_inputs() if not is_complete(shapes.get(n))]
        if unknown:
            name = min(unknown)
            return Comparison(note=f"the shape of input {name!r} is unknown", unknown=name)
        inputs = random_inputs(before, shapes)
    else:
        inputs = {n: mx.nd.array(varied(a.asnumpy()), dtype=a.dtype) for n, a in inputs.items()}
    try:
        expected, note = run_symbol(*before, inputs), ""
    except ValueError as error:  # float16 on a CPU
        expected, note = [], str(error)
    comparison = Comparison(note=note)
    if expected:
        outputs = run_symbol(*after, inputs)
        _check_kinds(before[0], outputs, expected)
        comparison = Comparison(*compare_outputs(outputs, expected))
    trial = _trial(before, after, inputs, runs=bool(expected))
    jumps = _verified(trial, about) if trial else []
    return replace(comparison, note=_said_of(comparison, jumps)) if jumps else comparison


def _plain(model: Model) -> Model:
    symbol, params = model
    return symbol, {plain_name(name): value for name, value in params.items()}


def _check_kinds(symbol: Any, outputs: Arrays, expected: Arrays) -> None:
    for name, got, want in zip(symbol.list_outputs(), outputs, expected):
        fault = disagreement(got, want, allowed=np.inf)
        if fault and (got.shape, got.dtype) != (want.shape, want.dtype):
            raise ValueError(f"the model would not be what it was at {name!r}: {fault}")


def _trial(before: Model, after: Model, inputs: Mapping[str, Any], *, runs: bool) -> Trial | None:
    """Return what both models are run with; None if they run neither in float64 nor as they are."""
    arrays = [*before[1].values(), *after[1].values(), *inputs.values()]
    types = {np.dtype(array.dtype) for array in arrays if np.dtype(array.dtype).kind == "f"}
    unit = max((float(np.finfo(dtype).eps) / 2 for dtype in types), default=6e-8)
    one, other = widened(before), widened(after)
    if one and other:
        trial = Trial(one, other, widened_arrays(inputs), unit, _FLOOR["float64"] + 4 * unit)
        if trial.runs():
            return trial
    floor = max((_FLOOR.get(dtype.name, 0) for dtype in types), default=_FLOOR["float32"])
    return Trial(before, after, inputs, unit, floor) if runs else None


def _verified(trial: Trial, about: Callable[[str], str]) -> list[tuple[str, str]]:
    """Return the nodes, with operators, that make more of rounding; ValueError if one is wrong.

    Behind such a node both models go on with what the one before has computed.
    """
    jumps: list[tuple[str, str]] = []
    while any(trial.faults):
        nodes = not_of_rounding(trial)
        if not nodes:
            name, fault = first_wrong(trial)
            raise ValueError(
                f"the model would not be what it was, at node {name!r}{about(name)}: {fault}"
            )
        jumps += [(node.name, node.op) for node in nodes]
        trial = without(trial, nodes)
    return jumps


def _said_of(comparison: Comparison, jumps: list[tuple[str, str]]) -> str:
    nodes = ", ".join(f"{name!r} ({op})" for name, op in jumps)
    said = f"{nodes} {'make' if len(jumps) > 1 else 'makes'} more of rounding, all else agrees"
    return f"{comparison.note}; {said}" if comparison.note else said
