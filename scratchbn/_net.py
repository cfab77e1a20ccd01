"""The one adapter between this package and Gluon's private names.

What is asked here of a net (its blocks, norm layers, Parameters, graphs) Gluon keeps under names of
its own. Only this module and ``_graph.trace`` know them; MXNet is retired, so they will not change.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from mxnet.gluon import Block, HybridBlock, Parameter, SymbolBlock, nn
from mxnet.gluon.block import _flatten, _regroup
from mxnet.gluon.nn.basic_layers import _BatchNorm
from mxnet.symbol import Symbol

from ._graph.arrays import is_numpy, to_numpy
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
BuiltInBatchNorm = _BatchNorm  # the base of nn.BatchNorm, nn.BatchNormReLU and SyncBatchNorm
NORM_LAYERS = (BuiltInBatchNorm, ScratchBatchNorm)

Array = Any
Net = TypeVar("Net", bound=Block)
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


def options_of(layer: Any) -> dict[str, Any]:
    """Return the options of a norm layer, to read or to edit, as MXNet's operator names them."""
    return layer._kwargs


def channel_axis(layer: Any) -> int:
    """Return the channel axis of a norm layer; SyncBatchNorm has no option for it."""
    return layer._kwargs.get("axis", 1)


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


def variables_of(block: SymbolBlock) -> list[Symbol]:
    """Return the symbols that stand for the inputs of a SymbolBlock."""
    return list(block._cached_graph[0])


def set_graph(block: SymbolBlock, symbol: Symbol) -> None:
    """Give a SymbolBlock another graph of the same inputs and Parameters."""
    if is_numpy(graph_of(block)):  # JSON does not tell
        symbol = to_numpy(symbol)
    block._cached_graph = block._cached_graph[0], symbol
    block._clear_cached_op()


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


@contextmanager
def without_hooks(blocks: Iterable[Any]) -> Iterator[None]:
    """Take the forward hooks off blocks for a while."""
    with ExitStack() as stack:
        for block in blocks:
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                stack.callback(setattr, block, name, getattr(block, name))
                setattr(block, name, OrderedDict())
        yield


def flatten(arrays: Any) -> tuple[list[Any], Any]:
    """Return what nested lists of arrays or symbols hold, None included, and their structure."""
    flat, structure = _flatten(arrays, "input")
    return flat, structure


def regroup(flat: list[Any], structure: Any) -> Any:
    """Put what :func:`flatten` returned back into nested lists."""
    return _regroup(flat, structure)


# --- the graph that runs a hybridized block -----------------------------------------------------


def is_hybridized(block: Any) -> bool:
    """Tell whether a block runs as a graph."""
    return isinstance(block, HybridBlock) and (block._active or isinstance(block, SymbolBlock))


def runs_own_graph(block: Any) -> bool:
    """Tell whether a block runs as a graph that no backend of MXNet has rewritten."""
    return is_hybridized(block) and not block._backend


def accepts(block: Any, arguments: tuple[Any, ...]) -> bool:
    """Tell whether a block's graph takes the arguments: arrays, nested as in its first call."""
    arrays, structure = _flatten(arguments, "input")
    if any(isinstance(array, Symbol) for array in arrays):
        return False
    return block._cached_op is None or structure == block._in_format


def build_cached_op(block: Any, arguments: tuple[Any, ...]) -> None:
    """Build what runs a hybridized block, if it has not been called yet."""
    if block._cached_op is None:
        with next(a.ctx for a in _flatten(arguments, "input")[0] if a is not None):
            block._build_cache(*arguments)


def cached_op(block: Any) -> Any:
    """Return what runs a hybridized block, a CachedOp; None before its first call."""
    return block._cached_op


def set_cached_op(block: Any, op: Any) -> None:
    """Make something else run a hybridized block."""
    block._cached_op = op


def inputs_of_cached_op(block: Any, data: list[Symbol]) -> list[tuple[bool, str]]:
    """Return what a block's CachedOp takes, in order: whether it is data, and its name."""
    return [
        (is_data, data[source].name if is_data else source.name)
        for is_data, source in block._cached_op_args
    ]


def retrace(block: Any, arguments: tuple[Any, ...]) -> tuple[list[Symbol], Symbol]:
    """Trace a block once more, and return the inputs and the graph; its own graph stays.

    A SymbolBlock has nothing to trace: its graph is returned.
    """
    if isinstance(block, SymbolBlock):
        return variables_of(block), graph_of(block)
    kept = block._cached_graph, block._in_format, block._out_format
    try:
        block._cached_graph = ()
        return block._get_graph(*arguments)
    finally:
        block._cached_graph, block._in_format, block._out_format = kept


# --- Parameters ---------------------------------------------------------------------------------


def own_parameters(block: Any) -> dict[str, Any]:
    """Return the Parameters of a block without those of its children, by attribute name."""
    return block._reg_params


def can_have_gradient(parameter: Any) -> bool:
    """Tell whether a Parameter was created differentiable, whatever its grad_req is now."""
    return parameter._differentiable


def values_of(parameter: Any) -> list[Array]:
    """Return the arrays of a Parameter, one for each device; none before it has a value."""
    return parameter._data or []


def averaged(parameter: Any) -> Array:
    """Return the value of a Parameter on the CPU, averaged over devices."""
    return parameter._reduce()


def parameters_of(net: Block) -> dict[str, Parameter]:
    """Return the parameters of a net by structural name, such as ``0.gamma``."""
    return dict(net._collect_params_with_prefix())


def has_value(parameter: Parameter) -> bool:
    """Tell whether a parameter is initialized."""
    return parameter._data is not None


def devices_of(net: Block) -> list[Any]:
    """Return the devices that a net's parameters are on, or will be; none if it has none."""
    for parameter in net.collect_params().values():
        if parameter._data is not None or parameter._deferred_init:
            return list(parameter.list_ctx())
    return []


def initialize_now(parameter: Parameter, init: Any, device: Any) -> None:
    """Give a parameter new arrays, whatever it has and whatever was deferred."""
    parameter._deferred_init = ()
    parameter.initialize(init, ctx=device, force_reinit=True)


def detach_trainer(parameter: Parameter) -> None:
    """Make a parameter forget its trainer, whose key store ``set_data`` would reset."""
    parameter._set_trainer(None)


def copies_of(parameters: Iterable[Any]) -> Copies:
    """Copy the values of Parameters, on each device; those without a value are left out."""
    return [(value, value.copy()) for p in parameters for value in values_of(p)]


def put_back(copies: Copies) -> None:
    """Write the copies into the arrays they were made of."""
    for value, copy in copies:
        value[:] = copy
