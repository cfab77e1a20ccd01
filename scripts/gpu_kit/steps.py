"""A forward and a backward of the compiled operator, on arrays of NumPy or PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from .operator import Operator, Tensor

STATE = ("gamma", "beta", "running_mean", "running_var", "flag")
TRAINING, INFERENCE = 0.0, 1.0  # values of the flag


class Memory(Protocol):
    """Where arrays are, and how to make them."""

    @property
    def stream(self) -> int:
        """The stream that work is put on."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array whose content is anything."""

    def tensor(self, array: Any) -> Tensor:
        """Describe an array."""

    def allocate(self, size: int) -> int:
        """Return a pointer to `size` bytes that stay for as long as the memory does."""


class Arrays(Memory, Protocol):
    """Memory whose arrays can be filled and read."""

    def put(self, values: Any) -> Any:
        """Return an array with the values of one of NumPy."""

    def take(self, array: Any) -> Any:
        """Return an array's values as one of NumPy."""

    def draw(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array of random values."""


class Forward(NamedTuple):
    """The outputs of a forward."""

    y: Any
    kept: Any
    token: Any


class Gradients(NamedTuple):
    """The outputs of a backward; None where no gradient was wanted."""

    dx: Any
    dgamma: Any
    dbeta: Any


def outputs_for(operator: Operator, memory: Memory, x: Any, options: dict[str, Any]) -> Forward:
    """Make arrays for the outputs, of the shapes and types that the operator asks for."""
    data = memory.tensor(x)
    shapes, types = operator.output_shapes(data.shape, options), operator.output_types(data.dtype)
    return Forward(*map(memory.empty, shapes, types))


def forward(
    operator: Operator,
    memory: Memory,
    x: Any,
    state: dict[str, Any],
    options: dict[str, Any],
    into: Forward | None = None,
) -> Forward:
    """Normalize `x`; `state` holds an array for each name in `STATE`, and may hold num_batches."""
    into = into or outputs_for(operator, memory, x, options)
    inputs = [memory.tensor(v) for v in (x, *_listed(state))]
    outputs = [memory.tensor(v) for v in into]
    operator.compute("forward", inputs, outputs, options, memory.allocate, memory.stream)
    return into


def gradients_for(memory: Memory, x: Any, state: dict[str, Any]) -> Gradients:
    """Make arrays for the gradients."""
    arrays = (memory.tensor(v) for v in (x, state["gamma"], state["beta"]))
    return Gradients(*(memory.empty(t.shape, t.dtype) for t in arrays))


def backward(
    operator: Operator,
    memory: Memory,
    dy: Any,
    x: Any,
    state: dict[str, Any],
    before: Forward,
    options: dict[str, Any],
    into: Gradients | None = None,
) -> Gradients:
    """Return the gradients; `before` is what the forward gave."""
    into = into or gradients_for(memory, x, state)
    ours = [x, *_listed(state)]
    # MXNet hands over a gradient for each output; the operator reads that of y.
    inputs = [memory.tensor(v) for v in (dy, before.kept, before.token, *ours, *before)]
    outputs = [_maybe(memory, v) for v in into]
    outputs += [Tensor(0, (1,), "float32")] * (len(ours) - len(outputs))
    operator.compute("backward", inputs, outputs, options, memory.allocate, memory.stream)
    return into


def _listed(state: dict[str, Any]) -> list[Any]:
    return [state[name] for name in (*STATE, "num_batches") if name in state]


def _maybe(memory: Memory, array: Any) -> Tensor:
    return Tensor(0, (1,), "float32") if array is None else memory.tensor(array)
