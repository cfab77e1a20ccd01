"""What `gpu_check.py` prints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .numbers import Reference, check_numbers
from .operator import Operator
from .speed import Clock, Measured, Peer, heading, line, measure, verdict
from .steps import Arrays


def report(
    title: str, operator: Operator, arrays: Arrays, reference: Reference, peer: Peer, clock: Clock,
    mebibytes: Sequence[float], types: Sequence[str], **more: Any,
) -> tuple[str, int]:  # fmt: skip
    """Check and measure, printing each line as it is known; return all, and how much is wrong.

    An error of the device ends it and counts as one that is wrong; what was known is returned.
    """
    start = time.perf_counter()
    lines: list[str] = []

    def say(*several: str) -> None:
        lines.extend(several)
        print(*several, sep="\n", flush=True)

    say(f"# scratchbn on {title}", "", "## Numbers", "")
    wrong = 0
    try:
        rows, wrong = check_numbers(operator, arrays, reference, **more)
        say(*rows, "", f"{wrong} results are wrong." if wrong else "No result is wrong.", "")
        say("## Speed", "")
        for dtype in types:
            say(*heading(peer.name))
            measured, missing = [], []
            for found in measure(operator, arrays, peer, clock, mebibytes, dtype):
                if isinstance(found, Measured):
                    measured.append(found)
                    say(line(found, dtype))
                else:
                    missing.append(f"- {found}")
            say("", *verdict(measured, peer.name), *missing, "")
    except RuntimeError as error:  # of CUDA: nothing works in this process any more
        wrong += 1
        say("", f"It stopped: {error}", "")
    say(f"{time.perf_counter() - start:.0f} s in all.")
    return "\n".join(lines), wrong
