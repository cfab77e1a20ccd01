"""A file of records that is complete after every step: CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._writing import PathLike, check_directory
from .records import FIELDS, Record


class LineFile:
    """A file with a line for each record."""

    def __init__(self, path: PathLike, channels: bool) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be a str or a path, got {path!r}")
        suffix = Path(path).suffix.lower()
        if suffix not in (".csv", ".jsonl"):
            raise ValueError(f"path must end in .csv or .jsonl, got {os.fspath(path)!r}")
        if channels and suffix == ".csv":
            raise ValueError(f"path must end in .jsonl with channels=True, got {os.fspath(path)!r}")
        check_directory(path)
        self._line = _csv_line_of if suffix == ".csv" else _json_line_of
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115
        self._put(_csv_line(FIELDS) if suffix == ".csv" else "")

    def write(self, records: list[Record]) -> None:
        """Append records, all at once, so that a killed process leaves whole steps."""
        self._put("".join(map(self._line, records)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def _csv_line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _csv_line_of(record: Record) -> str:
    return _csv_line(record[name] for name in FIELDS)


def _json_line_of(record: Record) -> str:
    return json.dumps(_finite(record)) + "\n"


def _finite(value: Any) -> Any:
    """Return what JSON can hold: null for what is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
