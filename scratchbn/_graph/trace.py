"""The graph that is being built, as an object; Gluon keeps no record of it.

Two doors lead into a trace, and importing this module wraps both: ``HybridBlock._get_graph``, for
a block that is given arrays, and ``Block.__call__``, for one that is called on symbols. A third
wrapper, of ``HybridBlock._build_cache``, tells the trace of a graph that will be executed from the
trace of one that a block remembers for ``export``, ``save`` and shape inference, and lets those who
asked with :func:`when_built` put something else in the place of what runs the graph.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mxnet as mx
from mxnet.attribute import AttrScope
from mxnet.gluon import Block, HybridBlock, SymbolBlock
from mxnet.gluon.block import _flatten

from .arrays import Array, is_symbol

# The custom operators by which devices share statistics, and learn whether they train.
TRAINING = "_scratchbn_training"
EXCHANGE = "_scratchbn_exchange"
# How a node looks in a graph's JSON whose operator is this library's: no file may hold one.
_OURS = re.compile(r'"(op|op_type)": "_scratchbn_')


@dataclass(frozen=True)
class Write:
    """The value of a variable after a write, and a symbol that exists once it has happened."""

    value: Array
    done: Array


@dataclass(frozen=True)
class Trace:
    """A graph being built.

    `arrays` are what the block was called with, by the names of their symbols; `writes` holds the
    latest write to each variable; `names` are those that nodes have; `shared` holds nodes that
    serve all layers. `purpose` is 'execute', 'remember', or 'symbols' where a block is called on
    symbols and nobody knows what for.
    """

    purpose: str = "symbols"
    arrays: dict[str, Array] = field(default_factory=dict)
    writes: dict[Any, Write] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    shared: dict[Any, Array] = field(default_factory=dict)


# Given a CachedOp, its graph, also as JSON, which inputs are data, and its flags; returns what is
# to run.
Built = Callable[[Any, Array, str, list[bool], list[tuple[str, Any]]], Any]

_when_built: list[Built] = []


class _Here(threading.local):
    trace: Trace | None = None
    executing = False


_here = _Here()


def current() -> Trace:
    """Return the trace this thread is in; an empty one outside of any."""
    return _here.trace or Trace()


def key_of(variable: Array) -> tuple[str, str | None]:
    """Return what a trace knows a variable by; the body of a loop is a graph of its own."""
    return variable.name, AttrScope._current.value.get(None).get("__subgraph_name__")


def devices_of(x: Array) -> set[mx.Context]:
    """Return the devices that hold `x`, or the arrays its graph is traced with."""
    arrays = current().arrays.values() if is_symbol(x) else [x]
    return {a.context for a in arrays}


@contextmanager
def executing() -> Iterator[None]:
    """Trace graphs for execution inside a ``with`` block: they need not be portable."""
    before, _here.executing = _here.executing, True
    try:
        yield
    finally:
        _here.executing = before


@contextmanager
def _opened(trace: Trace) -> Iterator[None]:
    before, _here.trace = _here.trace, trace
    try:
        yield
    finally:
        _here.trace = before


def _by_name(args: tuple[Any, ...]) -> dict[str, Array]:
    """Return the arrays among the arguments by the names Gluon gives their symbols."""
    given = [a for a in _flatten(args, "input")[0] if a is not None]
    names = ["data"] if len(given) == 1 else [f"data{i}" for i in range(len(given))]
    return {name: a for name, a in zip(names, given) if isinstance(a, mx.nd.NDArray)}


def _names_in(values: Any) -> set[str]:
    """Return the names of the nodes that lead to the symbols in nested lists."""
    if is_symbol(values):
        outputs = values.get_internals().list_outputs()
        return {re.sub(r"_output\d*$", "", output) for output in outputs}
    nested = values if isinstance(values, (list, tuple)) else ()
    return set().union(*map(_names_in, nested))


def _called_on_arrays(get_graph: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_graph)
    def traced(block: HybridBlock, *args: Any) -> Any:
        if block._cached_graph:
            return get_graph(block, *args)
        with _opened(Trace("execute" if _here.executing else "remember", _by_name(args))):
            return get_graph(block, *args)

    return traced


def _called_on_symbols(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def traced(block: Block, *args: Any) -> Any:
        if _here.trace is not None or (args and isinstance(args[0], mx.nd.NDArray)):
            return call(block, *args)
        with _opened(Trace(names=_names_in(args))):
            return call(block, *args)

    return traced


def _built_to_execute(build_cache: Callable[..., None]) -> Callable[..., None]:
    """Build what a block executes from a trace of its own, and let it remember a portable graph."""

    @functools.wraps(build_cache)
    def build(block: HybridBlock, *args: Any) -> None:
        if block._backend:  # MXNet rewrites the graph it executes, and remembers no other
            return build_cache(block, *args)
        if isinstance(block, SymbolBlock):  # it has a graph and nothing to trace
            build_cache(block, *args)
            return _tell_built(block, block._cached_graph[1].tojson())
        remembered, block._cached_graph = block._cached_graph, ()
        try:
            with executing():
                build_cache(block, *args)
        except BaseException:
            block._cached_graph = remembered
            raise
        text = block._cached_graph[1].tojson()
        _tell_built(block, text)
        if _OURS.search(text):
            block._cached_graph = remembered
            block._get_graph(*args)

    return build


def when_built(built: Built) -> None:
    """Have a function called with whatever runs a block, once it is built."""
    _when_built.append(built)


def _tell_built(block: HybridBlock, text: str) -> None:
    is_data = [data for data, _ in block._cached_op_args]
    for built in _when_built:
        block._cached_op = built(
            block._cached_op, block._cached_graph[1], text, is_data, list(block._flags)
        )


HybridBlock._get_graph = _called_on_arrays(HybridBlock._get_graph)
HybridBlock._build_cache = _built_to_execute(HybridBlock._build_cache)
Block.__call__ = _called_on_symbols(Block.__call__)
