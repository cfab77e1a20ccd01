"""What every way of computing is given."""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple, Protocol

from .._graph.arrays import Array, is_symbol, to_classic
from .._graph.kernels import distinct
from .._graph.names import DistinctNames
from .._graph.operators import F as OPERATORS
from .._graph.operators import amp_is_on, ordinary, plain
from .._graph.types import narrow_dtype, survives_export
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

    def training_flag(self, F: Any, x: Array) -> Array:
        """Return what tells a graph whether it trains; None: nothing of the layer's own."""

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
    """Compute what is float16 or bfloat16 in float32."""

    @functools.wraps(way)
    def computed(layer: Layer, F: Any, x: Array, state: State) -> Array:
        dtype = narrow_dtype(x, layer.data_dtype)
        if dtype is None:
            return way(layer, F, x, state)
        # Where x has 16 bits because AMP cast it, files hold neither that cast nor these.
        of_amp = is_symbol(x) and not survives_export(x, dtype)
        cast = F.amp_cast if of_amp else F.cast
        y = cast(way(layer, F, distinct(cast(x, dtype="float32")), state), dtype=dtype)
        return F.identity(y) if of_amp else y  # MXNet leaves a cast of AMP that ends a graph

    return computed


def named(way: Way) -> Way:
    """In a graph, call the last node of a layer ``<layer>_fwd``, as Gluon's own layers do.

    The nodes are MXNet's own operators, where AMP is on too.
    """

    @functools.wraps(way)
    def computed(layer: Layer, F: Any, x: Array, state: State) -> Array:
        if not is_symbol(x):
            return way(layer, F, x, state)
        with DistinctNames() as names:
            if amp_is_on():
                y = ordinary(way(layer, OPERATORS, plain(x), State(*map(plain, state))))
            else:
                y = way(layer, F, x, state)
            names.name_last(y, "fwd")
        return y

    return computed
