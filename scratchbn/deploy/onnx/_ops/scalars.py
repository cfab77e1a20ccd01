"""Arithmetic with a number."""

from __future__ import annotations

from .._emitter import Emitter
from .registry import translates

# ONNX operator, and whether the number comes first.
_ARITHMETIC = {
    "_plus_scalar": ("Add", False),
    "_minus_scalar": ("Sub", False),
    "_rminus_scalar": ("Sub", True),
    "_mul_scalar": ("Mul", False),
    "_div_scalar": ("Div", False),
    "_rdiv_scalar": ("Div", True),
    "_power_scalar": ("Pow", False),
    "_rpower_scalar": ("Pow", True),
    "_maximum_scalar": ("Max", False),
    "_minimum_scalar": ("Min", False),
}
_COMPARISONS = {
    "_greater_scalar": "Greater",
    "_greater_equal_scalar": "GreaterOrEqual",
    "_lesser_scalar": "Less",
    "_lesser_equal_scalar": "LessOrEqual",
    "_equal_scalar": "Equal",
}


@translates(*_ARITHMETIC)
def arithmetic(t: Emitter) -> str:
    """Combine an array with a number, in the type of the result."""
    op, reverse = _ARITHMETIC[t.node.op]
    (x,) = t.inputs
    if t.out.dtype != t.dtype:
        x = t.cast(x, t.out.dtype)
    number = t.constant(t.attributes.number("scalar"), t.out.dtype)
    return t.add(op, number, x) if reverse else t.add(op, x, number)


@translates(*_COMPARISONS)
def comparison(t: Emitter) -> str:
    """Compare with a number; true is 1."""
    number = t.constant(t.attributes.number("scalar"))
    return t.cast(t.add(_COMPARISONS[t.node.op], t.inputs[0], number), t.out.dtype)
