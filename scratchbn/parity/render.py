"""A report for people: text for a terminal, HTML for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from .._text import table
from .._writing import PathLike
from ..environment.install import install_command

Table = tuple[list[str], list[list[str]], str]  # header, lines, what was left out


def text(verdict: str, shown: Table, notes: Sequence[str]) -> str:
    """Return a verdict, a table and notes as plain text."""
    header, lines, more = shown
    parts = [verdict, indent(table(header, lines), "  ")]
    parts += [f"  {more}"] if more else []
    return "\n".join([*parts, *(f"  note: {note}" for note in notes)])


def page(template: str, *folders: PathLike, **content: Any) -> str:
    """Fill in a template of this folder, or of others, which may extend those of this one."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(f"HTML needs jinja2: {install_command('report')}") from error
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**content)
