"""Read what the stand-ins noted down: launches, library calls and copies, and what they touched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What a card executes; the rest of the kinds is said about it.
WORK = ("KERNEL", "LAUNCH", "CALL", "COPY", "SET")


@dataclass(frozen=True)
class Entry:
    """A line of the journal.

    Attributes
    ----------
    kind : str
        KERNEL (of the wheel), LAUNCH (of a module), CALL (of a library), COPY, SET; MODE (cuBLAS's
        math mode), MODULE (loaded), MARK (written by a scene), MISSING, REFUSED (a launch that a
        card would refuse).
    name : str
        What was called, as the library knows it.
    details : str
        Sizes and modes, as ``key=value``.
    touched : tuple of (int, bool)
        Addresses, and whether each is declared to be read only.
    signature : str
        The kernel's declaration.
    """

    kind: str
    name: str
    details: str = ""
    touched: tuple[tuple[int, bool], ...] = ()
    signature: str = ""

    def detail(self, key: str) -> int | None:
        """Return a number among the details, or None."""
        found = re.search(rf"\b{key}=(\d+)", self.details)
        return int(found[1]) if found else None

    def short(self) -> str:
        """Return what was executed, without its arrays and its grid."""
        if self.kind not in ("KERNEL", "LAUNCH"):
            return f"{self.name} {self.details}".strip()
        found = re.search(r"set_to_int<\d+>|FusedKernel_\w+|saveto.*ScalarExp", self.signature)
        return found[0] if found else (self.signature or self.name).partition("(")[0]


def parse(text: str) -> list[Entry]:
    """Parse a journal; an unfinished last line, of a process that died, is left out."""
    entries = []
    for line in text.split("\n")[:-1]:
        kind, name, details, pointers, signature = (line.split("\t", 4) + [""] * 5)[:5]
        touched = tuple(map(_pointer, pointers.split()))
        entries.append(Entry(kind, name, details, touched, signature))
    return entries


def _pointer(text: str) -> tuple[int, bool]:
    read_only = text.startswith("c")
    address = text[1:] if read_only else text
    return (0 if address == "(nil)" else int(address, 16)), read_only


def between(entries: Iterable[Entry], start: str, end: str) -> list[Entry]:
    """Return what lies between two marks.

    Raises ValueError if one of them is not there.
    """
    entries = list(entries)
    marks = {entry.name: i for i, entry in enumerate(entries) if entry.kind == "MARK"}
    for mark in (start, end):
        if mark not in marks:
            raise ValueError(f"no mark {mark!r} in the journal, there are {sorted(marks)}")
    return entries[marks[start] + 1 : marks[end]]


def work(entries: Iterable[Entry]) -> list[Entry]:
    """Return what a card would execute."""
    return [entry for entry in entries if entry.kind in WORK]


def accesses(entries: Iterable[Entry], address: int) -> str:
    """Write down in which order an array is read (R), written (W), or one of both (B).

    Fused kernels write to arrays of their own only. The wheel's kernels write to what is not
    declared const or, where nothing is, to the first pointer; those that broadcast to the last, and
    the one behind the running statistics to the first two. What others do with a pointer that is
    not const cannot be known.
    """
    letters = ""
    for entry in work(entries):
        positions = [i for i, (where, _) in enumerate(entry.touched) if where == address]
        if positions:
            letters += _access(entry, positions)
    return letters


def _access(entry: Entry, positions: list[int]) -> str:
    declared = [read_only for _, read_only in entry.touched]
    if entry.kind == "LAUNCH":
        fused = entry.signature.startswith("FusedKernel_")
        return "R" if fused or all(declared[i] for i in positions) else "B"
    if "SGDMomKernel" in entry.signature:
        writes = min(positions) < 2
    elif "binary_broadcast_kernel" in entry.signature:
        writes = positions[-1] == len(declared) - 1
    elif any(declared):
        writes = not all(declared[i] for i in positions)
    else:
        writes = positions[0] == 0
    return "W" if writes else "R"


def order_problem(letters: str, writes: int = 1) -> str | None:
    """Say what is wrong with how running statistics are read and written in a forward.

    Each call of the layer writes once, and nothing reads after the last write: it would see what
    the next batch is to see.
    """
    written = letters.count("W") + letters.count("B")
    if written != writes:
        return f"written {written} times, not {writes}: {letters or 'never touched'}"
    if letters[-1] == "R":
        return f"read after it was written: {letters}"
    return None
