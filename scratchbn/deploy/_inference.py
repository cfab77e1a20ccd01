"""Types and shapes of a symbol, where its inputs state none.

MXNet infers both, but Dropout, UpSampling, SwapAxis and others raise an error while the type of
their input is unknown. So an input without a type gets the first, of those that the parameters
suggest, with which the symbol is consistent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import mxnet as mx
import numpy as np

from .._graph.nodes import Graph
from .._text import first_line

Shape = tuple[int, ...]

_OF_A_NORM = re.compile(r"(gamma|beta|(running|moving)_(mean|var))$")
_MOST_GUESSED = 3  # inputs that are given different types


def infer_types(
    symbol: Any, values: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, np.dtype[Any]], list[np.dtype[Any] | None]]:
    """Return the types of a symbol's inputs by name, and those of its outputs.

    `values` are parameters, `given` are types of inputs. An input whose type neither these nor
    the symbol state has that of the parameters, else float32. ValueError if no type fits.
    """
    names = symbol.list_inputs()
    known = {n: values[n].dtype for n in names if n in values}
    known |= {n: given[n] for n in names if n in given}
    stated = symbol.attr_dict()
    unknown = [n for n in names if n not in known and "__dtype__" not in stated.get(n, {})]
    errors = []
    for guess in _guesses(unknown, values):
        try:
            types, outputs, more = symbol.infer_type_partial(**known, **guess)
        except mx.MXNetError as error:
            errors.append(error)
            continue
        found = zip(symbol.list_arguments() + symbol.list_auxiliary_states(), types + more)
        inferred = {name: np.dtype(dtype) for name, dtype in found if dtype is not None}
        return inferred, [None if dtype is None else np.dtype(dtype) for dtype in outputs]
    said = first_line(errors[0])
    raise ValueError(f"the parameters do not match the symbol: {said}") from errors[0]


def _guesses(unknown: list[str], values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield types for inputs, the likeliest first: all of one type, then of different types."""
    types = _likely(values)
    yield from (dict.fromkeys(unknown, dtype) for dtype in types if unknown or dtype is types[0])
    if 1 < len(unknown) <= _MOST_GUESSED:
        yield from (dict(zip(unknown, mixed)) for mixed in product(types, repeat=len(unknown)))


def _likely(values: Mapping[str, Any]) -> list[np.dtype[Any]]:
    """Return types of inputs, the likeliest first.

    Where parameters have several types, as the norms of a float16 net are float32, float32 comes
    first: if it does not fit, the symbol tells.
    """
    counts = {True: Counter[Any](), False: Counter[Any]()}
    for name, value in values.items():
        if np.dtype(value.dtype).kind == "f":
            counts[_OF_A_NORM.search(name) is None][np.dtype(value.dtype)] += 1
    layers, norms = ([dtype for dtype, _ in counts[key].most_common()] for key in (True, False))
    found = list(dict.fromkeys([*layers, *norms]))
    usual = [np.dtype(name) for name in ("float32", "float16", "float64", "int32", "int8", "uint8")]
    if len(found) > 1:
        found = [dtype for dtype in (usual[0], *found) if dtype in found]
    return list(dict.fromkeys([*found, *usual]))


def complete_shapes(
    symbol: Any, values: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Return the shapes of inputs, of labels too where the given ones tell them."""
    names = symbol.list_inputs()
    known = {n: tuple(values[n].shape) for n in names if n in values} | dict(shapes)
    missing = [name for name in names if not is_complete(known.get(name))]
    if not missing or not set(missing) <= _labels(symbol):
        return known
    try:
        found, _, _ = symbol.infer_shape_partial(**{n: known[n] for n in names if n in known})
    except mx.MXNetError:
        return known
    inferred = dict(zip(symbol.list_arguments(), found or ()))
    return known | {n: inferred[n] for n in missing if is_complete(inferred.get(n))}


def is_complete(shape: Shape | None) -> bool:
    """Tell whether a shape is known, in every length."""
    return bool(shape) and min(shape or (0,)) > 0


def _labels(symbol: Any) -> set[str]:
    """Return the inputs that only the loss of a Module uses, ``SoftmaxOutput`` for one."""
    used: dict[str, set[bool]] = {}
    for node in Graph(symbol).nodes():
        for i, source in enumerate(node.inputs):
            if source.node.is_variable:
                loss = i > 0 and node.op.endswith("Output")
                used.setdefault(source.node.name, set()).add(loss)
    return {name for name, kinds in used.items() if kinds == {True}}
