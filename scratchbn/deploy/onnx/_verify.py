"""Run a model against the net before it is written, and name the node that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import checker

from ..._graph.nodes import Node
from ..check import disagreement
from ._batches import Arrays
from ._model import Model
from ._run import NotRunnable, Running, first_said, runtime_name
from ._shapes import Place
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
            raise ValueError(_wrong(model, inputs, expected))
    try:
        checker.check_model(proto, full_check=True)
    except Exception as error:  # its own kinds, and those of shape inference
        raise ValueError(f"the model is not valid ONNX: {first_said(error)}") from error


def _not_runnable(model: Model, inputs: Named, said: str) -> str:
    """Find the node with which the model cannot be run any more, or a wrong one before it."""
    nodes = list(model.translated.ends)
    low, high = 0, len(nodes)  # the first `low` nodes run, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            _results(model, inputs, nodes[middle - 1 : middle])
            low = middle
        except NotRunnable as error:
            high, said = middle, str(error)
    fault = _first_fault(model, inputs, nodes[:low]) if low else None
    return fault or f"{describe(nodes[low])} cannot be run as ONNX by {runtime_name()}: {said}"


def _wrong(model: Model, inputs: Named, expected: Arrays) -> str:
    """Say which node is the first whose result is not MXNet's on the same inputs."""
    try:
        fault = _first_fault(model, inputs, list(model.translated.ends))
    except NotRunnable as error:
        return f"the ONNX model is not the net, and cannot be taken apart: {error}"
    if fault:
        return fault
    computed = dict(zip(model.places, model.reference(inputs)))
    for head, output in zip(model.graph.heads, expected):
        fault = disagreement(computed[head.node, head.number], output)
        if fault:
            node = describe(head.node)
            return f"the inference graph is not the net, at {node}: {fault} {_where(inputs)}"
    return f"the ONNX model is not the net, though no single node is wrong {_where(inputs)}"


def _first_fault(model: Model, inputs: Named, nodes: list[Node]) -> str | None:
    """Compare the results of nodes with MXNet's, in order: of equal inputs, the first is wrong."""
    results = _results(model, inputs, nodes)
    computed = dict(zip(model.places, model.reference(inputs)))
    for types in (False, True):
        for place, result in results.items():
            fault = disagreement(result, computed[place], types=types)
            if fault:
                node = describe(place[0])
                return f"{node} cannot be translated to ONNX right: {fault} {_where(inputs)}"
    return None


def _results(model: Model, inputs: Named, nodes: list[Node]) -> dict[Place, np.ndarray]:
    """Run the model up to the last of some nodes; returns what they computed."""
    some = set(nodes)
    places = [place for place in model.places if place[0] in some]
    names = [model.translated.tensors[place] for place in places]
    part = Running(model.part(model.translated.ends[nodes[-1]], names))
    return dict(zip(places, part.run({name: inputs[name] for name in model.needed()})))


def _where(inputs: Named) -> str:
    shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
    return f"(in {runtime_name()}, on {shapes})"
