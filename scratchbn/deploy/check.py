"""Run models that exist as symbol and parameters, and say how far results are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd

from .._text import first_line
from ._files import plain_name
from ._inference import complete_shapes, infer_types

__all__ = ["NotMeasuredError", "largest_difference"]

# Relative to each number, and to the largest of its array.
_TOLERANCES = {"float64": (1e-6, 1e-7), "float32": (1e-3, 2e-5), "float16": (2e-2, 5e-3)}

Model = tuple[Any, Mapping[str, Any]]


def largest_difference(
    before: Model, after: Model, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[float, float]:
    """Compare two models on the same random input, N(0, 1), in inference.

    Parameters
    ----------
    before, after : pair of Symbol and mapping of str to NDArray
    shapes : mapping of str to tuple of int
        Of every input; labels may be left out.

    Returns
    -------
    difference, size : float
        As :func:`compare_outputs` returns them.

    Raises
    ------
    NotMeasuredError
        If the model before cannot run here on inputs that fit it.
    ValueError
        If the inputs do not fit, or only the model after cannot run.
    """
    inputs = random_inputs(before, shapes)
    try:
        expected = run_symbol(*before, inputs)
    except ValueError as error:
        raise NotMeasuredError(str(error)) from error
    return compare_outputs(run_symbol(*after, inputs), expected)


def random_inputs(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return N(0, 1) for the inputs of a model, whose shapes have to be known and to fit it."""
    symbol, params = model
    values = {plain_name(name): value for name, value in params.items()}
    try:
        shapes = complete_shapes(symbol, values, shapes)
        for name in symbol.list_inputs():
            if name not in shapes:
                raise ValueError(
                    f"shapes must have the shape of input {name!r}, got {dict(shapes)}"
                )
        symbol.infer_shape(**{n: s for n, s in shapes.items() if n in symbol.list_inputs()})
    except mx.MXNetError as error:
        given = {name: shape for name, shape in shapes.items() if name not in values}
        raise ValueError(f"the model does not take {given}: {first_line(error)}") from error
    types, _ = infer_types(symbol, values, {})
    rng = np.random.default_rng(0)
    return {
        name: mx.nd.array(rng.normal(size=shape), dtype=types.get(name, np.float32))
        for name, shape in shapes.items()
        if name not in values
    }


def varied(array: np.ndarray) -> np.ndarray:
    """Return random numbers in place of floating-point numbers that are all the same."""
    if array.dtype.kind != "f" or array.size < 2 or (array != array.flat[0]).any():
        return array
    return np.random.default_rng(0).normal(size=array.shape).astype(array.dtype)


class NotMeasuredError(ValueError):
    """A model that does not run on this machine as it was, as float16 does not on a CPU."""


def run_symbol(
    symbol: Any, params: Mapping[str, Any], inputs: Mapping[str, Any]
) -> list[np.ndarray]:
    """Run a model in inference, on the CPU; ValueError if it cannot run on these inputs."""
    values = {plain_name(name): value for name, value in params.items()} | dict(inputs)
    states = set(symbol.list_auxiliary_states())
    arrays = [values[n].copy() if n in states else values[n] for n in symbol.list_inputs()]
    count = len(symbol.list_outputs())
    if not arrays:  # which a graph must have
        symbol, arrays = mx.sym.Group([symbol, mx.sym.var("none")]), [mx.nd.zeros(1)]
    try:
        # Not bind, whose fusion by oneDNN may replace the output of a convolution that is a head,
        # and gives other numbers for a BatchNorm on another axis than 1.
        with autograd.pause():
            outputs = mx.nd.CachedOp(symbol)(*arrays)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return [y.asnumpy() for y in outputs[:count]]
    except mx.MXNetError as error:
        shapes = {name: array.shape for name, array in inputs.items()}
        raise ValueError(f"the model cannot run on {shapes}: {first_line(error)}") from error


def compare_outputs(
    outputs: Iterable[np.ndarray], expected: Iterable[np.ndarray]
) -> tuple[float, float]:
    """Return the largest difference between outputs, and the largest that was expected.

    Both are absolute. A difference that is not a number is infinite, unless both outputs are.

    >>> compare_outputs([np.array([1.0, -3.5])], [np.array([1.0, -4.0])])
    (0.5, 4.0)
    >>> compare_outputs([np.array([np.nan])], [np.array([2.0])])
    (inf, 2.0)
    """
    differences, sizes = [0.0], [0.0]
    for one, other in zip(outputs, expected):
        one, other = one.astype(np.float64), other.astype(np.float64)
        with np.errstate(invalid="ignore"):
            apart = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0, one - other)
        differences.append(float(np.abs(apart).max(initial=0)))
        sizes.append(float(np.abs(other).max(initial=0)))
    return math.inf if any(map(math.isnan, differences)) else max(differences), max(sizes)


def disagreement(
    got: np.ndarray, want: np.ndarray, *, types: bool = True, allowed: float | None = None
) -> str | None:
    """Say how a result differs from what it should be; None if it does not.

    Numbers that are not finite have to be the same ones. `types` tells whether the types must be.
    What is `allowed` is absolute, and what is usual for the type if it is not given.

    >>> disagreement(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    'it differs by 0.5 where the largest number is 2.5'
    >>> disagreement(np.zeros((1, 2)), np.zeros(2))
    'its shape is (1, 2) instead of (2,)'
    """
    if got.shape != want.shape:
        return f"its shape is {got.shape} instead of {want.shape}"
    if types and got.dtype != want.dtype:
        return f"its type is {got.dtype} instead of {want.dtype}"
    one, other = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(other)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if allowed is None:
        relative, absolute = _TOLERANCES.get(str(want.dtype), (0.0, 0.0))
        allowed = absolute * np.abs(other[finite]).max(initial=0)
    else:
        relative = 0.0
    with np.errstate(invalid="ignore"):
        close = np.abs(one - other) <= relative * np.abs(other) + allowed
    if (same | (close & finite)).all():
        return None
    difference, size = compare_outputs([got], [want])
    if not np.isfinite(difference):
        return "it has other infinities or NaNs"
    return f"it differs by {difference:.3g} where the largest number is {size:.3g}"
