"""Batch normalization in the graph of a ``SymbolBlock``, where there are no layers: count, warn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from warnings import warn

from mxnet.gluon import Block, SymbolBlock

from ._net import BATCH_NORM_OPERATORS, graph_of


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
