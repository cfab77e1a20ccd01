"""How far a model is from the model that it was, as measured, or why it was not measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """The outputs of two models on the same input; prints as a line.

    Attributes
    ----------
    difference, size : float or None
        The largest difference, and the largest output; None if they were not measured.
    note : str
        Why not, or what is behind a difference that is not an error.
    unknown : str
        The input whose shape would have to be known, if that is why.

    Examples
    --------
    >>> print(Comparison(0.0, 2.0))
    largest difference on random input: 0.0e+00, of 2.0e+00
    >>> print(Comparison(note="float16 does not run on a CPU"))
    largest difference: not measured, float16 does not run on a CPU
    """

    difference: float | None = None
    size: float | None = None
    note: str = ""
    unknown: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return f"largest difference: not measured, {self.note}"
        line = f"largest difference on random input: {self.difference:.1e}, of {self.size:.1e}"
        return f"{line}; {self.note}" if self.note else line


NOT_MADE = Comparison(note="nobody asked")
