"""A table of the latest records, updated in place in the terminal."""

from __future__ import annotations

from typing import Any

from .._text import rich_table
from ..environment.install import install_command
from .records import Record

_QUANTITIES = {
    "batch_mean": "batch\nmean",
    "batch_var": "batch\nvar.",
    "mean_distance": "dist. of\nmeans",
    "var_ratio": "ratio of\nvar.",
    "gamma": "gamma",
    "beta": "beta",
}
_HEADER = ("layer", *_QUANTITIES.values(), "dead\n%", "sat.\n%", "not\nfinite")


class LiveTable:
    """Shows the records of the latest step; needs rich."""

    def __init__(self, console: Any) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError as error:
            raise ImportError(f"console needs rich: {install_command('demo')}") from error
        if console is not True and not isinstance(console, Console):
            raise TypeError(f"console must be True, False or a rich Console, got {console!r}")
        self._live = Live(console=None if console is True else console, auto_refresh=False)

    def write(self, records: list[Record]) -> None:
        """Show records in place of those before."""
        if not self._live.is_started:
            self._live.start()
        self._live.update(_table(records), refresh=True)

    def close(self) -> None:
        """Leave the table as it is."""
        self._live.stop()


def _table(records: list[Record]) -> Any:
    from rich import box

    title = f"Norm layers, step {records[0]['step']}: least and largest channel"
    table = rich_table(title, _HEADER, [_cells(record) for record in records])
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    return table


def _cells(record: Record) -> list[str]:
    return [
        record["layer"],
        *(f"{record[f'{name}_min']:.3g}\n{record[f'{name}_max']:.3g}" for name in _QUANTITIES),
        *(f"{100 * record[name]:.1f}" for name in ("dead", "saturated")),
        str(record["nonfinite_batches"]),
    ]
