"""Where a comparison is made: the backends that can be had, versions, processor and date."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np

from .. import __version__, native
from ..backends import BACKENDS, use_backend

_FACTS = ("kernel", "scratchbn", "mxnet", "numpy", "Python", "CPU", "date")


def backends_at_hand() -> list[str]:
    """Return the names of the backends that can be had without building anything.

    Returns
    -------
    list of str
        Of :data:`scratchbn.backends.BACKENDS`, in its order.
    """
    return [name for name in BACKENDS if name != "native" or native.available()]


def check_backends(names: Sequence[str]) -> list[str]:
    """Return the names, each once; an error names one that is unknown or cannot be had."""
    if isinstance(names, str) or not names:
        raise ValueError(f"backends must be a sequence of {', '.join(BACKENDS)}, got {names!r}")
    for name in names:
        with use_backend(name):
            pass
    return list(dict.fromkeys(names))


def facts() -> dict[str, str]:
    """Return versions, processor, date, and whether 'auto' has a compiled kernel, by name."""
    kernel = "built" if native.available() else "not built"
    return dict(zip(_FACTS, (kernel, *_machine(), time.strftime("%Y-%m-%d"))))


def described(settings: Mapping[str, Any]) -> str:
    """Return the backends, versions, processor and date among the settings of a report."""
    named = settings.get("backends") or [settings[k] for k in ("backend",) if k in settings]
    parts = [f"backend {', '.join(named)}"] if named else []
    parts += [f"{name} {settings[name]}" for name in _FACTS[:-1] if name in settings]
    return "; ".join([*parts, *(str(settings[k]) for k in _FACTS[-1:] if k in settings)])


def undescribed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `described` leaves out."""
    told = {"backend", "backends", *_FACTS}
    return {name: value for name, value in settings.items() if name not in told}


@functools.cache
def _machine() -> tuple[str, ...]:
    versions = (__version__, mx.__version__, np.__version__)
    return (*versions, platform.python_version(), _processor())


def _processor() -> str:
    """Return the name of the processor, as Linux knows it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
