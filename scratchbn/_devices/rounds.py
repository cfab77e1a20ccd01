"""Rounds: each device of a layer brings a value and takes everyone's, or learns who is missing."""

from __future__ import annotations

import os
import threading
import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from .._checks import check_number

TIMEOUT = "SCRATCHBN_SYNC_TIMEOUT"
_RANGE = "greater than 0 and at most 86400 seconds"


def check_timeout(value: Any) -> float:
    """Return a number of seconds to wait."""
    return check_number("timeout", value, 1e-3, 86400, _RANGE)


def default_timeout() -> float:
    """Return the seconds to wait that the environment names, else 60."""
    text = os.environ.get(TIMEOUT) or "60"
    try:
        return check_timeout(float(text))
    except ValueError as error:
        raise ValueError(f"{TIMEOUT} must be {_RANGE}, got {text!r}") from error


class MissingDevice(Exception):
    """The text says which layer waited, who came and who did not."""


@dataclass(eq=False)
class Round:
    """One call of a layer on all devices, and the backwards of that call.

    `called` are the devices that Python has called, in order; `brought` holds what they brought to
    the forward (step 0) and to each backward.
    """

    name: str
    size: int
    devices: tuple[str, ...]
    called: list[str] = field(default_factory=list)
    brought: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    failure: str | None = None

    def told(self, step: int, seconds: float) -> str:
        """Say who is here and who is not."""
        here = sorted(self.brought[step])
        known = self.devices or tuple(self.called)
        absent = [d for d in known if d not in here]
        if not step:
            absent = [f"{d} ({'' if d in self.called else 'not '}called)" for d in absent]
        more = self.size - len(here) - len(absent)
        absent += [f"{more} more"] if more > 0 else []
        which = "backward" if step else "forward"
        return (
            f"{self.name} shares its statistics over {self.size} devices; in the {which} of a "
            f"training step there came {', '.join(here)}, and {', '.join(absent)} did not within "
            f"{seconds:g} s. Call the net, and then backward, on every device before you read a "
            "result of any"
        )


@dataclass(frozen=True, eq=False)
class Seat:
    """The place of one device in a round."""

    rounds: Rounds
    round: Round
    device: str
    timeout: float

    def meet(self, step: int, value: Any) -> list[Any]:
        """Bring a value, and return those of all devices, in the same order on each of them.

        Raises
        ------
        MissingDevice
            If not all devices came in time, to this step or to an earlier one.
        """
        round_, changed = self.round, self.rounds.changed
        with changed:
            here = round_.brought[step]
            here[self.device] = value
            changed.notify_all()
            changed.wait_for(lambda: round_.failure or len(here) == round_.size, self.timeout)
            if len(here) < round_.size and not round_.failure:
                self.rounds.fail(round_, round_.told(step, self.timeout))
            if len(here) < round_.size:
                raise MissingDevice(round_.failure)
            return [here[device] for device in sorted(here)]

    def leave(self, why: str) -> None:
        """End the round for all its devices."""
        self.rounds.fail(self.round, why)


class Rounds:
    """The rounds of all layers in this process."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.used = False
        self._closed: str | None = None
        self._open: dict[Any, list[Round]] = defaultdict(list)
        self._alive: weakref.WeakSet[Round] = weakref.WeakSet()

    def join(
        self, key: Any, name: str, device: str, size: int, devices: tuple[str, ...], timeout: float
    ) -> Seat:
        """Seat a device, when it is called: in the oldest round that it is not part of yet.

        Devices are called in any order and each as often as the others, so the n-th call on one
        belongs to the n-th on another.
        """
        with self.changed:
            self.used = True
            waiting = self._open[key]
            round_ = next((r for r in waiting if device not in r.called), None)
            if round_ is None:
                round_ = Round(name, size, devices, failure=self._closed)
                waiting.append(round_)
                self._alive.add(round_)
            round_.called.append(device)
            if len(round_.called) == size or round_.failure:
                waiting.remove(round_)
            if not waiting:
                del self._open[key]
            return Seat(self, round_, device, timeout)

    def fail(self, round_: Round, text: str) -> None:
        """End a round for all who wait in it; the next call of its layer begins another.

        Those of other layers on the same devices that are not complete end with it: they are what
        the same step has called, and nobody may come to them, as MXNet does not run what depends
        on an error.
        """
        with self.changed:
            round_.failure = round_.failure or text
            for key, waiting in list(self._open.items()):
                for other in waiting:
                    if other.devices == round_.devices:
                        other.failure = other.failure or text
                self._open[key] = [r for r in waiting if not r.failure]
                if not self._open[key]:
                    del self._open[key]
            self.changed.notify_all()

    def abandon(self, why: str) -> None:
        """End all rounds that wait for a device."""
        with self.changed:
            for round_ in list(self._alive):
                self.fail(round_, f"{round_.name}: {why}")

    def close(self, why: str) -> None:
        """End all rounds, and those that are still to come at once."""
        self._closed = why
        self.abandon(why)


rounds = Rounds()


def _forget_parent() -> None:
    rounds.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_forget_parent)
