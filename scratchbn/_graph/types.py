"""The type of an array, or of a symbol as far as its graph tells."""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np

from .arrays import Array, is_symbol
from .operators import amp_is_on
from .trace import current

Dtype = np.dtype[Any]

BFLOAT16: Dtype = np.dtype([("bfloat16", np.uint16)])  # NumPy has no such type; this is MXNet's
NARROW = (np.dtype("float16"), BFLOAT16)


def dtype_of(value: Any) -> Dtype:
    """Return a dtype given as NumPy's or MXNet's, or by its name; TypeError if it is none."""
    return BFLOAT16 if isinstance(value, str) and value == "bfloat16" else np.dtype(value)


def name_of(dtype: Any) -> str:
    """Return the name of a dtype."""
    return "bfloat16" if dtype_of(dtype) == BFLOAT16 else dtype_of(dtype).name


def narrow_dtype(x: Array, layer_dtype: Any) -> Dtype | None:
    """Return the dtype of `x` if it is one of 16 bits, else None.

    A symbol's dtype is inferred from the arrays of the trace; `layer_dtype` is the last resort.
    Inference visits the whole graph, so it is not done where nothing hints at 16 bits.
    """
    if not is_symbol(x):
        return _if_narrow(dtype_of(x.dtype))
    given = {name: dtype_of(a.dtype) for name, a in current().arrays.items()}
    if not amp_is_on() and not {*NARROW} & {dtype_of(layer_dtype), *given.values()}:
        return None
    return _if_narrow(_inferred(x, given) or dtype_of(layer_dtype))


def survives_export(x: Array, dtype: Dtype) -> bool:
    """Tell whether a symbol has a dtype in files too, which have no casts of AMP."""
    if not amp_is_on():
        return True
    given = {name: dtype_of(a.dtype) for name, a in current().arrays.items()}
    return _inferred(mx.sym.load_json(x.tojson()), given) == dtype


def _if_narrow(dtype: Dtype) -> Dtype | None:
    return dtype if dtype in NARROW else None


def _inferred(x: Array, given: dict[str, Dtype]) -> Dtype | None:
    """Infer the dtype of a symbol from those of variables; None if that cannot be done."""
    used = set(x.list_arguments())
    known = {name: dtype for name, dtype in given.items() if name in used}
    if BFLOAT16 not in known.values():
        return _ask(x, known)
    # MXNet's inference cannot be told of a bfloat16: what follows the type of what stands for it
    # is one.
    answers = {
        _ask(x, {n: dtype_of(other) if d == BFLOAT16 else d for n, d in known.items()})
        for other in ("float16", "float32")
    }
    return answers.pop() if len(answers) == 1 else BFLOAT16


def _ask(x: Array, known: dict[str, Dtype]) -> Dtype | None:
    try:
        _, outputs, _ = x.infer_type_partial(**known)
    except mx.MXNetError:  # an operator that cannot tell its type from what is known
        return None
    return dtype_of(outputs[0]) if outputs and outputs[0] else None
