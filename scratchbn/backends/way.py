"""What every way of computing is given."""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple, Protocol

from .._graph.arrays import Array, is_symbol, to_classic
from .._graph.kernels import distinct
from .._graph.names import DistinctNames
from .._graph.trace import is_float16
from .._options import Options


class Layer(Protocol):
    """What a way needs of a layer: its options, its Parameters, and the hooks of variants."""

    options: Options
    data_dtype: Any
    gamma: Any
    beta: Any
    running_mean: Any
    running_var: Any
    infers_as_batch_norm: bool

    @property
    def overridden(self) -> set[str]:
        """The names of the hooks that a variant has overridden."""

    @property
    def is_stock(self) -> bool:
        """Whether the compiled kernel computes what this layer does."""

    @property
    def activates_by_relu(self) -> bool:
        """Whether `activate` is max(y, 0)."""

    def statistics(self, F: Any, view: Any, mean: Array, variance: Array, select: Any) -> Any:
        """Choose what to normalize with."""

    def update(self, F: Any, running: Array, batch: Array, count: Array | None) -> Array:
        """Return the new value of a running statistic."""

    def transform(
        self, F: Any, view: Any, batch: Any, gamma: Array, beta: Array, epsilon: float
    ) -> Array:
        """Normalize, scale and shift."""

    def activate(self, F: Any, y: Array) -> Array:
        """Do what follows the normalization."""


class State(NamedTuple):
    """The Parameters of a layer as one call sees them: arrays, or the variables of a graph."""

    gamma: Array
    beta: Array
    running_mean: Array
    running_var: Array
    num_batches: Array | None = None

    @classmethod
    def of(cls, *parameters: Array) -> State:
        """Return the state without NumPy semantics."""
        return cls(*map(to_classic, parameters))

    @property
    def moving(self) -> list[Array]:
        """Those that training moves in the forward."""
        return [v for v in self[2:] if v is not None]


Way = Callable[[Layer, Any, Array, State], Array]


def in_float32(way: Way) -> Way:
    """Compute what is float16 in float32."""

    @functools.wraps(way)
    def computed(layer: Layer, F: Any, x: Array, state: State) -> Array:
        if not is_float16(x, layer.data_dtype):
            return way(layer, F, x, state)
        x = distinct(F.cast(x, dtype="float32"))
        return F.cast(way(layer, F, x, state), dtype="float16")

    return computed


def named(way: Way) -> Way:
    """In a graph, call the last node of a layer ``<layer>_fwd``, as Gluon's own layers do."""

    @functools.wraps(way)
    def computed(layer: Layer, F: Any, x: Array, state: State) -> Array:
        if not is_symbol(x):
            return way(layer, F, x, state)
        with DistinctNames() as names:
            y = way(layer, F, x, state)
            names.name_last(y, "fwd")
        return y

    return computed
