"""All defects, with both layers in both modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mxnet as mx

from .case import LAYERS, MODES, Defect, Outcome


@dataclass(frozen=True)
class Finding:
    """What a defect looked like.

    Attributes
    ----------
    defect : Defect
    outcomes : dict
        By layer (``'built-in'`` or ``'ours'``) and mode (``'eager'`` or ``'graph'``).
    """

    defect: Defect
    outcomes: dict[tuple[str, str], Outcome]

    def texts(self, norm: str) -> list[str]:
        """Return what was seen with a layer: once if the modes agree, by mode if they do not.

        Parameters
        ----------
        norm : {'built-in', 'ours'}

        Returns
        -------
        list of str
        """
        texts = {mode: self.outcomes[norm, mode].text for mode in MODES}
        if len(set(texts.values())) == 1:
            return [texts[MODES[0]]]
        return [f"{mode}: {text}" for mode, text in texts.items()]

    def surprises(self, norms: Iterable[str] = LAYERS) -> list[str]:
        """Return what is not as the catalogue says: the built-in broken, ours sound.

        Parameters
        ----------
        norms : iterable of str
            The layers of interest.

        Returns
        -------
        list of str
            With layer and mode.
        """
        return [
            f"{self.defect.key}, {norm}, {mode}: {outcome.text}"
            for (norm, mode), outcome in self.outcomes.items()
            if norm in norms and (outcome.sound, outcome.broken) != (norm == "ours", norm != "ours")
        ]


def survey(defects: Iterable[Defect], device: Any = None) -> Iterator[Finding]:
    """Measure defects one by one.

    Parameters
    ----------
    defects : iterable of Defect
        Such as ``DEFECTS.values()``.
    device : mxnet.Context, optional
        Default: the CPU, whose defects these are.

    Yields
    ------
    Finding
        A measurement that fails is neither sound nor broken, and its text says why.
    """
    device = mx.cpu() if device is None else device
    for defect in defects:
        yield Finding(
            defect,
            {
                (norm, mode): _outcome(defect, norm, mode, device)
                for norm in LAYERS
                for mode in MODES
            },
        )


def _outcome(defect: Defect, norm: str, mode: str, device: Any) -> Outcome:
    try:
        return defect.outcome(norm, mode, device)
    except RuntimeError as error:  # MXNetError is one
        return Outcome(False, False, f"no result: {' '.join(str(error).split())}")
