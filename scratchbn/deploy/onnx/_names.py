"""Names in an ONNX file: the net's own, each once."""

from __future__ import annotations

from collections.abc import Iterable


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
