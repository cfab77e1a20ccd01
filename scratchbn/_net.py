"""Any Gluon net: its blocks, its norm layers, its graphs.

Gluon keeps what is asked for here under names of its own. This module and ``_graph.trace`` are
the two places that know them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from warnings import warn

from mxnet.gluon import Block, HybridBlock, Parameter, SymbolBlock, nn
from mxnet.gluon.nn.basic_layers import _BatchNorm

from .layer import ScratchBatchNorm

# MXNet's operators that normalize as batch norm does.
BATCH_NORM_OPERATORS = frozenset(
    {
        "BatchNorm",
        "BatchNorm_v1",
        "_contrib_BatchNormWithReLU",
        "_contrib_SyncBatchNorm",
        "_npx_batch_norm",
    }
)
NORM_LAYERS = (_BatchNorm, ScratchBatchNorm)

Array = Any
Copies = list[tuple[Array, Array]]


def check_block(net: Any) -> None:
    """Raise TypeError if `net` is not a Block."""
    if not isinstance(net, Block):
        raise TypeError(f"net must be a gluon Block, got {net!r}")


# --- blocks -----------------------------------------------------------------------------------


def blocks_of(net: Block) -> dict[Block, str]:
    """Return every block that `net` holds, itself first, with the path it was first met on.

    Children come first, then blocks in attributes and in lists, tuples, sets and dicts, nested at
    any depth: Gluon does not register those, yet a forward may call them.
    """
    found: dict[Block, str] = {}
    containers: set[int] = set()

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Block):
            if value not in found:
                found[value] = path
                for name, held in _held(value):
                    visit(held, f"{path}.{name}" if path else name)
            return
        if not isinstance(value, (dict, list, tuple, set, frozenset, deque)):
            return
        if id(value) in containers:
            return
        containers.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            visit(item, f"{path}[{key!r}]")

    visit(net, "")
    return found


def _held(block: Block) -> Iterator[tuple[str, Any]]:
    yield from block._children.items()
    yield from [(name, value) for name, value in vars(block).items() if name != "_children"]


def norm_layers(blocks: dict[Block, str]) -> Iterator[tuple[Any, str]]:
    """Yield the batch norm layers of either family, with their paths."""
    for block, path in blocks.items():
        if isinstance(block, NORM_LAYERS):
            yield block, path


def has_builtin(*nets: Block) -> bool:
    """Tell whether MXNet's own batch norm is a block of any of the nets."""
    return any(isinstance(block, _BatchNorm) for net in nets for block in blocks_of(net))


# --- options ----------------------------------------------------------------------------------


def freezable(net: Block) -> list[dict[str, Any]]:
    """Return the options of the layers that can be told to use their running statistics."""
    options = [getattr(block, "_kwargs", None) for block in blocks_of(net)]
    return [o for o in options if isinstance(o, dict) and "use_global_stats" in o]


@contextmanager
def frozen(net: Block) -> Iterator[None]:
    """Let all norm layers use their running statistics; graphs traced before do not notice."""
    before = [(options, options["use_global_stats"]) for options in freezable(net)]
    try:
        for options, _ in before:
            options["use_global_stats"] = True
        yield
    finally:
        for options, value in before:
            options["use_global_stats"] = value


def disable_dropout(net: Block) -> None:
    """Set the rate of every Dropout layer to 0."""
    for block in blocks_of(net):
        if isinstance(block, nn.Dropout):
            block._rate = 0.0


# --- graphs -----------------------------------------------------------------------------------


def graph_of(block: Any) -> Any:
    """Return the symbol that a hybridized block remembers; None before its first call."""
    return block._cached_graph[1] if block._cached_graph else None


def may_be_traced(block: Block) -> bool:
    """Tell whether a block runs as a graph of its layers once it is hybridized."""
    return isinstance(block, HybridBlock) and not isinstance(block, SymbolBlock)


def clear_graphs(blocks: Iterable[Block]) -> None:
    """Make hybridized blocks trace their graphs again; a SymbolBlock cannot."""
    for block in blocks:
        if may_be_traced(block):
            block._clear_cached_op()


@contextmanager
def eager(blocks: Iterable[Block]) -> Iterator[None]:
    """Run all blocks eagerly: hooks of a layer inside a graph are not called."""
    active = [block for block in blocks if may_be_traced(block) and block._active]
    for block in active:
        block._active = False
    try:
        yield
    finally:
        for block in active:
            block._active = True


# --- norms inside the graph of a SymbolBlock ----------------------------------------------------


def hidden_builtin(block: SymbolBlock) -> int:
    """Count the built-in's nodes in the graph of a block."""
    nodes = json.loads(graph_of(block).tojson())["nodes"]
    return sum(node["op"] in BATCH_NORM_OPERATORS for node in nodes)


def hidden_scratch(block: SymbolBlock) -> int:
    """Count our layers in the graph of a block: running variances no built-in node reads."""
    graph = graph_of(block)
    nodes = json.loads(graph.tojson())["nodes"]
    read = {
        nodes[i[0]]["name"]
        for node in nodes
        if node["op"] in BATCH_NORM_OPERATORS
        for i in node["inputs"]
    }
    states = set(graph.list_auxiliary_states())
    return sum(name.endswith("running_var") for name in states - read)


def hidden_states(blocks: Iterable[Block]) -> list[Any]:
    """Return the running statistics in the graphs of blocks that have no layers."""
    return [
        block.params[name]
        for block in blocks
        if isinstance(block, SymbolBlock)
        for name in graph_of(block).list_auxiliary_states()
    ]


def warn_of_hidden(blocks: dict[Block, str], outcome: str) -> None:
    """Warn the caller's caller of norms that are nodes of a graph and "were not frozen", say."""
    for block, path in blocks.items():
        if not isinstance(block, SymbolBlock):
            continue
        hidden = hidden_builtin(block) + hidden_scratch(block)
        if hidden:
            warn(
                f"{path or 'the net'} ({type(block).__name__}): {hidden} batch normalizations are "
                f"nodes of its graph and {outcome}",
                UserWarning,
                stacklevel=3,
            )


# --- values -------------------------------------------------------------------------------------


def parameters_of(net: Block) -> dict[str, Parameter]:
    """Return the parameters of a net by structural name, such as ``0.gamma``."""
    return dict(net._collect_params_with_prefix())


def has_value(parameter: Parameter) -> bool:
    """Tell whether a parameter is initialized."""
    return parameter._data is not None


def initialize_now(parameter: Parameter, init: Any, device: Any) -> None:
    """Give a parameter new arrays, whatever it has and whatever was deferred."""
    parameter._deferred_init = ()
    parameter.initialize(init, ctx=device, force_reinit=True)


def detach_trainer(parameter: Parameter) -> None:
    """Make a parameter forget its trainer, whose key store ``set_data`` would reset."""
    parameter._set_trainer(None)


def copies_of(parameters: Iterable[Any]) -> Copies:
    """Copy the values of Parameters, on each device; those without a value are left out."""
    return [(value, value.copy()) for p in parameters for value in p._data or ()]


def put_back(copies: Copies) -> None:
    """Write the copies into the arrays they were made of."""
    for value, copy in copies:
        value[:] = copy
