"""The four kinds of array: of numbers or of a graph, MXNet's own or with NumPy semantics."""

from __future__ import annotations

from typing import Any

import mxnet as mx

Array = Any  # mxnet.nd.NDArray or mxnet.sym.Symbol: mxnet has no type information


def is_symbol(x: Array) -> bool:
    """Tell whether `x` belongs to a graph being built."""
    return isinstance(x, mx.sym.Symbol)


def is_numpy(x: Array) -> bool:
    """Tell whether `x` has NumPy semantics (``npx.set_np``)."""
    return isinstance(x, (mx.np.ndarray, mx.sym.numpy._Symbol))


def to_classic(x: Array) -> Array:
    """Return `x` without NumPy semantics, sharing its memory and gradient."""
    return x.as_nd_ndarray() if is_numpy(x) else x


def to_numpy(x: Array) -> Array:
    """Return `x` with NumPy semantics, sharing its memory and gradient."""
    return x.as_np_ndarray()
