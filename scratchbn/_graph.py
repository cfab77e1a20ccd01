"""What a graph needs and eager code does not.

A hybridized block runs its Python once, on symbols whose rank and size are unknown, and replays
the recorded graph ever after. Four things therefore cannot be written the plain way:

- asking ``autograd.is_training()``: :class:`GraphMode` asks when the graph runs;
- writing to a Parameter: :func:`assign` makes the write part of the graph;
- looking at ``x.shape``: :class:`ChannelView` finds the channels of an input of any rank;
- looking at ``x.dtype``: :func:`is_float16` infers it from what is known at the time.

Every function here takes arrays and symbols alike, so that its callers need not know which.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.attribute import AttrScope
from mxnet.gluon import Block, HybridBlock
from mxnet.name import NameManager

from . import native
from ._backend import use_backend

Array = Any
Select = Callable[[Callable[[], Array], Array], Array]


def is_symbol(x: Array) -> bool:
    """Tell whether `x` belongs to a graph being built."""
    return isinstance(x, mx.sym.Symbol)


def to_classic(x: Array) -> Array:
    """Return `x` without NumPy semantics (``npx.set_np``), sharing its memory and gradient."""
    return x.as_nd_ndarray() if isinstance(x, (mx.np.ndarray, mx.sym.numpy._Symbol)) else x


def to_numpy(x: Array) -> Array:
    """Return `x` with NumPy semantics, sharing its memory and gradient."""
    return x.as_np_ndarray()


# --- views ------------------------------------------------------------------------------------


def _channels_second(F: Any, x: Array, axis: int) -> Array:
    """Merge or add leading axes until the channel axis is the second, whatever the rank."""
    if axis < 0:
        return x.reshape(shape=(-1,) + (0,) * -axis, reverse=True)
    if axis == 0:
        return F.expand_dims(x, axis=0)
    for _ in range(axis - 1):
        x = x.reshape(shape=(-3, -2))
    return x


def _reshape(F: Any, x: Array, shape: tuple[int, ...]) -> Array:
    # NDArray.reshape shares the memory, but takes a length of 0 to mean "as before".
    if x.size:
        return x.reshape(shape)
    return F.reshape_like(x, F.zeros(shape, ctx=x.ctx, dtype=x.dtype))


class ChannelView:
    """An array of any rank seen as a matrix: a row per sample, the channels side by side.

    With L positions before the channel axis and S after it, `values` has shape (L, C * S), and
    each channel has m = L * S elements. The two maps between elements and channels are products
    with rows and columns of ones: matrix products are the fastest reductions and broadcasts that
    MXNet has on a CPU, forward and backward, by an order of magnitude.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    x : NDArray or Symbol, float32 or float64, rank >= 2
    axis : int
        The channel axis of `x`.

    Attributes
    ----------
    values : NDArray or Symbol, shape (L, C * S)
        The elements of `x`.
    m : NDArray or Symbol, shape (1,)
        How many elements a channel has.
    """

    def __init__(self, F: Any, x: Array, axis: int) -> None:
        self._F = F
        self._x = x
        # `dot` divides by the length it sums over, and arrays of length 0 exist under np_shape.
        self._product = F.linalg.gemm2 if mx.util.is_np_shape() else F.dot
        if is_symbol(x):
            self._infer(axis)
        else:
            self._measure(axis % x.ndim)

    def _measure(self, axis: int) -> None:
        F, x = self._F, self._x
        L, C, S = (int(np.prod(n)) for n in (x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]))
        self._channels = (C, S)
        self.values = _reshape(F, x, (L, C * S))
        self._ones_L = F.ones((1, L), ctx=x.ctx, dtype=x.dtype)
        self._ones_S = F.ones((1, S), ctx=x.ctx, dtype=x.dtype)
        self.m = F.full((1,), L * S, ctx=x.ctx, dtype=x.dtype)

    def _infer(self, axis: int) -> None:
        F = self._F
        at_least_rank_2 = self._x.reshape(shape=(0, 0, -2))  # else an error when shapes are known
        self._samples = _channels_second(F, at_least_rank_2, axis)
        self.values = self._samples.flatten()
        along_rows = F.contrib.arange_like(self.values, axis=0)
        along_features = F.contrib.arange_like(self.values, axis=1)
        by_channel = self._by_channel(along_features)
        along_channel = F.contrib.arange_like(by_channel, axis=1)
        self._any_C = F.contrib.arange_like(by_channel, axis=0)
        self._ones_L = F.ones_like(along_rows).reshape((1, -1))
        self._ones_S = F.ones_like(along_channel).reshape((1, -1))
        self.m = F.sum(self._ones_L, axis=1) * F.sum(self._ones_S, axis=1)

    def _by_channel(self, row: Array) -> Array:
        """Cut a row of C * S features into a matrix, shape (C, S)."""
        if not is_symbol(row):
            return _reshape(self._F, row, self._channels)
        first, rest = {"lhs_begin": 0, "lhs_end": 1}, {"rhs_begin": 1, "rhs_end": None}
        return self._F.reshape_like(row.reshape((-1,)), self._samples, **first, **rest).flatten()

    def per_channel(self, vector: Array) -> Array:
        """Return `vector`; a graph infers from this that its shape is (C,)."""
        return _alike(self._F, vector, self._any_C) if is_symbol(vector) else vector

    def mean(self, matrix: Array) -> Array:
        """Average a matrix, shape (L, C * S), over each channel; shape (C,)."""
        F = self._F
        row = self._product(self._ones_L, matrix)
        total = self._product(self._by_channel(row), self._ones_S, transpose_b=True)
        return F.broadcast_div(total.reshape((-1,)), self.m)

    def spread(self, vector: Array) -> Array:
        """Write a value per channel, shape (C,), beside each element; shape (L, C * S)."""
        by_channel = self._product(vector.reshape((-1, 1)), self._ones_S)
        return self._product(self._ones_L, by_channel.reshape((1, -1)), transpose_a=True)

    def restore(self, matrix: Array, description: dict[str, Any] | None = None) -> Array:
        """Give a matrix, shape (L, C * S), the shape of `x` again, in memory of its own.

        A graph keeps the `description` in an attribute, for those who fold exported graphs.
        """
        if is_symbol(matrix):
            return self._F.reshape_like(matrix, self._x, attr=_described(description))
        if not matrix.size:
            return matrix.reshape_like(self._x)
        # Not NDArray.reshape, which shares memory: max pooling behind such a view computes its
        # gradient from a workspace that it never wrote (docs/builtin-defects.md).
        return self._F.reshape(matrix, shape=self._x.shape)


# --- types ------------------------------------------------------------------------------------


def is_float16(x: Array, layer_dtype: Any) -> bool:
    """Tell whether `x` is of dtype float16, as far as can be known.

    A symbol's dtype is inferred from the input of the trace, if the layer was cast to float16 or
    the trace was started with float16. Inference visits the whole graph, so it is not done where
    nothing hints at float16.

    Parameters
    ----------
    x : NDArray or Symbol
    layer_dtype : numpy.dtype
        The dtype the layer was last cast to: the answer where nothing can be inferred.
    """
    if not is_symbol(x):
        return np.dtype(x.dtype) == np.float16
    given = {name: a.dtype for name, a in _trace_arrays().items()}
    if np.float16 not in (layer_dtype, *map(np.dtype, given.values())):
        return False
    used = set(x.list_arguments())
    try:
        _, outputs, _ = x.infer_type_partial(**{k: v for k, v in given.items() if k in used})
    except mx.MXNetError:  # an operator that cannot tell its type from what is known
        outputs = None
    return np.dtype(outputs[0] if outputs and outputs[0] else layer_dtype) == np.float16


def devices(x: Array) -> set[str]:
    """Return the types of the devices that hold `x`, or the arrays its graph is traced with."""
    arrays = [x] if not is_symbol(x) else _trace_arrays().values()
    return {a.context.device_type for a in arrays}


# --- one trace --------------------------------------------------------------------------------

_GET_GRAPH = HybridBlock._get_graph.__code__
_CALL = Block.__call__.__code__
_trace = threading.local()


def _trace_frame() -> Any:
    """Return the frame in which the graph being built began, or None.

    Gluon keeps no record of the trace it is in. The frame of ``HybridBlock._get_graph`` is that
    record; where a block is called on symbols directly, the outermost call of a block is.
    """
    frame: Any = sys._getframe(1)
    call = None
    while frame is not None:
        if frame.f_code is _GET_GRAPH:
            return frame
        if frame.f_code is _CALL:
            call = frame
        frame = frame.f_back
    return call


def _trace_arrays() -> dict[str, Any]:
    """Return the arrays that the trace was started with, by input name."""
    frame = _trace_frame()
    if frame is None or frame.f_code is not _GET_GRAPH:
        return {}
    symbols = frame.f_locals["symbol_inputs"]
    arrays = [a for a in frame.f_locals["flatten_args"] if a is not None]
    return {s.name: a for s, a in zip(symbols, arrays) if isinstance(a, mx.nd.NDArray)}


@dataclass(frozen=True)
class _Write:
    """The value of a variable after a write, and a symbol that exists once it has happened."""

    value: Array
    done: Array


def _writes() -> dict[Any, _Write]:
    """Return the latest write to each variable in the graph being built."""
    frame = _trace_frame()
    if frame is None:
        return {}
    token = frame.f_locals["symbol_inputs" if frame.f_code is _GET_GRAPH else "args"]
    if getattr(_trace, "token", None) is not token:
        _trace.token, _trace.writes = token, {}
    return _trace.writes


def _variable_key(variable: Array) -> Any:
    # The body of a loop is a graph of its own: what was assigned outside is not visible inside.
    return variable.name, AttrScope._current.value.get(None).get("__subgraph_name__")


def current(variable: Array) -> Array:
    """Return the value of a variable at this point of the program.

    In a graph that is the value it was last assigned: a layer that is called twice reads the
    second time what the first call wrote, in whatever order the results are combined.
    """
    if not is_symbol(variable):
        return variable
    write = _writes().get(_variable_key(variable))
    return variable if write is None else write.value


# The one way to write to a variable in a graph, variable <- variable + step, by an operator that
# MXNet's Python wrapper refuses to compose, hence a graph of one node as template. It computes
# 1 * variable - lr * wd * weight - lr * step; with a weight of -1 no zero changes its sign.
_ADD = json.dumps(
    {
        "nodes": [
            *({"op": "null", "name": name, "inputs": []} for name in ("weight", "step", "to")),
            {
                "op": "sgd_mom_update",
                "name": "add",
                "attrs": {"lr": "-1", "momentum": "1", "wd": "0"},
                "inputs": [[0, 0, 0], [1, 0, 0], [2, 0, 0]],
            },
        ],
        "arg_nodes": [0, 1, 2],
        "heads": [[3, 0, 0]],
        "attrs": json.loads(mx.sym.var("any").tojson())["attrs"],  # the version of MXNet
    }
)


def _add(F: Any, variable: Array, step: Array, previous: Array) -> Array:
    """Add to a variable, once `previous` exists; return a symbol that exists once it is done."""
    done = mx.sym.load_json(_ADD)(
        weight=F.ones_like(previous) * -1,
        step=step,
        to=variable,
        name=NameManager._current.value.get(None, "assign"),
    )
    attributes = AttrScope._current.value.get(None)
    if attributes:
        done._set_attr(**attributes)
    return F.BlockGrad(done)


def assign(F: Any, variable: Array, value: Array, where: Array) -> Array:
    """Write `value` into `variable` where `where` is 1, now or each time the graph runs.

    An operator that writes to one of its inputs makes that input an auxiliary state of the graph,
    which is what ``export`` and ``SymbolBlock.imports`` expect of running statistics. It can add
    and not overwrite, so the old value is subtracted first: the sum is exactly 0, and then the new
    value. Where nothing is to be written -0 is added, which changes no bit.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    variable : NDArray or Symbol
        The data of a Parameter, or its variable.
    value, where : NDArray or Symbol
        Of the same shape and dtype; no gradient passes through them.

    Returns
    -------
    NDArray or Symbol
        Of the same shape. A graph writes only if it contains this symbol.

    Notes
    -----
    In a graph a variable that is not finite becomes NaN where it is written to.
    """
    old = current(variable)
    if not is_symbol(variable):
        with autograd.pause():
            variable[:] = F.where(where, value, old)
        return variable
    latest = _writes().get(_variable_key(variable))
    previous = value if latest is None else latest.done
    nothing = F.zeros_like(value) * -1
    cleared = _add(F, variable, F.where(where, -old, nothing), previous)
    done = _add(F, variable, F.where(where, value, nothing), cleared)
    # MXNET_BACKWARD_DO_MIRROR runs parts of the forward again for the backward, but never concat
    # nor what lies before it: a second write would count the batch twice.
    done = F.concat(done, dim=0)
    _writes()[_variable_key(variable)] = _Write(F.where(where, value, old), done)
    return done


# --- the compiled operator -------------------------------------------------------------------


def compiled_batch_norm(
    F: Any,
    x: Array,
    gamma: Array,
    beta: Array,
    stored: list[Array],
    may_train: bool,
    **options: Any,
) -> Array:
    """Do all that a layer does, in training and in inference, by one compiled operator.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    x : NDArray or Symbol, float32 or float64, rank >= 2
    gamma, beta : NDArray or Symbol, shape (C,)
    stored : list of NDArray or Symbol
        running_mean and running_var, shape (C,), and num_batches, shape (1,), if it is kept.
    may_train : bool
        If False, the mode is inference whatever ``autograd.is_training()`` says.
    **options
        The attributes of the operator; see ``native/operator.cc``.

    Returns
    -------
    NDArray or Symbol
        Of `x`'s shape and dtype.
    """
    running_mean, running_var, *counter = stored
    # MXNet overwrites the gradient of an extension's input also where grad_req is 'add'.
    if is_symbol(x):
        # Each identity of its own: MXNet merges equal nodes, and adds many gradients in place.
        x, gamma, beta = (F.identity(v, attr=_distinct()) for v in (x, gamma, beta))
        flag = F.ones((1,))
        flag = F.Dropout(flag, p=0.5) if may_train else flag  # 1 in inference, 0 or 2 in training
    else:
        if autograd.is_recording():
            x, gamma, beta = (v if v.grad is None else F.identity(v) for v in (x, gamma, beta))
        training = may_train and autograd.is_training()
        flag = F.full((1,), 0 if training else 1, ctx=x.context)
    writes = _writes() if is_symbol(x) else {}
    before = writes.get(_variable_key(running_mean)) if writes else None
    if before is not None:  # a layer that is called twice writes in the order of the calls
        flag = after(F, flag, F.cast(F.slice_axis(before.done, 0, 0, 1), "float32"))
    y, done = native.batch_norm(
        F, x, gamma, beta, running_mean, running_var, flag, *counter, **options
    )
    if is_symbol(x):
        _trace.compiled = True
        for variable in stored:
            _writes()[_variable_key(variable)] = _Write(_alike(F, variable, done), done)
    return y


_serial = itertools.count()


def _distinct() -> dict[str, str]:
    return {"__serial__": str(next(_serial))}


def _keep_portable(build_cache: Callable[..., None]) -> Callable[..., None]:
    """Make a hybridized block remember a graph of stock operators.

    What a block executes is built once, from the graph it then remembers for ``export`` and
    ``save``. Where that holds the compiled operator it is traced again without, so that no file
    depends on this library.
    """

    @functools.wraps(build_cache)
    def build_then_forget(block: HybridBlock, *args: Any) -> None:
        _trace.compiled = False
        build_cache(block, *args)
        if _trace.compiled and not block._backend:
            block._cached_graph = ()
            with use_backend("portable"):
                block._get_graph(*args)

    return build_then_forget


HybridBlock._build_cache = _keep_portable(HybridBlock._build_cache)


# --- inference graphs -------------------------------------------------------------------------

MARKER = "__batch_norm__"


@contextmanager
def inference_markers() -> Iterator[None]:
    """Make every layer called in this thread emit one marker node in place of its graph.

    Parameter values are known when a graph is written to files and not when it is traced, so
    folding works on the written graph; the marker is what it looks for.
    """
    before = getattr(_trace, "marking", False)
    _trace.marking = True
    try:
        yield
    finally:
        _trace.marking = before


def marking() -> bool:
    """Tell whether layers are to emit markers."""
    return getattr(_trace, "marking", False)


def marker(F: Any, x: Array, description: dict[str, Any]) -> Array:
    """Return `x`, through a node that carries `description` as JSON in its attributes."""
    return F.identity(x, attr=_described(description))


def _described(description: dict[str, Any] | None) -> dict[str, str]:
    return {} if description is None else {MARKER: json.dumps(description, sort_keys=True)}


# --- mode -------------------------------------------------------------------------------------


def selector(training: bool) -> Select:
    """Return the choice between batch and running statistics, decided now."""
    return lambda batch, running: batch() if training else running


class Mode:
    """Training or inference, known now.

    Parameters
    ----------
    training : bool
        Which of the two.
    graph : bool
        Whether a graph is being built.

    Attributes
    ----------
    graph : bool
        Whether a graph is being built.
    may_train : bool
        False if this is inference for certain.
    select : Select
        The choice between batch and running statistics.
    """

    def __init__(self, training: bool, graph: bool) -> None:
        self.graph = graph
        self.may_train = training
        self.select = selector(training)

    def training(self, condition: Array) -> Array:
        """Return `condition`, shape (1,), where this is training, and 0 otherwise."""
        return condition


class GraphMode(Mode):
    """Training or inference, known each time the graph runs.

    ``Dropout`` is the one operator that tells a graph in which mode it runs: with p = 0.5 it
    turns 1 into 0 or 2 in training and leaves it alone otherwise. Both branches are computed and
    one is selected, not multiplied away, so that a NaN in one cannot reach the other.

    Parameters
    ----------
    F : module
        ``mxnet.sym``.
    """

    def __init__(self, F: Any) -> None:
        super().__init__(training=True, graph=True)
        self.select = self._select
        self._F = F
        self._flag = F.BlockGrad(F.Dropout(F.ones((1,)), p=0.5) != 1)

    def _select(self, batch: Callable[[], Array], running: Array) -> Array:
        F, statistic = self._F, batch()
        return F.where(F.broadcast_like(self._flag, statistic), statistic, running)

    def training(self, condition: Array) -> Array:
        """Return `condition`, shape (1,), where the graph trains, and 0 otherwise."""
        return self._F.where(self._flag, condition, self._F.zeros_like(condition))


def mode(F: Any, x: Array, may_train: bool) -> Mode:
    """Return the mode for an array, or for the graph that a symbol belongs to.

    Parameters
    ----------
    F : module
        ``mxnet.nd`` or ``mxnet.sym``.
    x : NDArray or Symbol
    may_train : bool
        If False, the mode is inference whatever ``autograd.is_training()`` says.
    """
    if is_symbol(x):
        return GraphMode(F) if may_train else Mode(training=False, graph=True)
    return Mode(training=may_train and autograd.is_training(), graph=False)


def after(F: Any, vector: Array, done: Array) -> Array:
    """Return `vector`, shape (C,); a graph that contains it contains `done`, (C,) or (1,), too."""
    return _alike(F, vector, F.broadcast_like(done, vector)) if is_symbol(vector) else vector


def _alike(F: Any, vector: Array, other: Array) -> Array:
    # Not `vector + F.zeros_like(other)`: if several layers normalize one array, that shares a node
    # with many gradients, which MXNet sums in an order that can be circular.
    return F._internal._identity_with_attr_like_rhs(vector, other)
