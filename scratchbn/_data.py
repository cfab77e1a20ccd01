"""What data and initializers a layer takes."""

from __future__ import annotations

from typing import Any, Union

import mxnet as mx
import numpy as np

from ._graph.arrays import Array, is_symbol
from ._graph.trace import current
from ._graph.types import BFLOAT16, Dtype, dtype_of, name_of

Initializer = Union[str, mx.init.Initializer]

# The dtype of Parameters and statistics, by that of the data.
_STATISTICS: dict[Dtype, Dtype] = {
    np.dtype("float16"): np.dtype("float32"),
    BFLOAT16: np.dtype("float32"),
    np.dtype("float32"): np.dtype("float32"),
    np.dtype("float64"): np.dtype("float64"),
}
_LAST_LIKELY_AXIS = 4  # of a batch of Conv3D
_ALLOWED = "float16, bfloat16, float32 or float64"


def check_dtype(dtype: Any) -> Dtype:
    """Return a dtype that data may have."""
    try:
        wanted = dtype_of(dtype)
    except TypeError:
        wanted = None
    if wanted not in _STATISTICS:
        raise TypeError(f"dtype must be {_ALLOWED}, got {dtype!r}")
    return wanted


def statistics_dtype(dtype: Any) -> Dtype:
    """Return the dtype of Parameters and statistics for data of a dtype."""
    return _STATISTICS[dtype_of(dtype)]


def _out_of_range(axis: int, shape: tuple[int, ...]) -> str:
    text = f"axis={axis} is out of range for data of shape {shape}"
    if axis >= len(shape) and (axis > _LAST_LIKELY_AXIS or axis in shape):
        text += f": in_channels={axis}? The first argument of a layer is its axis"
    return text


def check_traced(x: Array, axis: int) -> None:
    """Check an axis that no net has against the rank of a symbol, if its graph tells that.

    Inference visits the whole graph, so it is not done for axes that a net may have.
    """
    if -1 - _LAST_LIKELY_AXIS <= axis <= _LAST_LIKELY_AXIS or not is_symbol(x):
        return
    used = set(x.list_arguments())
    given = {name: a.shape for name, a in current().arrays.items() if name in used}
    try:
        shape = x.infer_shape_partial(**given)[1][0]
    except mx.MXNetError:  # an operator before this one is wrong: MXNet says so itself
        return
    if shape and not -len(shape) <= axis < len(shape):
        raise ValueError(_out_of_range(axis, shape))


def check_array(x: Any) -> None:
    """Check that data is an array or a symbol of MXNet."""
    if not isinstance(x, (mx.nd.NDArray, mx.sym.Symbol)):
        of_numpy = ": mx.nd.array(data) makes one of it" if isinstance(x, np.ndarray) else ""
        raise TypeError(f"data must be an NDArray or a Symbol, got {type(x).__name__}{of_numpy}")


def check_data(x: mx.nd.NDArray, axis: int, channels: int, held: Any) -> None:
    """Check data against a layer's axis, channels (0: not known yet) and Parameters' dtype."""
    if x.stype != "default":
        raise TypeError(f"data must be dense, got {x.stype}: call data.tostype('default')")
    if x.ndim < 2:
        raise ValueError(
            f"data must have at least 2 axes, a batch axis and a channel axis; got {x.shape}"
        )
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(_out_of_range(axis, x.shape))
    if channels and x.shape[axis] != channels:
        raise ValueError(
            f"data must have {channels} channels on axis {axis} (in_channels={channels}), "
            f"got {x.shape[axis]} in shape {x.shape}"
        )
    if x.shape[axis] == 0:
        raise ValueError(f"data must have at least 1 channel on axis {axis}, got {x.shape}")
    dtype = dtype_of(x.dtype)
    if dtype not in _STATISTICS:
        raise TypeError(f"data must be {_ALLOWED}, got {dtype.name}")
    if np.dtype(held) != _STATISTICS[dtype]:
        raise TypeError(
            f"data of dtype {name_of(dtype)} needs parameters of {_STATISTICS[dtype].name}, got "
            f"{np.dtype(held).name}: call cast('{name_of(dtype)}') on the layer or the net first"
        )


def check_initializer(name: str, value: Any) -> Initializer:
    """Return an initializer, or the name of one."""
    if not isinstance(value, (str, mx.init.Initializer)):
        raise TypeError(f"{name} must be a str or an Initializer, got {value!r}")
    try:
        mx.init.create(value)
    except Exception as error:
        raise ValueError(f"{name} must name a registered initializer, got {value!r}") from error
    return value
