"""Names in an ONNX file: the net's own, each once."""

from __future__ import annotations

from collections.abc import Iterable

from ..._graph.nodes import Graph


class Names:
    """Gives out names, none twice.

    >>> names = Names(["data"])
    >>> names.unique("relu"), names.unique("relu"), names.unique("data")
    ('relu', 'relu_1', 'data_1')
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def unique(self, name: str) -> str:
        """Return the name, with a number if it is taken."""
        free, count = name, 0
        while free in self._taken:
            count += 1
            free = f"{name}_{count}"
        self._taken.add(free)
        return free


def name_once(graph: Graph) -> Names:
    """Give every operator a name of its own: a layer that is called twice has one name in MXNet."""
    nodes = graph.nodes()
    names = Names(node.name for node in nodes if node.is_variable)
    for node in nodes:
        if not node.is_variable:
            node.name = names.unique(node.name or node.op.strip("_").lower())
    return names
