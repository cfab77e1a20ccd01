"""What command lines share: an error is one line, numbers have bounds."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from . import _interrupt
from ._text import reflowed


class Paragraphs(argparse.HelpFormatter):
    """Fills paragraphs of a description to the width of the terminal; lists stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = textwrap.dedent(text).strip().split("\n\n")
        return "\n\n".join(textwrap.indent(self._fill(part, width), indent) for part in parts)

    @staticmethod
    def _fill(part: str, width: int) -> str:
        is_list = "\n " in part
        return reflowed(part, width) if is_list else textwrap.fill(" ".join(part.split()), width)


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage, and knows no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": Paragraphs, **options})

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def guarded(program: str, run: Callable[[], int]) -> int:
    """Run a command; Ctrl-C is one line, and a reader that has read enough, as `head`, is none.

    Returns its exit status, or 128 and the number of the signal. Where Ctrl-C ended the process in
    silence before, it does so again after: what Python and MXNet do at the end takes time too.
    """
    silent = _interrupt.raise_again()
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if silent:
            _interrupt.end_in_silence()


def fail(program: str, status: int, message: str) -> int:
    """Print an error as one line; return the exit status."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of an option that is an integer between two bounds."""
    bounds = f"at least {least}" if most is None else f"between {least} and {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    """Parse an option that is a positive number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
    return value


def named_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse an option that gives the shape of an input."""
    name, _, lengths = text.partition("=")
    try:
        shape = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        shape = ()
    if not name or not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected NAME=N,C,... as data=1,3,224,224, got {text!r}")
    return name, shape


def add_job(add_argument: Callable[..., Any]) -> None:
    """Add the options of a job on this machine, and its program with arguments."""
    for name, count in (("workers", 2), ("servers", 1)):
        add_argument(
            f"--{name}", type=integer(1), default=count, metavar="N", help="default: %(default)s"
        )
    add_argument("program", nargs="+", metavar="command", help="the command, after --")
