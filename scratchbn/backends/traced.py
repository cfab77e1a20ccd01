"""What runs a hybridized block, together with the graph that it runs: MXNet's does not tell."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from .._graph.names import LAST

Hook = Callable[[bytes, bytes, Any], None]


class Traced:
    """Stands in the place of a block's CachedOp, which it calls; a CachedOp by duck typing.

    `trains` is the graph that a call in training runs.
    """

    def __init__(self, own: Any, symbol: Any) -> None:
        self._own = own
        self._symbol = symbol
        self.trains = symbol

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Run the graph."""
        return self._own(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "_own":  # asked for by whoever copies this
            raise AttributeError(name)
        return getattr(self._own, name)

    def _register_op_hook(self, callback: Hook | None, monitor_all: bool = False) -> None:
        """Let a hook see each node; Gluon calls this before each call of the block.

        MXNet numbers the outputs that an operator does not name. Of the last node of a layer the
        hook is told what the output is called in the graph: ``<layer>_fwd_output``.
        """
        self._own._register_op_hook(callback and self._renaming(callback), monitor_all)

    def _renaming(self, callback: Hook) -> Hook:
        def called(name: bytes, operator: bytes, array: Any) -> None:
            callback(self._names_of_layers.get(name, name), operator, array)

        return called

    @cached_property
    def _names_of_layers(self) -> dict[bytes, bytes]:
        """The names that a hook of MXNet has for outputs of layers, and those it should have."""
        layers = [node for node, attrs in self._symbol.attr_dict().items() if LAST in attrs]
        return {f"{name}_0".encode(): f"{name}_output".encode() for name in layers}
