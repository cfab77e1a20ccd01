"""Names of nodes: each its own in a graph, and the last one of a layer known by its name."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from mxnet.name import NameManager

from .arrays import Array
from .trace import current

# The attribute of the last node of a layer, whatever the node is called in a file.
LAST = "__last_of_layer__"


class DistinctNames(NameManager):
    """Gives no name twice in a graph, inside a ``with`` block.

    Gluon counts the nodes of a layer from 0 in every call, so that those of two calls would share
    their names. Here the second call goes on where the first one stopped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken = current().names

    def get(self, name: str | None, hint: str) -> str:
        """Return a name for a node: `name` itself, else `hint` with the next free number."""
        if name is not None:
            return self._outer(name, hint)
        return self._first_free(self._outer(None, hint) for _ in count())

    def name_last(self, y: Array, name: str) -> None:
        """Give the node that computed `y` a name; on further calls in a graph a number too."""
        numbered = (self._outer(f"{name}{number or ''}", name) for number in count())
        y._set_attr(name=self._first_free(numbered), **{LAST: "True"})

    def _outer(self, name: str | None, hint: str) -> str:
        return str(self._old_manager.get(name, hint))

    def _first_free(self, names: Iterable[str]) -> str:
        free = next(name for name in names if name not in self._taken)
        self._taken.add(free)
        return free
