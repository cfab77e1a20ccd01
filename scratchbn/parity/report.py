"""What a comparison found, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._writing import PathLike, write_text
from . import render, where
from .row import Row


@dataclass(frozen=True)
class Report:
    """What a comparison found. True if everything held.

    Attributes
    ----------
    rows : tuple of Row
        Every comparison made.
    settings : dict
        What it was made with.
    notes : tuple of str
        What was left out, and why.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        lines = [self.verdict, *filter(None, [where.described(self.settings)])]
        return render.text("\n  ".join(lines), self.table(), self.notes)

    @property
    def failures(self) -> list[Row]:
        """The rows out of tolerance."""
        return [row for row in self.rows if not row.ok]

    @property
    def verdict(self) -> str:
        """One line: held or failed, and out of how many comparisons."""
        failed = len(self.failures)
        if not self.rows:
            return "nothing was compared"
        return f"failed: {failed} of {len(self.rows)}" if failed else f"held: all {len(self.rows)}"

    def worst(self, key: Callable[[Row], Any]) -> dict[Any, Row]:
        """Return, for each value of `key`, its row with the largest difference.

        Parameters
        ----------
        key : callable
            Takes a Row and returns what to group it by.

        Returns
        -------
        dict
            In the order in which the values first appear. "Largest" is relative to what is
            allowed.
        """
        found: dict[Any, Row] = {}
        for row in self.rows:
            group = key(row)
            if group not in found or row.excess > found[group].excess:
                found[group] = row
        return found

    def table(self, most: int = 40) -> tuple[list[str], list[list[str]], str]:
        """Return the report as a table: a line per tensor, or per case and backend of a grid.

        Parameters
        ----------
        most : int
            Number of lines; if there are more, those with the largest differences are kept.

        Returns
        -------
        header : list of str
        lines : list of list of str
        more : str
            How many lines were left out; empty if none.
        """
        grid = any(row.case for row in self.rows)
        found = self.worst(lambda r: (r.case, r.backend) if grid else (r.kind, r.tensor))
        rows = list(found.values())
        more = ""
        if len(rows) > most:
            rows = sorted(rows, key=lambda r: -r.excess)
            rows, left = rows[:most], rows[most:]
            failed = sum(not row.ok for row in left)
            more = f"and {len(left)} more, {failed or 'none'} of them failed"
        header = ["tensor", "absolute", "relative", "allowed", "", "where"]
        lines = [row.cells() for row in rows]
        if grid:
            header = ["case", "backend", *header]
            lines = [[row.case, row.backend, *cells] for row, cells in zip(rows, lines)]
        return header, lines, more

    @classmethod
    def merge(
        cls, reports: Mapping[str, Report], settings: Mapping[str, Any] | None = None
    ) -> Report:
        """Join the reports of several cases into one.

        Parameters
        ----------
        reports : mapping of str to Report
            By the name of the case.
        settings : mapping, optional
            Of the whole.

        Returns
        -------
        Report
        """
        rows = [replace(row, case=name) for name, report in reports.items() for row in report.rows]
        notes = [f"{name}: {note}" for name, report in reports.items() for note in report.notes]
        return cls(tuple(rows), dict(settings or {}), tuple(notes))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers.

        Returns
        -------
        dict
            ``ok``, whether everything held, and ``settings``, ``notes`` and ``rows``, each row
            with its own ``ok``. Numbers that JSON cannot hold are the strings ``"nan"`` and
            ``"inf"``; a loss among the settings is its name.
        """
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        return {
            "ok": bool(self),
            "settings": _plain(self.settings),
            "notes": list(self.notes),
            "rows": _plain(rows),
        }

    def to_json(self, path: PathLike | None = None) -> str:
        """Return the report as JSON, and write it to a file if a path is given.

        Parameters
        ----------
        path : path, optional
            Replaced as a whole once the text is complete.

        Returns
        -------
        str
            What :meth:`to_dict` returns, with ``held`` in the place of its first ``ok``.
        """
        document = self.to_dict()
        document = {"held": document.pop("ok"), **document}
        return _write(json.dumps(document, indent=1, allow_nan=False), path)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Rebuild a report from what :meth:`to_json` returned.

        Parameters
        ----------
        text : str

        Returns
        -------
        Report

        Raises
        ------
        ValueError
            If `text` is not such a document.
        """
        try:
            document = json.loads(text)
            rows = [_row_from_json(row) for row in document["rows"]]
            return cls(tuple(rows), document["settings"], tuple(document["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"text must be JSON from Report.to_json, got {text[:60]!r}") from error

    def to_html(self, path: PathLike | None = None, title: str = "Parity") -> str:
        """Return the report as one self-contained page, and write it if a path is given.

        Parameters
        ----------
        path : path, optional
            Replaced as a whole once the text is complete.
        title : str
            Heading of the page.

        Returns
        -------
        str
            HTML with a table of the largest differences and one of the failures.

        Raises
        ------
        ImportError
            If jinja2 is not installed.
        """
        tables = {"Largest differences": self.table(most=len(self.rows))}
        if self.failures:
            tables = {"Failures": Report(tuple(self.failures)).table(most=200), **tables}
        page = render.page(
            "page.html",
            title=title,
            held=bool(self),
            verdict=self.verdict,
            made=where.described(self.settings),
            settings=where.undescribed(self.settings),
            notes=self.notes,
            tables=tables,
        )
        return _write(page, path)


def joined(reports: Iterable[Report]) -> Report:
    """Return the rows of several reports, and each of their notes once."""
    reports = list(reports)
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    return Report(tuple(row for report in reports for row in report.rows), notes=tuple(notes))


def _plain(value: Any) -> Any:
    """Return a value made of what JSON knows."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row_from_json(row: dict[str, Any]) -> Row:
    values = {name: value for name, value in row.items() if name != "ok"}
    for name in ("absolute", "relative", "allowed"):
        values[name] = float(values[name])
    values["index"] = None if values["index"] is None else tuple(values["index"])
    return Row(**values)


def _write(text: str, path: PathLike | None) -> str:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return text
