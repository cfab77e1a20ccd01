"""An error in an operator of ours -> an MXNetError with its text, where the result is read.

MXNet forgets what a Python exception in a custom operator says, and mixes up those of two that
fail together. An error of a stock operator travels with the array it should have computed, to
whoever waits for it. So what failed is written as the result of a Cholesky decomposition that
cannot be: MXNet's error then tells the order of the minor that is not positive, which we choose,
and by which the text is found again when the MXNetError is made.

MXNet 1.9.1 keeps the errors of all devices in one list that nothing locks
(``AddToGlobalExceptions`` in ``src/engine/threaded_engine.h``). Two devices that add theirs at one
moment leave half a pointer in it, and the next ``waitall`` dies of it. So devices that fail
together take turns.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.base import error_types

from .._graph.arrays import Array, to_classic

_orders = itertools.cycle(range(101, 201))
_texts: dict[int, str] = {}
_APART = 0.05  # seconds: what an error does to the operators behind it takes less
_FAILED = re.compile(r"\((\d+) vs\. 0\) : [sd]potrf failed")


class _Turns:
    """One device after the other, with time between for what follows from its error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[float, mx.Context] | None = None

    @contextmanager
    def of(self, device: mx.Context) -> Iterator[None]:
        """Wait for the device before this one: the time, and what its thread has begun by then."""
        with self._lock:
            if self._last is not None:
                ended, before = self._last
                time.sleep(max(0.0, ended + _APART - time.monotonic()))
                mx.nd.zeros((1,), ctx=before).wait_to_read()
            yield
            self._last = time.monotonic(), device


_turns = _Turns()
os.register_at_fork(after_in_child=_turns.__init__)  # type: ignore[misc]


def put_error(arrays: list[Array], text: str) -> None:
    """Give arrays of one device an error in the place of values, apart from those of others."""
    if not arrays:
        return
    with _turns.of(arrays[0].ctx):
        order = next(_orders)
        _texts[order] = text
        matrix = np.eye(order)
        matrix[-1, -1] = -1
        failed = mx.nd.linalg.potrf(mx.nd.array(matrix, ctx=mx.cpu(), dtype="float64"))
        failed = mx.nd.sum(failed).reshape((1,))
        for array in map(to_classic, arrays):
            mx.nd.broadcast_to(failed.astype(array.dtype), shape=array.shape).copyto(array)


def _with_text(create: Any) -> Any:
    def created(text: str) -> Exception:
        found = _FAILED.search(text)
        ours = _texts.get(int(found[1])) if found else None
        return create(ours or text)

    return created


mx.error.register("MXNetError", _with_text(error_types.get("MXNetError", mx.MXNetError)))
