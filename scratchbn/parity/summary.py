"""A report for a terminal: what failed, how much did not, and the verdict last."""

from __future__ import annotations

from .._text import fitted, within
from . import where
from .report import Report

__all__ = ["summary"]


def summary(report: Report, width: int | None = None, every: bool = False) -> str:
    """Lay out a report in lines of at most `width`, but for words that are longer themselves.

    Parameters
    ----------
    report : Report
    width : int, optional
        Columns of the terminal.
    every : bool
        Show the rows that agree too, as :meth:`Report.table` has them.

    Returns
    -------
    str
    """
    tensors = len(report.worst(lambda row: (row.case, row.kind, row.tensor)))
    cases = len({row.case for row in report.rows})
    lines = [f"{cases} cases, {tensors} tensors, {len(report.rows)} comparisons"]
    lines += filter(None, [where.described(report.settings)])
    shown = report if every else Report(tuple(report.failures))
    header, rows, more = shown.table()
    text = [within([("", line)], width) for line in lines]
    if rows:
        text += [fitted(header, rows, width)]
    closest = max(report.rows, key=lambda row: row.excess, default=None)
    if not every and closest is not None and closest.ok:
        cells = dict(zip(("tensor", "absolute"), closest.cells()))
        said = (
            f"closest to what is allowed: {cells['tensor']} of {closest.case} ({closest.backend}), "
            f"{closest.absolute:.1e} of {closest.allowed:.1e}"
        )
        text += [within([("", said)], width)]
    if not every:
        text += [f"those that agree are not shown: parity --all{'; ' + more if more else ''}"]
    elif more:
        text += [more]
    text += [within([("note:", note)], width) for note in report.notes]
    return "\n".join([*text, report.verdict])
