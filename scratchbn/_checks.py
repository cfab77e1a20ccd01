"""Checks of arguments: each returns the value, or says what was given and what would be right."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer that is not a bool."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(value)


def check_number(name: str, value: Any, least: float, most: float, range_text: str) -> float:
    """Return a finite number in a range, and not one that MXNet's operators cannot parse."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not least <= number <= most or math.isinf(number):
        raise ValueError(f"{name} must be {range_text}, got {value!r}")
    if 0 < number < sys.float_info.min:
        raise ValueError(f"{name} must not be subnormal, MXNet's operators refuse it: {value!r}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return a bool; NumPy's is one, 0 and 1 are not."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return one of several words."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_momentum(value: Any) -> float | None:
    """Return a number between 0 and 1, or None."""
    if value is None:
        return None
    return check_number("momentum", value, 0, 1, "between 0 and 1, or None")


def check_epsilon(value: Any) -> float:
    """Return a finite number that is not negative."""
    return check_number("epsilon", value, 0, math.inf, "finite and not negative")
