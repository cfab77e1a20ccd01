"""Run a model against the net before it is written, and name the node that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import checker

from .._ir import Node
from ._batches import Arrays
from ._compare import disagreement
from ._model import Model
from ._run import NotRunnable, Running, first_said, runtime_name
from ._translate import describe

Named = Mapping[str, np.ndarray]


def verify(model: Model, proto: Any, runs: list[tuple[Arrays, Arrays]]) -> None:
    """Run a model on each of the inputs and compare it with the net's outputs.

    Raises ValueError, which names the first node that is wrong.
    """
    running: Running | None = None
    for arrays, expected in runs:
        inputs = dict(zip(model.inputs, arrays))
        try:
            running = running or Running(proto)
            outputs = running.run({name: inputs[name] for name in model.needed()})
        except NotRunnable as error:
            raise ValueError(_not_runnable(model, inputs, str(error))) from error
        faults = [disagreement(y, z) for y, z in zip(outputs, expected)]
        if len(outputs) != len(expected) or any(faults):
            raise ValueError(_wrong(model, inputs, expected, faults))
    try:
        checker.check_model(proto, full_check=True)
    except Exception as error:  # its own kinds, and those of shape inference
        raise ValueError(f"the model is not valid ONNX: {first_said(error)}") from error


def _not_runnable(model: Model, inputs: Named, said: str) -> str:
    """Find the first node with which the model cannot be run any more."""
    nodes = list(model.translated.ends)
    low, high = 0, len(nodes)  # the first `low` nodes run, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        reason = _reason(model, inputs, nodes[middle - 1])
        if reason is None:
            low = middle
        else:
            high, said = middle, reason
    return f"{describe(nodes[high - 1])} cannot be run as ONNX by {runtime_name()}: {said}"


def _reason(model: Model, inputs: Named, last: Node) -> str | None:
    """Say why the model up to a node cannot be run; None if it can."""
    names = [name for (node, _), name in model.translated.tensors.items() if node is last]
    try:
        part = Running(model.part(model.translated.ends[last], names))
        part.run({name: inputs[name] for name in model.needed()})
    except NotRunnable as error:
        return str(error)
    return None


def _wrong(model: Model, inputs: Named, expected: Arrays, faults: list[str | None]) -> str:
    """Say which node is the first whose result is not MXNet's on the same inputs."""
    places = [place for place in model.places if not place[0].is_variable]
    names = [model.translated.tensors[place] for place in places]
    try:
        everything = Running(model.part(len(model.translated.nodes), names))
        results = everything.run({name: inputs[name] for name in model.needed()})
    except NotRunnable as error:
        return f"the ONNX model is not the net ({faults}), and cannot be taken apart: {error}"
    got = dict(zip(places, results))
    want = dict(zip(model.places, model.reference(inputs)))
    shapes = ", ".join(f"{name} {a.shape}" for name, a in inputs.items())
    by = f"(in {runtime_name()}, on {shapes})"
    for types in (False, True):
        for place in places:
            fault = disagreement(got[place], want[place], types=types)
            if fault:
                return f"{describe(place[0])} cannot be translated to ONNX right: {fault} {by}"
    for head, output, fault in zip(model.graph.heads, expected, faults):
        if disagreement(want[head.node, head.number], output):
            return f"the inference graph is not the net, at {describe(head.node)}: {fault} {by}"
    return f"the ONNX model is not the net, though no single node is wrong: {faults} {by}"
