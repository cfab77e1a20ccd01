"""Text for people: tables, and what an MXNet error says."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any


def first_line(error: BaseException) -> str:
    """Return what an MXNet error says, without its stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line or "Check failed" in line]
    line = (said or lines or [type(error).__name__])[-1]
    return re.sub(r"\[[\d:]+\] \S+?: |^MXNetError: ", "", line)


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]], *, markdown: bool = False) -> str:
    """Align rows under a header, as plain text or as a Markdown table."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    if markdown:
        cells = [[cell.replace("|", r"\|") for cell in row] for row in cells]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([lines[0], f"|{' --- |' * len(header)}", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def terminal_width() -> int | None:
    """Return how many columns standard output has; None if it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def within(rows: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Align names and texts; texts are wrapped between words, no word is split.

    >>> print(within([("a", "one two three"), ("long", "four")], 13))
    a     one two
          three
    long  four
    """
    indent = max(len(name) for name, _ in rows)
    indent += 2 if indent else 0
    lines = []
    for name, text in rows:
        room = sys.maxsize if width is None else max(1, width - indent)
        parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        lines += [("" if i else name).ljust(indent) + part for i, part in enumerate(parts)]
    return "\n".join(lines)


def reflowed(text: str, width: int | None = None) -> str:
    """Wrap the lines that are too long, between words and with an indent; no word is split.

    >>> print(reflowed("stage1_batchnorm0 folded into stage1_conv0", 30))
    stage1_batchnorm0 folded into
        stage1_conv0
    """
    if width is None:
        return text
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        parts = textwrap.wrap(
            line,
            max(1, width),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [line] if len(line) <= width else parts
    return "\n".join(lines)


def print_fitted(text: str) -> None:
    """Print lines that fit the terminal, at once."""
    print(reflowed(text, terminal_width()), flush=True)


def fitted(header: Sequence[Any], rows: Sequence[Sequence[Any]], width: int | None = None) -> str:
    """Align rows as a table if it fits, else each as lines of its own; no cell is split in a word.

    >>> print(fitted(["layer", "kind"], [["stage1_batchnorm0", "running mean"]], 24))
    stage1_batchnorm0
      kind  running mean
    """
    whole = table(header, rows)
    if width is None or max(map(len, whole.splitlines())) <= width:
        return whole
    blocks = []
    for row in rows:
        named = [(f"  {name}", str(cell)) for name, cell in zip(header[1:], row[1:]) if str(cell)]
        blocks.append(f"{row[0]}\n{within(named, width)}")
    return "\n".join(blocks)


def rich_table(
    title: str, header: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str = ""
) -> Any:
    """Return the same as a ``rich.table.Table``, whose cells are text and not markup."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", caption=caption or None)
    for name in header:
        drawn.add_column(str(name), overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    return drawn
