"""The operator in MXNet: how it gets there, and how it is composed, on arrays and in graphs."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

OPERATOR = "_scratchbn_batch_norm"


def register(path: Path) -> None:
    """Load the library into MXNet, and add its operator to where such operators are.

    ``mx.library.load`` makes the functions of all operators anew, and drops what anyone has put in
    their place: after it ``amp.init`` is without effect.
    """
    import mxnet as mx
    from mxnet.base import _LIB, OpHandle, c_str, check_call
    from mxnet.ndarray.register import _make_ndarray_function
    from mxnet.symbol.register import _make_symbol_function

    check_call(_LIB.MXLoadLib(c_str(str(path)), ctypes.c_uint(0)))
    handle = OpHandle()
    check_call(_LIB.NNGetOpHandle(c_str(OPERATOR), ctypes.byref(handle)))
    for module, make in (
        (mx.nd._internal, _make_ndarray_function),
        (mx.sym._internal, _make_symbol_function),
    ):
        function = make(handle, OPERATOR, OPERATOR)
        function.__module__ = module.__name__
        setattr(module, OPERATOR, function)


def batch_norm(
    F: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    flag: Any,
    num_batches: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Normalize `x` by the compiled operator, which must be loaded.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    x : NDArray or Symbol, float32 or float64, rank >= 2
    gamma, beta, running_mean, running_var : NDArray or Symbol, shape (C,)
    flag : NDArray or Symbol, shape (1,), float32
        1 in inference; anything else in training, which moves the running statistics.
    num_batches : NDArray or Symbol, shape (1,), optional
        Given if and only if ``momentum`` is None.
    **options
        ``axis``, ``epsilon``, ``momentum``, ``scale``, ``center``, ``relu``, ``unbiased_variance``;
        ``half=True`` on a GPU, where `x` may be float16.

    Returns
    -------
    y : NDArray or Symbol
        Of `x`'s shape and dtype.
    done : NDArray or Symbol, shape (C,)
        Exists once the running statistics were moved.
    """
    from .._graph.state import alike  # with mxnet, which the rest of this room does without

    others = [gamma, beta, running_mean, running_var, flag]
    others += [] if num_batches is None else [num_batches]
    # MXNet may look at the shape of x alone: see operator.cc.
    y, _, done = F._internal._scratchbn_batch_norm(
        x, *others, __ext_extra_inputs__=len(others), **options
    )
    if hasattr(done, "list_arguments"):  # a symbol
        # Nodes that move nothing; reshape_like parts those that a GPU would fuse into a kernel.
        like = done
        for vector in (gamma, beta, running_mean, running_var):
            like = F.reshape_like(alike(F, like, vector), done)
        axis = options["axis"]
        end = None if axis == -1 else axis + 1
        y = F.reshape_like(
            y, F.BlockGrad(like), lhs_begin=axis, lhs_end=end, rhs_begin=0, rhs_end=1
        )
    return y, done
