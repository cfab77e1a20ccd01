"""Text for people: tables, and what an MXNet error says."""

from __future__ import annotations

import re
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
