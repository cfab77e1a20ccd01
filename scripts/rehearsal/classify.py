"""What a failed test says: that a number is wrong, as it must be here, or that something broke."""

from __future__ import annotations

import re

NUMBERS, BROKEN = "numbers", "broken"

# An assertion about these is not about the values in an array.
_NOT_A_NUMBER = re.compile(
    r"\.(shape|dtype|ctx|context|stype|ndim)\b|\btype\(|isinstance\(|returncode|list_\w+\(|\.op\b"
)
# numpy.testing refuses to compare arrays of different shapes and types.
_MISMATCH = re.compile(r"\((shapes|dtype) .+ mismatch\)")
# How the tests report a child process that failed: see helpers.last_json.
_CHILD = re.compile(r"exit (-?\d+)\n")
_RAISED = re.compile(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Warning|Exit|Interrupt))\b", re.M)


def classify(error: BaseException, statement: str = "") -> str:
    """Return NUMBERS if nothing but values can be wrong, else BROKEN.

    Parameters
    ----------
    error : BaseException
        What the test raised.
    statement : str
        The source of the statement that raised it.
    """
    parts = getattr(error, "exceptions", None)
    if parts:  # hypothesis found several
        return NUMBERS if all(classify(part, statement) == NUMBERS for part in parts) else BROKEN
    if not isinstance(error, AssertionError):
        return BROKEN
    text = str(error)
    child = _CHILD.match(text)
    if child is not None:
        raised = _RAISED.findall(text)
        return NUMBERS if child[1] == "1" and raised[-1:] == ["AssertionError"] else BROKEN
    if _MISMATCH.search(text) or _NOT_A_NUMBER.search(statement):
        return BROKEN
    return NUMBERS
