"""The exchange as an operator of MXNet, with its gradient; each device runs one of its own."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import mxnet as mx
import numpy as np
from mxnet import autograd

from .._graph.arrays import Array, to_classic
from .._graph.trace import EXCHANGE, TRAINING
from .failure import put_error
from .moments import Moments, gradient, merge
from .rounds import MissingDevice, Seat, rounds

_NAMES = ("count", "high", "low", "variance")


class Exchanged(NamedTuple):
    """What all devices have together: mean - high, mean, variance, shape (C,), and m, (1,)."""

    low: Array
    mean: Array
    variance: Array
    m: Array


class Sharing(Protocol):
    """A layer whose devices share."""

    serial: str

    def seat(self, device: str) -> Seat | None:
        """Say where a device meets the others in this training call; None if it is alone."""


_layers: weakref.WeakValueDictionary[str, Sharing] = weakref.WeakValueDictionary()


def exchange(
    F: Any, layer: Sharing, count: Array, high: Array, low: Array, variance: Array
) -> Exchanged:
    """Merge the moments of this device with those of the others, in training; else return its own.

    `high` is a constant to the gradient. In a graph, training is what it is when it runs.
    """
    _layers[layer.serial] = layer
    inputs = count, high, low, variance
    return Exchanged(*F.Custom(*inputs, op_type=EXCHANGE, layer=layer.serial))


def training(F: Any) -> Array:
    """Return 1 in training, else 0, shape (1,); a graph finds out when it runs.

    ``Dropout`` tells that too, but all CPUs of a process share the random generator it asks for:
    one that waits behind an exchange would keep other devices from coming to it.
    """
    return F.Custom(F.ones((1,)), op_type=TRAINING)


class _Exchange(mx.operator.CustomOp):
    def __init__(self, seat: Seat | None, problem: str | None) -> None:
        super().__init__()
        self._seat = seat
        self._problem = problem
        self._backwards = 0

    def forward(self, is_train: Any, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        """Merge the moments."""
        self._fill(out_data, req, lambda: self._merged(in_data))

    def backward(
        self, req: Any, out_grad: Any, in_data: Any, out_data: Any, in_grad: Any, aux: Any
    ) -> None:
        """Add up the gradients of all devices, and return this device's part."""
        self._fill(in_grad, req, lambda: self._gradients(out_grad))

    def _merged(self, in_data: list[Array]) -> list[Any]:
        count, high, low, variance = _values(in_data)
        # An empty part has no mean; it must not make those of the others unusable.
        self._own = Moments(float(count[0]), high, low, variance)
        self._whole = merge(self._meet(0, self._own))
        mean = self._whole.mean
        return [mean - high, mean, self._whole.variance, [self._whole.count]]

    def _gradients(self, out_grad: list[Array]) -> list[Any]:
        self._backwards += 1
        of_low, of_mean, of_variance, _ = _values(out_grad)
        brought = self._meet(self._backwards, (of_low + of_mean, of_variance))
        of_mean, of_variance = (np.sum(values, axis=0) for values in zip(*brought))
        low, variance = gradient(self._own, self._whole, of_mean, of_variance)
        return [0, 0, low, variance]

    def _meet(self, step: int, value: Any) -> list[Any]:
        return [value] if self._seat is None else self._seat.meet(step, value)

    def _fill(self, arrays: list[Array], req: list[str], compute: Callable[[], list[Any]]) -> None:
        """Write results, or the error in the place of them: none may reach MXNet's threads."""
        try:
            if self._problem:
                raise MissingDevice(self._problem)
            for array, how, value in zip(arrays, req, compute()):
                value = np.broadcast_to(np.asarray(value, array.dtype), array.shape)
                self.assign(to_classic(array), how, mx.nd.array(value, array.ctx, array.dtype))
        except Exception as error:
            text = str(error) if isinstance(error, MissingDevice) else repr(error)
            if self._seat is not None:
                self._seat.leave(text)
            put_error([array for array, how in zip(arrays, req) if how != "null"], text)


def _values(arrays: list[Array]) -> list[Any]:
    return [array.asnumpy().astype(np.float64) for array in arrays]


@mx.operator.register(EXCHANGE)
class _ExchangeProp(mx.operator.CustomOpProp):
    def __init__(self, layer: str) -> None:
        super().__init__(need_top_grad=True)
        self._serial = layer

    def list_arguments(self) -> list[str]:
        """Return the names of the inputs."""
        return list(_NAMES)

    def list_outputs(self) -> list[str]:
        """Return the names of the outputs."""
        return list(Exchanged._fields)

    def infer_shape(self, in_shape: Any) -> Any:
        """Return the shapes: (1,) and (C,)."""
        channels: list[int] = next((shape for shape in in_shape[1:] if shape), [])
        return [[1], *[channels] * 3], [*[channels] * 3, [1]], []

    def infer_type(self, in_type: Any) -> Any:
        """Return the types, all the same."""
        known = next((dtype for dtype in in_type if dtype is not None), np.float32)
        return [known] * 4, [known] * 4, []

    def declare_backward_dependency(self, out_grad: Any, in_data: Any, out_data: Any) -> Any:
        """Return what the backward is given; the rest it remembers."""
        return out_grad

    def create_operator(self, ctx: Any, in_shapes: Any, in_dtypes: Any) -> _Exchange:
        """Seat this call of the layer: MXNet asks for it in the thread and order of the calls."""
        if not autograd.is_training():
            return _Exchange(None, None)
        layer = _layers.get(self._serial)
        if layer is None:
            return _Exchange(None, "a layer of this graph no longer exists: hybridize the net")
        try:
            return _Exchange(layer.seat(str(ctx)), None)
        except ValueError as error:
            return _Exchange(None, str(error))


class _Training(mx.operator.CustomOp):
    def forward(self, is_train: Any, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        """Write the flag."""
        self.assign(out_data[0], req[0], int(bool(is_train)))

    def backward(
        self, req: Any, out_grad: Any, in_data: Any, out_data: Any, in_grad: Any, aux: Any
    ) -> None:
        """Write 0."""
        self.assign(in_grad[0], req[0], 0)


@mx.operator.register(TRAINING)
class _TrainingProp(mx.operator.CustomOpProp):
    def create_operator(self, ctx: Any, in_shapes: Any, in_dtypes: Any) -> _Training:
        """Return the operator."""
        return _Training()


def _settle() -> None:
    """Let what MXNet has been given to do come to its end."""
    while rounds.used:
        try:
            mx.nd.waitall()
            return
        except mx.MXNetError:
            continue


def _end() -> None:
    """Let no thread of MXNet wait in Python when the interpreter is gone."""
    rounds.close("the process ends")
    _settle()


atexit.register(_end)


def _before_fork() -> None:
    # MXNet stops its threads for a fork, which would wait for one that waits here for Python.
    if rounds.used:
        mx.nd.waitall()


os.register_at_fork(before=_before_fork)
