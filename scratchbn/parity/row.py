"""One comparison of one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

OUTPUT, INPUT_GRADIENT, PARAMETER_GRADIENT, STATISTIC, ERROR = (
    "output",
    "input gradient",
    "parameter gradient",
    "statistic",
    "error",
)


@dataclass(frozen=True)
class Row:
    """One comparison of one tensor.

    Attributes
    ----------
    kind : str
        ``'output'``, ``'input gradient'``, ``'parameter gradient'``, ``'statistic'``, or
        ``'error'`` for a net that MXNet could not run.
    tensor : str
        Its structural name, such as ``'0.gamma'``; ``'a'`` or ``'b'`` for an error.
    mode : str
        ``'eager'``, ``'hybrid'`` or ``'static'``.
    phase : str
        ``'train'``, ``'inference'`` or ``'frozen'``.
    step : int
        From 1.
    absolute : float
        Largest absolute difference of two elements; NaN if one is not finite or the tensors cannot
        be compared.
    relative : float
        `absolute` divided by the largest magnitude in either tensor.
    allowed : float
        The largest `absolute` that is in order.
    index : tuple of int or None
        Where the largest difference is.
    note : str
        Why the tensors could not be compared.
    case : str
        Which comparison of a grid this belongs to.
    backend : str
        What layers of this package computed with.
    """

    kind: str
    tensor: str
    mode: str
    phase: str
    step: int
    absolute: float
    relative: float
    allowed: float
    index: tuple[int, ...] | None = None
    note: str = ""
    case: str = ""
    backend: str = ""

    @property
    def ok(self) -> bool:
        """Whether the difference is allowed; NaN never is."""
        return self.absolute <= self.allowed

    @property
    def excess(self) -> float:
        """`absolute` divided by `allowed`; infinite for NaN."""
        if math.isnan(self.absolute):
            return math.inf
        if self.absolute == 0:
            return 0.0
        return self.absolute / self.allowed if self.allowed > 0 else math.inf

    @property
    def where(self) -> str:
        """Mode, phase, step and index in words, or the note."""
        place = f"{self.mode} {self.phase} step {self.step}"
        if self.note:
            return f"{place}: {self.note}"
        return f"{place} at {self.index}" if self.index is not None else place

    def cells(self) -> list[str]:
        """Return the row as a line of a table.

        Returns
        -------
        list of str
            Tensor, differences, what is allowed, ``'ok'`` or ``'FAIL'``, and where.
        """
        tensor = self.tensor
        if self.kind in (PARAMETER_GRADIENT, INPUT_GRADIENT):
            tensor = f"gradient of {tensor}"
        elif self.kind == ERROR:
            tensor = f"error in {tensor}"
        numbers = [f"{value:.1e}" for value in (self.absolute, self.relative, self.allowed)]
        return [tensor, *numbers, "ok" if self.ok else "FAIL", self.where]
