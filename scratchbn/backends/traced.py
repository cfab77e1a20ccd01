"""What runs a hybridized block, together with the graph that it runs: MXNet's does not tell."""

from __future__ import annotations

from typing import Any


class Traced:
    """Stands in the place of a block's CachedOp, which it calls; a CachedOp by duck typing.

    `trains` is the graph that a call in training runs.
    """

    def __init__(self, own: Any, symbol: Any) -> None:
        self._own = own
        self.trains = symbol

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Run the graph."""
        return self._own(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
