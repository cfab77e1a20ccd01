"""From a lowered graph to a model that was run and agreed with the net."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mxnet as mx
import numpy as np

from ..._graph.nodes import Graph, Output
from ..._text import first_line
from ._batches import Arrays, Reference, other_batches, probes
from ._model import Model
from ._names import name_once
from ._shapes import Inference, Shape, places_of
from ._translate import translate
from ._verify import verify
from ._wide import run_wide

Function = Callable[[Arrays], Arrays]


def checked_model(
    net: Any,
    example_inputs: tuple[Any, ...],
    symbol: Any,
    values: dict[str, Any],
    inputs: dict[str, Any],
    *,
    dynamic_batch: bool,
    opset: int,
) -> Any:
    """Return an ONNX model of a lowered graph; ValueError if it is not what the net computes."""
    graph = Graph(symbol)
    names = name_once(graph)
    places = places_of(graph)
    everything = graph.symbol([Output(*place) for place in places])
    inference = Inference(everything, places, values)

    reference = Reference(net, example_inputs)
    # Before it is run: a graph that does not fit its input may end the process.
    inference.shapes(_shapes(inputs, reference.example))
    runs, compute = _first_run(reference, symbol, values, inputs)
    runs += [(arrays, compute(arrays)) for arrays in probes(reference.example)]
    others: list[dict[str, Shape]] = []
    if dynamic_batch:
        more = _other_runs(reference.example, compute, inference, list(inputs))
        others = [_shapes(inputs, arrays) for arrays, _ in more]
        runs += more

    known = inference.tensors(inputs, others)
    translated = translate(graph, values, known, names, opset)
    model = Model(graph, everything, values, inputs, places, known, translated, opset)
    proto = model.proto()
    verify(model, proto, runs)
    return proto


def _shapes(names: Iterable[str], arrays: Arrays) -> dict[str, Shape]:
    return {name: array.shape for name, array in zip(names, arrays)}


def _first_run(
    reference: Reference, symbol: Any, values: dict[str, Any], inputs: dict[str, Any]
) -> tuple[list[tuple[Arrays, Arrays]], Function]:
    """Return the net's outputs on the example, and what computes them on other inputs.

    That is the net, or its inference graph in float32 if it has float16 that cannot run here.
    """

    def wide(arrays: Arrays) -> Arrays:
        return run_wide(symbol, values, dict(zip(inputs, arrays)))

    compute: Function = reference.run
    try:
        outputs = compute(reference.example)
    except mx.MXNetError as error:
        if all(array.dtype != np.float16 for array in [*values.values(), *inputs.values()]):
            raise ValueError(
                f"the net cannot run on the example inputs: {first_line(error)}"
            ) from error
        compute = wide
        outputs = compute(reference.example)
    return [(reference.example, outputs)], compute


def _other_runs(
    example: Arrays, compute: Function, inference: Inference, names: list[str]
) -> list[tuple[Arrays, Arrays]]:
    """Return a batch of 1 and a larger one with the net's outputs, as far as it can run on them."""
    runs: list[tuple[Arrays, Arrays]] = []
    reason = "an input has no first axis, or an empty one"
    for arrays in other_batches(example):
        if any(len(done[0]) > len(example[0]) for done, _ in runs):
            break
        try:
            inference.shapes(_shapes(names, arrays))
            runs.append((arrays, compute(arrays)))
        except Exception as error:  # the net's own code may raise anything
            reason = first_line(error)
    if not runs:
        raise ValueError(
            f"dynamic_batch must be False: the net runs on no other batch than that of the "
            f"example inputs: {reason}"
        )
    return runs
