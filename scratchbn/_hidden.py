"""Batch normalization in the graph of a ``SymbolBlock``, where there are no layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from warnings import warn

import numpy as np
from mxnet.gluon import Block, SymbolBlock

from ._conversion_report import ConversionReport
from ._graph.nodes import Graph, Node, Output
from ._net import BATCH_NORM_OPERATORS, graph_of, set_graph, values_of
from .backends.marker import KEY as MARKER
from .deploy._frozen import freeze_graph, may_be_frozen
from .deploy._norm_nodes import PARAMETERS, description_of, layer_name, obstacle
from .deploy._training_graph import ends_layer, running_means


class HiddenNorm:
    """A norm in a graph, with the attributes of a layer that are asked for: to be read only."""

    def __init__(self, block: SymbolBlock, node: Node) -> None:
        names, self._kwargs = _read(node)
        self.name = layer_name(names["running_mean"], node.name)
        self.gamma, self.beta, self.running_mean, self.running_var = (
            block.params[names[role]] for role in PARAMETERS
        )
        if self._kwargs["momentum"] is None:
            self.num_batches = block.params[f"{self.name}_num_batches"]

    @property
    def parameters(self) -> list[Any]:
        """Those that the layer moves itself."""
        return [self.running_mean, self.running_var, *filter(None, [vars(self).get("num_batches")])]


def _read(node: Node) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the names of a norm's parameters by role, and its options as a layer has them."""
    if ends_layer(node):
        about = description_of(node)
        names = {role: about[role] for role in PARAMETERS}
        options = {key: about[key] for key in ("axis", "momentum", "use_global_stats")}
        more = {key: about[key] for key in ("fix_gamma", "center", "unbiased_variance")}
        return names, {**options, **more, "eps": about["epsilon"]}
    names = {role: source.node.name for role, source in zip(PARAMETERS, node.inputs[1:])}
    return names, {
        "axis": int(node.attrs.get("axis", 1)),
        "eps": float(node.attrs.get("eps", 1e-3)),
        "momentum": float(node.attrs.get("momentum", 0.9)),
        "fix_gamma": node.flag("fix_gamma", True),
        "use_global_stats": node.flag("use_global_stats", False),
    }


def norms_in(graph: Graph) -> Iterator[tuple[Node, Output]]:
    """Yield the last node of each call of a norm that says what it is, and what it normalizes."""
    for node in graph.nodes():
        if node.op in BATCH_NORM_OPERATORS and obstacle(node, has_more=False) is None:
            yield node, node.inputs[0]
        elif ends_layer(node) and may_be_frozen(node):
            yield node, node.inputs[1]


def hidden_norms(blocks: dict[Block, str]) -> dict[HiddenNorm, str]:
    """Return the norms in the graphs of blocks without layers, once each, with their paths."""
    found: dict[Any, tuple[HiddenNorm, str]] = {}
    for block, path in imported(blocks).items():
        for node, _ in norms_in(Graph(graph_of(block))):
            norm = HiddenNorm(block, node)
            where = f"{path}.{norm.name}" if path else norm.name
            found.setdefault(norm.running_mean, (norm, where))
    return dict(found.values())


def with_observed(symbol: Any, norms: Iterable[HiddenNorm]) -> tuple[Any, list[HiddenNorm]]:
    """Append to a graph's outputs the input and output of each call of norms that are its nodes.

    Returns the graph, and the norm of each call.
    """
    by_name = {norm.running_mean.name: norm for norm in norms}
    graph = Graph(symbol)
    calls = [(by_name.get(_read(node)[0]["running_mean"]), node, x) for node, x in norms_in(graph)]
    observed = [(norm, node, x) for norm, node, x in calls if norm is not None]
    for i, (_, node, x) in enumerate(observed):
        pair = [
            Node("BlockGrad", f"observed{i}_{k}", {}, [o]) for k, o in enumerate((x, Output(node)))
        ]
        graph.heads += map(Output, pair)
    return graph.symbol(), [norm for norm, *_ in observed]


def imported(blocks: dict[Block, str]) -> dict[SymbolBlock, str]:
    """Return the blocks that are a graph."""
    return {block: path for block, path in blocks.items() if isinstance(block, SymbolBlock)}


def freeze_hidden(blocks: dict[Block, str], frozen: bool) -> set[Any]:
    """Freeze all norms in graphs, or put them back; return the running means of the changed."""
    graphs = {block: Graph(graph_of(block)) for block in imported(blocks)}
    changed = {block: freeze_graph(graph, frozen) for block, graph in graphs.items()}
    for block, names in changed.items():
        if names:
            set_graph(block, graphs[block].symbol())
    return {block.params[name] for block, names in changed.items() for name in names}


def converted_graph(
    block: SymbolBlock, convert: Callable[[Graph, dict[str, Any]], ConversionReport]
) -> tuple[Any, ConversionReport]:
    """Return the graph of a block with its norms exchanged, and the report; the block stays."""
    graph = Graph(graph_of(block))
    report = convert(graph, {name: _Value(p) for name, p in block.params.items()})
    return graph.symbol(), report


class _Value:
    """What a conversion asks of a parameter's value; a shape that is not known is like any."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter
        self.dtype = np.dtype(parameter.dtype)
        shape = parameter.shape or (0,)
        self.shape = tuple(shape) if min(shape) > 0 or len(shape) > 1 else (0,)

    def asnumpy(self) -> np.ndarray:
        values = values_of(self._parameter)
        return values[0].asnumpy() if values else np.zeros(0)


def hidden_states(blocks: Iterable[Block]) -> list[Any]:
    """Return the running statistics in the graphs of blocks that have no layers."""
    return [
        block.params[name]
        for block in blocks
        if isinstance(block, SymbolBlock)
        for name in graph_of(block).list_auxiliary_states()
    ]


def out_of_reach(graph: Graph) -> list[str]:
    """Name the norms in a graph that do not say what they are: in a loop, of a variant."""
    reached = {node for node, _ in norms_in(graph)}
    described = {description_of(node)["running_mean"] for node in reached if ends_layer(node)}
    nodes = graph.nodes()
    loops = [
        node.name
        for node in nodes
        if MARKER in node.body or any(node.holds(op) for op in BATCH_NORM_OPERATORS)
    ]
    builtin = [n.name for n in nodes if n.op in BATCH_NORM_OPERATORS and n not in reached]
    return loops + builtin + [name for name in running_means(graph) if name not in described]


def warn_of_hidden(blocks: dict[Block, str], outcome: str) -> None:
    """Warn the caller's caller of norms in graphs that "were not frozen", say."""
    for block, path in imported(blocks).items():
        names = out_of_reach(Graph(graph_of(block)))
        if names:
            warn(
                f"{path or 'the net'} ({type(block).__name__}): {len(names)} batch normalizations "
                f"in its graph do not tell their options and {outcome}: {', '.join(names[:3])}"
                f"{' ...' if len(names) > 3 else ''}",
                UserWarning,
                stacklevel=3,
            )
