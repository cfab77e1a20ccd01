"""What NVRTC compiled: whether code for float64 computes in float32 somewhere."""

from __future__ import annotations

import re
import struct

_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.]*\.f32[\w.]*)\s", re.MULTILINE)
_CONSTANT = re.compile(r"\b0d([0-9A-Fa-f]{16})\b")
_DIGITS_OF_FLOAT32 = range(17, 25)


def is_double(ptx: str) -> bool:
    """Tell whether a module computes in float64 at all."""
    return re.search(r"\.f64\b", ptx) is not None


def float32_instructions(ptx: str) -> list[str]:
    """Return the instructions on float32, conversions included, each once, in order."""
    return list(dict.fromkeys(_INSTRUCTION.findall(ptx)))


def rounded_constants(ptx: str) -> list[float]:
    """Return the float64 constants that were rounded to float32 first, as 0.9f is.

    Such a constant has no bit set below those of a float32 and has most of a float32's: 0.5, 3 and
    1024 have few significant bits, and 0.9 has more.
    """
    found = []
    for digits in dict.fromkeys(_CONSTANT.findall(ptx)):
        bits = int(digits, 16)
        mantissa = (bits & (1 << 52) - 1) | 1 << 52
        significant = 53 - ((mantissa & -mantissa).bit_length() - 1)
        if significant in _DIGITS_OF_FLOAT32:
            found.append(struct.unpack(">d", bytes.fromhex(digits))[0])
    return found


def float64_problems(ptx: str) -> list[str]:
    """Say where a module that computes in float64 loses digits; nothing of one that does not."""
    if not is_double(ptx):
        return []
    problems = [f"instruction {name}" for name in float32_instructions(ptx)]
    return problems + [f"constant {value!r}" for value in rounded_constants(ptx)]
