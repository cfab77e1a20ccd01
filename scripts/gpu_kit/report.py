"""What `gpu_check.py` prints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .numbers import Reference, check_numbers
from .operator import Operator
from .speed import Clock, Peer, measure, table, verdict
from .steps import Arrays


def report(
    title: str, operator: Operator, arrays: Arrays, reference: Reference, peer: Peer, clock: Clock,
    mebibytes: Sequence[float], types: Sequence[str], **more: Any,
) -> tuple[str, int]:  # fmt: skip
    """Check and measure, printing each line as it is known; return all, and how much is wrong."""
    start = time.perf_counter()
    lines: list[str] = []

    def say(*several: str) -> None:
        lines.extend(several)
        print(*several, sep="\n", flush=True)

    say(f"# scratchbn on {title}", "", "## Numbers", "")
    rows, wrong = check_numbers(operator, arrays, reference, **more)
    say(*rows, "", f"{wrong} results are wrong." if wrong else "No result is wrong.", "")
    say("## Speed", "")
    for dtype in types:
        measured = list(measure(operator, arrays, peer, clock, mebibytes, dtype))
        say(*table(measured, dtype, peer.name), "", *verdict(measured, peer.name), "")
    say(f"{time.perf_counter() - start:.0f} s in all.")
    return "\n".join(lines), wrong
