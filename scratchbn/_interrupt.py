"""Ctrl-C while a command still imports what it needs: the process ends at once, in silence.

An exception would be a traceback from the middle of an import, or be lost in a library. Imported
before all else, which alone takes half a second, and of effect in the package's commands only.
"""

from __future__ import annotations

import os.path
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def end_in_silence() -> None:
    """Have Ctrl-C end the process, unless somebody has chosen what it does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> bool:
    """Have Ctrl-C raise KeyboardInterrupt again; tell whether it did not."""
    silent = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if silent:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return silent


@contextmanager
def importing() -> Iterator[None]:
    """Import in the middle of a command, where imports take seconds."""
    if not is_command():
        yield
        return
    end_in_silence()
    try:
        yield
    finally:
        raise_again()


def is_command() -> bool:
    """Tell whether the process is ``scratchbn`` or ``python -m scratchbn``."""
    given = _command_line()
    module = given[given.index("-m") + 1 :][:1] if "-m" in given else []
    script = (getattr(sys, "argv", None) or [""])[0]
    return module == ["scratchbn"] or os.path.basename(script) == "scratchbn"


def _command_line() -> list[str]:
    """Return what the process was started with, which Python 3.9 does not tell."""
    told: list[str] | None = getattr(sys, "orig_argv", None)
    if told is not None:
        return told
    try:
        with open("/proc/self/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().split("\0")[:-1]
    except OSError:
        return []


if is_command():
    end_in_silence()
