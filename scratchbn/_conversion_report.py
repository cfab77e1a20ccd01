"""What a conversion reports, be it of a net or of files."""

from __future__ import annotations

from dataclasses import dataclass

from ._comparison import NOT_MADE, Comparison


@dataclass(frozen=True)
class Entry:
    """One line of a report.

    Attributes
    ----------
    path : str
        Where the block is, ``'features.0.body.1'``; empty for the net itself.
    name : str
        Its Gluon name.
    kind : str
        Its class, before the conversion.
    text : str
        What it was converted to, or why it was not.
    """

    path: str
    name: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path or '(the net)'} [{self.name}] {self.kind}: {self.text}"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes
    ----------
    converted, skipped, notes : tuple of Entry
        The converted layers; the normalization that was left alone, and why; converted layers
        whose results change, and how.
    comparison : Comparison
        Of files: how far the outputs are from those before, as was measured.

    Examples
    --------
    >>> print(ConversionReport((Entry("0", "bn0", "BatchNorm", "now ScratchBatchNorm"),)))
    1 converted, 0 skipped
    """

    converted: tuple[Entry, ...] = ()
    skipped: tuple[Entry, ...] = ()
    notes: tuple[Entry, ...] = ()
    comparison: Comparison = NOT_MADE

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.skipped)} skipped"]
        lines += [f"  skipped {entry}" for entry in self.skipped]
        lines += [f"  note {entry}" for entry in self.notes]
        return "\n".join(lines)
