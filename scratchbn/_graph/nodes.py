"""A symbol as nodes that can be rewired, read from its JSON and written back to it."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mxnet as mx

RANK_VARIES = "the rank of its input depends on lengths"  # of what reads from `without_rank`


class Output(NamedTuple):
    """One output of a node. Of a variable that is written to, `version` counts the writes."""

    node: Node
    number: int = 0
    version: int = 0


@dataclass(eq=False)
class Node:
    """An operator, or a variable if `op` is "null". `rest` is JSON that is only carried along."""

    op: str
    name: str
    attrs: dict[str, str] = field(default_factory=dict)
    inputs: list[Output] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def is_variable(self) -> bool:
        """Whether this is an input or a parameter."""
        return self.op == "null"

    @property
    def body(self) -> str:
        """The JSON of the graphs inside this node, which loops have."""
        return json.dumps(self.rest.get("subgraphs", ()))

    def holds(self, op: str) -> bool:
        """Tell whether there is an operator in the body of this loop."""
        return f'"op": "{op}"' in self.body

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean attribute."""
        return self.attrs.get(name, str(default)) in ("True", "1", "true")

    def integer(self, name: str, default: int) -> int:
        """Return an attribute that is an integer."""
        return int(self.attrs.get(name, default))

    def number(self, name: str, default: float) -> float:
        """Return an attribute that is a number."""
        return float(self.attrs.get(name, default))

    def integers(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is a shape; () if it is not given, or None."""
        value = literal_eval(self.attrs.get(name, "()"))
        return (value,) if isinstance(value, int) else tuple(value or ())


def plain_numbers(attrs: Mapping[str, str]) -> dict[str, str]:
    """Return attributes without the ``L`` that Python 2 wrote after a long, as in ``(3L, 3L)``.

    >>> plain_numbers({"kernel": "(3L, 3L)", "num_filter": "64L", "name": "LeNet5L"})
    {'kernel': '(3, 3)', 'num_filter': '64', 'name': 'LeNet5L'}
    """
    return {k: v.replace("L", "") if _LONGS.fullmatch(v) else v for k, v in attrs.items()}


_LONGS = re.compile(r"[\s(\[]*-?\d+L?(?:\s*,\s*-?\d+L?)*[\s,)\]]*")


class Graph:
    """A symbol as nodes that can be rewired, with the casts of AMP unless `amp_casts` is False."""

    def __init__(self, symbol: Any, *, amp_casts: bool = True) -> None:
        document = json.loads(symbol.tojson(remove_amp_cast=not amp_casts))
        nodes: list[Node] = []
        for raw in document["nodes"]:
            attrs = plain_numbers(raw.pop("attrs", {}))
            known = {"op": raw.pop("op"), "name": raw.pop("name"), "attrs": attrs}
            inputs = [Output(nodes[i], *more) for i, *more in raw.pop("inputs")]
            nodes.append(Node(**known, inputs=inputs, rest=raw))
        self.heads = [Output(nodes[i], *more) for i, *more in document["heads"]]
        self._attrs = document["attrs"]

    def nodes(self, heads: Iterable[Output] | None = None) -> list[Node]:
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
                stack.extend((source.node, False) for source in reversed(node.inputs))
        return order

    def variables(self) -> dict[str, Node]:
        """Return inputs and parameters by name."""
        return {node.name: node for node in self.nodes() if node.is_variable}

    def used(self) -> list[Output]:
        """Return each output as often as it is used, as a head too."""
        return [*(source for node in self.nodes() for source in node.inputs), *self.heads]

    def uses(self) -> Counter[Node]:
        """Count how often the outputs of each node are used."""
        return Counter(output.node for output in self.used())

    def without_rank(self) -> set[Node]:
        """Return the nodes whose output has more axes or fewer as lengths of the inputs change.

        They are behind a squeeze of whichever axes have length 1.
        """
        found: set[Node] = set()
        for node in self.nodes():
            behind = any(source.node in found for source in node.inputs)
            if _squeezes_any(node) or (behind and not _states_rank(node)):
                found.add(node)
        return found

    def symbol(self, heads: list[Output] | None = None) -> Any:
        """Return the graph as a Symbol, with other heads if given."""
        heads = heads or self.heads
        nodes = self.nodes(heads)
        position = {node: i for i, node in enumerate(nodes)}

        def reference(output: Output) -> list[int]:
            return [position[output.node], output.number, output.version]

        def written(node: Node) -> dict[str, Any]:
            inputs = [reference(source) for source in node.inputs]
            return {"op": node.op, "name": node.name, "attrs": node.attrs, "inputs": inputs}

        document = {
            "nodes": [{**written(node), **node.rest} for node in nodes],
            "arg_nodes": [i for i, node in enumerate(nodes) if node.is_variable],
            "heads": [reference(head) for head in heads],
            "attrs": self._attrs,
        }
        return mx.sym.load_json(json.dumps(document))

    def replace(self, replacements: Mapping[Output, Output]) -> None:
        """Rewire whoever uses an output to its replacement, which may be replaced in turn."""

        def resolve(output: Output) -> Output:
            while output in replacements:
                output = replacements[output]
            return output

        for node in self.nodes():
            node.inputs = [resolve(source) for source in node.inputs]
        self.heads = [resolve(head) for head in self.heads]


def _squeezes_any(node: Node) -> bool:
    return node.op in ("squeeze", "_np_squeeze") and node.attrs.get("axis", "None") == "None"


def _states_rank(node: Node) -> bool:
    """Tell whether an operator's output has the same number of axes whatever its input has."""
    if node.op == "Reshape":
        shape = node.integers("shape")
        return bool(shape) and min(shape) >= -1
    if node.op == "FullyConnected":
        return node.flag("flatten", True)
    return node.op in ("Convolution", "Deconvolution", "Flatten")
