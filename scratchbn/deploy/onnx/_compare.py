"""Whether two results are the same but for rounding."""

from __future__ import annotations

import numpy as np

from ..check import compare_outputs

# Relative to each number, and to the largest of its array.
_TOLERANCES = {"float64": (1e-6, 1e-7), "float32": (1e-3, 2e-5), "float16": (2e-2, 5e-3)}


def disagreement(got: np.ndarray, want: np.ndarray, *, types: bool = True) -> str | None:
    """Say how a result differs from what it should be; None if it does not.

    Numbers that are not finite have to be the same ones. `types` tells whether the types must be.

    >>> import numpy as np
    >>> disagreement(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    'it differs by 0.5 where the largest number is 2.5'
    >>> disagreement(np.zeros((1, 2)), np.zeros(2))
    'its shape is (1, 2) instead of (2,)'
    """
    if got.shape != want.shape:
        return f"its shape is {got.shape} instead of {want.shape}"
    if types and got.dtype != want.dtype:
        return f"its type is {got.dtype} instead of {want.dtype}"
    relative, absolute = _TOLERANCES.get(str(want.dtype), (0.0, 0.0))
    one, other = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(other)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    largest = np.abs(other[finite]).max(initial=0)
    with np.errstate(invalid="ignore"):
        close = np.abs(one - other) <= relative * np.abs(other) + absolute * largest
    if (same | (close & finite)).all():
        return None
    difference, size = compare_outputs([got], [want])
    if not np.isfinite(difference):
        return "it has other infinities or NaNs"
    return f"it differs by {difference:.3g} where the largest number is {size:.3g}"
