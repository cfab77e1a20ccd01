"""What folding did, and what was measured of it, as data that prints."""

from __future__ import annotations

from dataclasses import dataclass

from .._comparison import NOT_MADE, Comparison
from .._text import table


@dataclass(frozen=True)
class Outcome:
    """One line of the report: a node, what it was turned into, and why."""

    node: str
    result: str
    because: str = ""


@dataclass(frozen=True)
class FoldReport:
    """The outcome for each batch normalization; prints as a table.

    Attributes
    ----------
    folded : tuple of Outcome
        Those that cost nothing any more: folded into the layer before, or merged into the norm
        before.
    kept : tuple of Outcome
        Those that are still computed, each with the operator that does it, and the reason.
        An Outcome has the attributes `node`, `result` and `because`.
    comparison : Comparison
        How far the outputs are from those before, as was measured.
    """

    folded: tuple[Outcome, ...]
    kept: tuple[Outcome, ...]
    comparison: Comparison = NOT_MADE

    def __str__(self) -> str:
        summary = f"{len(self.folded)} folded, {len(self.kept)} kept"
        rows = [(line.node, line.result, line.because) for line in (*self.folded, *self.kept)]
        if not rows:
            return summary
        return f"{table(('layer', 'result', 'because'), rows)}\n{summary}"
