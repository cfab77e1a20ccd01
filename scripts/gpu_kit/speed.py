"""The operator's bandwidth beside that of a copy and of another library's batch normalization."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from .numbers import make_state
from .operator import Operator
from .steps import TRAINING, Arrays, backward, forward, gradients_for, outputs_for

Call = Callable[[], Any]

PASSES = {"forward": 3, "backward": 5}  # over the array, reading or writing
CHANNELS, SIDE = 64, 56
LARGE = 32  # MiB from which bandwidth counts
_REPEATS, _WARM = 9, 3
_MOST, _LONG = 30, 5e-3  # calls that are timed together, and seconds that they are to take


class Clock(Protocol):
    """Times work that a device does later than it is told to."""

    def seconds(self, calls: list[Call]) -> float:
        """Return how long the device takes for calls, one after another."""


class Peer(Protocol):
    """A library to compare with."""

    name: str

    def copy(self, to: Any, source: Any) -> None:
        """Copy an array on the device."""

    def batch_norm(self, x: Any, dy: Any, state: dict[str, Any], axis: int) -> tuple[Call, Call]:
        """Return what computes a forward and a backward in training, on the same memory."""


class Measured(NamedTuple):
    """Bandwidths in GB/s, and the ratio of the peer's time to ours, forward and backward."""

    layout: str
    mebibytes: float
    copy: float
    ours: tuple[float, ...]
    peers: tuple[float, ...]

    @property
    def of_copy(self) -> tuple[float, ...]:
        """Our bandwidth over the copy's."""
        return tuple(rate / self.copy for rate in self.ours)

    @property
    def of_peer(self) -> tuple[float, ...]:
        """Our bandwidth over the peer's."""
        return tuple(rate / other for rate, other in zip(self.ours, self.peers))


class EventClock:
    """Times by events of CUDA, put around several calls while the device is kept waiting.

    One call takes the host longer than the device needs for a small array: events around it would
    time the host. So the device sleeps until all calls are on their way.

    Parameters
    ----------
    cuda : module
        ``torch.cuda``, or what does the same.
    now : callable
        Returns the time in seconds.
    """

    def __init__(self, cuda: Any, now: Callable[[], float]) -> None:
        self._cuda, self._now = cuda, now

    def seconds(self, calls: list[Call]) -> float:
        """Return how long the device takes for calls, one after another."""
        before = self._now()
        for call in calls:
            call()
        told = self._now() - before  # what the host needs
        self._cuda.synchronize()
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda._sleep(int(2 * told * 2e9) + 100_000)  # cycles; no card runs at more than 2 GHz
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def seconds(call: Call, clock: Clock) -> float:
    """Return the median time of a call, of several that are timed together."""
    once = clock.seconds([call] * _WARM) / _WARM
    count = min(max(int(_LONG / max(once, 1e-9)), 1), _MOST)
    return statistics.median(clock.seconds([call] * count) / count for _ in range(_REPEATS))


def measure(
    operator: Operator, arrays: Arrays, peer: Peer, clock: Clock, mebibytes: Iterable[float],
    dtype: str,
) -> Iterator[Measured | str]:  # fmt: skip
    """Yield what is measured for each layout and size, or what the device has no memory for."""
    for layout, axis in (("NCHW", 1), ("NHWC", 3)):
        for mebi in mebibytes:
            try:
                yield _measure(operator, arrays, peer, clock, mebi, dtype, layout, axis)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                yield f"{dtype}, {layout}, {mebi:g} MiB: the card has no memory for it."


def _measure(
    operator: Operator, arrays: Arrays, peer: Peer, clock: Clock, mebi: float, dtype: str,
    layout: str, axis: int,
) -> Measured:  # fmt: skip
    size = np.dtype(dtype).itemsize
    samples = max(int(mebi * 2**20 / size / (CHANNELS * SIDE * SIDE)), 1)
    image = (CHANNELS, SIDE, SIDE) if axis == 1 else (SIDE, SIDE, CHANNELS)
    x, dy = (arrays.draw((samples, *image), dtype) for _ in range(2))
    state = make_state(arrays, CHANNELS, dtype, 0.0, TRAINING)
    options = {"axis": axis}
    out, into = outputs_for(operator, arrays, x, options), gradients_for(arrays, x, state)
    calls: tuple[Call, Call] = (
        partial(forward, operator, arrays, x, state, options, out),
        partial(backward, operator, arrays, dy, x, state, out, options, into),
    )
    nbytes = samples * CHANNELS * SIDE * SIDE * size
    copy = 2 * nbytes / seconds(partial(peer.copy, out.y, x), clock) / 1e9
    theirs = peer.batch_norm(x, dy, state, axis)
    ours, peers = (
        tuple(n * nbytes / seconds(f, clock) / 1e9 for n, f in zip(PASSES.values(), pair))
        for pair in (calls, theirs)
    )
    return Measured(layout, nbytes / 2**20, copy, ours, peers)


def heading(peer: str) -> list[str]:
    """Return the first lines of a Markdown table."""
    parts = " | ".join(f"{k} GB/s | of copy | {peer} GB/s | time {peer} / ours" for k in PASSES)
    return [f"| type, layout | MiB | copy GB/s | {parts} |", "| - " * 11 + "|"]


def line(row: Measured, dtype: str) -> str:
    """Return a line of the table."""
    cells = [f"{dtype}, {row.layout}", f"{row.mebibytes:.1f}", f"{row.copy:.0f}"]
    for ours, of_copy, other, of_peer in zip(row.ours, row.of_copy, row.peers, row.of_peer):
        cells += [f"{ours:.0f}", f"{of_copy:.2f}", f"{other:.0f}", f"{of_peer:.2f}"]
    return "| " + " | ".join(cells) + " |"


def verdict(measured: list[Measured], peer: str) -> list[str]:
    """Say whether the arrays that count reach 80% of the copy, and the peer's speed."""
    large = [row for row in measured if row.mebibytes >= 0.9 * LARGE]
    if not large:
        return [f"No array of {LARGE} MiB was measured."]
    said = []
    for i, kind in enumerate(PASSES):
        of_copy = min(row.of_copy[i] for row in large)
        of_peer = min(row.of_peer[i] for row in large)
        said.append(
            f"- {kind}: at least {of_copy:.2f} of the copy's bandwidth, "
            f"{'reached' if of_copy >= 0.8 else 'NOT reached'} (0.80); at least {of_peer:.2f} of "
            f"{peer}'s speed, {'reached' if of_peer >= 1 else 'NOT reached'} (1.00)"
        )
    return [f"At {LARGE} MiB and more:", "", *said]
