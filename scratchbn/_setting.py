"""A choice that a thread makes for itself, else the process, else the environment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Setting(Generic[Value]):
    """One choice; `default` reads the environment, each time nobody has chosen."""

    def __init__(self, default: Callable[[], Value]) -> None:
        self._default = default
        self._everywhere: Value | None = None
        self._here = threading.local()

    def get(self) -> Value:
        """Return what holds for this thread."""
        here: Value | None = getattr(self._here, "value", None)
        chosen = self._everywhere if here is None else here
        return self._default() if chosen is None else chosen

    def set(self, value: Value) -> None:
        """Choose for every thread, from now on."""
        self._everywhere = value

    @contextmanager
    def use(self, value: Value) -> Iterator[None]:
        """Choose for this thread, inside a ``with`` block."""
        before = getattr(self._here, "value", None)
        self._here.value = value
        try:
            yield
        finally:
            self._here.value = before
