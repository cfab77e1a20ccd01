"""A symbol as nodes that can be rewired, read from its JSON and written back to it."""

from __future__ import annotations

import json
from ast import literal_eval
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mxnet as mx


class Entry(NamedTuple):
    """One output of a node. Of a variable that is written to, `version` counts the writes."""

    node: Node
    output: int = 0
    version: int = 0


@dataclass(eq=False)
class Node:
    """An operator, or a variable if `op` is "null". `rest` is JSON that is only carried along."""

    op: str
    name: str
    attrs: dict[str, str] = field(default_factory=dict)
    inputs: list[Entry] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean attribute."""
        return self.attrs.get(name, str(default)) in ("True", "1", "true")

    def integers(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is a shape; () if it is not given."""
        value = literal_eval(self.attrs.get(name, "()"))
        return (value,) if isinstance(value, int) else tuple(value)


class Graph:
    """A symbol as nodes that can be rewired.

    Parameters
    ----------
    symbol : Symbol
    """

    def __init__(self, symbol: Any) -> None:
        document = json.loads(symbol.tojson())
        nodes: list[Node] = []
        for raw in document["nodes"]:
            known = {"op": raw.pop("op"), "name": raw.pop("name"), "attrs": raw.pop("attrs", {})}
            inputs = [Entry(nodes[i], *more) for i, *more in raw.pop("inputs")]
            nodes.append(Node(**known, inputs=inputs, rest=raw))
        self.heads = [Entry(nodes[i], *more) for i, *more in document["heads"]]
        self._attrs = document["attrs"]

    def nodes(self, heads: Iterable[Entry] | None = None) -> list[Node]:
        """Return the nodes that the heads (or others) depend on, each after its inputs."""
        order: list[Node] = []
        seen: set[Node] = set()
        stack = [(head.node, False) for head in reversed(list(heads or self.heads))]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((entry.node, False) for entry in reversed(node.inputs))
        return order

    def variables(self) -> list[str]:
        """Return the names of inputs and parameters."""
        return [node.name for node in self.nodes() if node.op == "null"]

    def uses(self) -> Counter[Node]:
        """Count how often an output of each node is used, as a head too."""
        entries = [entry for node in self.nodes() for entry in node.inputs]
        return Counter(entry.node for entry in (*entries, *self.heads))

    def symbol(self, heads: list[Entry] | None = None) -> Any:
        """Return the graph as a Symbol, with other heads if given."""
        heads = heads or self.heads
        nodes = self.nodes(heads)
        number = {node: i for i, node in enumerate(nodes)}

        def reference(entry: Entry) -> list[int]:
            return [number[entry.node], entry.output, entry.version]

        document = {
            "nodes": [
                {
                    "op": node.op,
                    "name": node.name,
                    "attrs": node.attrs,
                    "inputs": [reference(entry) for entry in node.inputs],
                    **node.rest,
                }
                for node in nodes
            ],
            "arg_nodes": [i for i, node in enumerate(nodes) if node.op == "null"],
            "heads": [reference(entry) for entry in heads],
            "attrs": self._attrs,
        }
        return mx.sym.load_json(json.dumps(document))

    def replace(self, replacements: Mapping[Entry, Entry]) -> None:
        """Rewire whoever uses an entry to its replacement, which may be replaced in turn."""

        def resolve(entry: Entry) -> Entry:
            while entry in replacements:
                entry = replacements[entry]
            return entry

        for node in self.nodes():
            node.inputs = [resolve(entry) for entry in node.inputs]
        self.heads = [resolve(entry) for entry in self.heads]
