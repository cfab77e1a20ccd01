"""From a net to its inference graph: traced with a marker in place of each norm, and lowered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import Block, SymbolBlock
from mxnet.gluon.parameter import DeferredInitializationError

from .._graph.arrays import is_numpy
from .._graph.nodes import Graph
from .._net import (
    averaged,
    blocks_of,
    flatten,
    graph_of,
    regroup,
    variables_of,
    without_hooks,
)
from .._text import first_line
from ..backends import use_backend
from ..backends.marker import inference_markers
from ._lower import lower
from ._norm_nodes import PARAMETERS, descriptions
from ._report import FoldReport


def lowered(
    net: Any, example_inputs: tuple[Any, ...], *, folding: bool, style: str
) -> tuple[Any, dict[str, Any], dict[str, Any], FoldReport]:
    """Trace and lower a net; returns symbol, values, inputs by name, and the report."""
    if not isinstance(net, Block):
        raise TypeError(f"net must be a gluon Block, got {type(net).__name__}")
    symbol, inputs = traced(net, example_inputs, inference_markers())
    graph = Graph(symbol, amp_casts=False)  # as ``net.export`` writes it
    names = dict.fromkeys(graph.variables())
    names |= {about[role]: None for about in descriptions(graph) for role in PARAMETERS}
    values = values_of(net, [name for name in names if name not in inputs])
    shapes = {name: array.shape for name, array in inputs.items()}
    dtypes = {name: array.dtype for name, array in inputs.items()}
    symbol, values, report = lower(graph, values, shapes, dtypes, folding=folding, style=style)
    return symbol, values, inputs, report


def training_model(net: Block, example_inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """Return the graph of a net that is not lowered, and its parameters."""
    symbol, inputs = traced(net, example_inputs, use_backend("portable"))
    return symbol, values_of(net, [name for name in symbol.list_inputs() if name not in inputs])


def traced(
    net: Block, example_inputs: tuple[Any, ...], layers: AbstractContextManager[None]
) -> tuple[Any, dict[str, Any]]:
    """Return the net's graph and its inputs by name; `layers` is how its norms are to compute."""
    if not example_inputs:
        raise ValueError("example_inputs must have the inputs the net takes, got none")
    leaves = list(_leaves(example_inputs))
    wrong = [a for a in leaves if not isinstance(a, (mx.nd.NDArray, type(None)))]
    if wrong or not any(a is not None for a in leaves):
        got = type(wrong[0]).__module__ + "." + type(wrong[0]).__name__ if wrong else None
        raise TypeError(f"example_inputs must be NDArrays, in lists if nested, got {got}")
    flat, structure = flatten(list(example_inputs))
    arrays = [a for a in flat if a is not None]
    names = ["data"] if len(arrays) == 1 else [f"data{i}" for i in range(len(arrays))]
    inputs = dict(zip(names, arrays))
    variables = iter([_variable_like(array, name) for name, array in inputs.items()])
    arguments = regroup([None if a is None else next(variables) for a in flat], structure)
    # Names count from 0, so that they do not depend on what was traced before. Hooks are written
    # for arrays and cannot handle symbols.
    hooks_off = without_hooks(blocks_of(net))
    with autograd.pause(), hooks_off, mx.name.NameManager(), layers:
        try:
            outputs = _outputs(net, arguments)
        except Exception as error:  # user code, run on symbols
            raise ValueError(
                f"{type(net).__name__} cannot be traced, is every block in it hybridizable? "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
    return mx.sym.Group([o.as_nd_ndarray() for o in outputs if o is not None]), inputs


def _outputs(net: Block, arguments: Any) -> list[Any]:
    """Call a net on symbols."""
    if isinstance(net, SymbolBlock) and is_numpy(graph_of(net)):  # which Gluon does not call
        given = [a.as_nd_ndarray() for a in flatten(list(arguments))[0] if a is not None]
        names = [variable.name for variable in variables_of(net)]
        return [graph_of(net).as_nd_ndarray()(**dict(zip(names, given)))]
    return flatten(net(*arguments))[0]


def _leaves(values: Any) -> Iterator[Any]:
    """Yield what nested lists and tuples hold."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _variable_like(array: Any, name: str) -> Any:
    variable = mx.sym.var(name)
    return variable.as_np_ndarray() if isinstance(array, mx.np.ndarray) else variable


def values_of(net: Block, names: Iterable[str]) -> dict[str, Any]:
    """Return parameters as CPU arrays, averaged over devices as ``net.export`` does."""
    mx.nd.waitall()  # running statistics of a net with static_shape are not waited for otherwise
    parameters = {parameter.name: parameter for parameter in net.collect_params().values()}
    values = {}
    for name in names:
        if name not in parameters:
            raise ValueError(f"the net's graph uses {name!r}, which is none of its parameters")
        try:
            values[name] = averaged(parameters[name]).as_nd_ndarray()
        except (DeferredInitializationError, RuntimeError) as error:
            raise ValueError(
                f"parameter {name!r} has no value yet: "
                "initialize the net and run it once on an input"
            ) from error
    return values
