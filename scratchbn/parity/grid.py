"""The cases by which a batch normalization is judged, and two layer classes compared in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mxnet.gluon import Block, nn

from ..backends import get_backend, use_backend
from ..layer import ScratchBatchNorm
from .compare import compare
from .report import Report, joined
from .settings import TOLERANCES, name_of
from .where import check_backends, facts


@dataclass(frozen=True)
class Case:
    """A layer to compare: the shape and dtype of its data, and its options.

    Attributes
    ----------
    shape : tuple of int
    options : dict
        Arguments of the layer, without ``in_channels``.
    dtype : str
    group : str
        What the case is about.
    """

    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    group: str = ""

    @property
    def name(self) -> str:
        """Shape, dtype and options in one line."""
        options = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join(["x".join(map(str, self.shape)), self.dtype, *options])

    @property
    def channels(self) -> int:
        """The length of the channel axis."""
        return self.shape[self.options.get("axis", 1)]

    def data(self, seed: int, steps: int) -> list[np.ndarray]:
        """Return a batch per step, from N(1, 2) (mean, standard deviation), in the case's dtype."""
        rng = np.random.default_rng(seed)
        return [rng.normal(1, 2, self.shape).astype(self.dtype) for _ in range(steps)]


_SHAPES = {2: (8, 5), 3: (4, 5, 6), 4: (4, 5, 6, 7), 5: (3, 5, 4, 3, 6)}
_CHANNELS = (1, 2, 3, 7, 8, 16, 50, 64, 128, 1024)
_DEFAULTS = {"center": True, "scale": True, "use_global_stats": False}
_MOMENTA = (0.0, 0.1, 0.5, 0.99, 1.0)
_EPSILONS = (0.0, 1e-8, 1e-3, 0.5)


def standard_grid(full: bool = False) -> list[Case]:
    """Return the cases by which a batch normalization is judged.

    Ranks 2 to 5, every axis, `center`, `scale` and `use_global_stats`, momentum, epsilon, batches
    of one and 1 to 1024 channels, in float16, float32 and float64.

    Parameters
    ----------
    full : bool
        Every axis in every dtype and with every combination of flags, every momentum with every
        epsilon, all of it in every rank. The default varies one thing at a time.

    Returns
    -------
    list of Case
        No two alike.
    """
    flags = [
        {name: value for name, value in zip(_DEFAULTS, chosen) if value != _DEFAULTS[name]}
        for chosen in itertools.product((True, False), repeat=len(_DEFAULTS))
    ]
    axes = [(shape, axis) for rank, shape in _SHAPES.items() for axis in range(-rank, rank)]
    found: dict[str, Case] = {}
    for dtype in TOLERANCES:
        cases = [Case(shape, {}, dtype, "rank") for shape in _SHAPES.values()]
        cases += [Case((1, *shape[1:]), {}, dtype, "batch of 1") for shape in _SHAPES.values()]
        if full or dtype == "float64":
            cases += [
                Case(shape, {"axis": axis, **options}, dtype, "axis")
                for shape, axis in axes
                for options in (flags if full else [{}])
            ]
        for shape in _SHAPES.values() if full else [_SHAPES[4]]:
            cases += [Case(shape, options, dtype, "flags") for options in flags]
            cases += [Case(shape, {"momentum": m}, dtype, "momentum") for m in _MOMENTA]
            cases += [Case(shape, {"epsilon": e}, dtype, "epsilon") for e in _EPSILONS]
            cases += [
                Case(shape, {"momentum": m, "epsilon": e}, dtype, "momentum and epsilon")
                for m, e in itertools.product(_MOMENTA, _EPSILONS if full else ())
            ]
        for rest in ((), (3, 3)) if full else ((3, 3),):
            cases += [Case((6, c, *rest), {}, dtype, "channels") for c in _CHANNELS]
        found.update((case.name, case) for case in reversed(cases))
    return sorted(
        found.values(), key=lambda c: (-np.dtype(c.dtype).itemsize, c.group, len(c.shape))
    )


def run_grid(
    layer: Callable[..., Block] = ScratchBatchNorm,
    reference: Callable[..., Block] = nn.BatchNorm,
    cases: Iterable[Case] | None = None,
    *,
    seed: int = 0,
    backends: Sequence[str] | None = None,
    **settings: Any,
) -> Report:
    """Compare two layer classes in every case of a grid, on one backend or several.

    Parameters
    ----------
    layer, reference : callable
        Called as ``layer(in_channels=C, **case.options)``.
    cases : iterable of Case, optional
        Default: :func:`standard_grid`. A tqdm bar around a list shows how far it is.
    seed : int
        For the data and the parameters.
    backends : sequence of str, optional
        Of ``scratchbn.backends.BACKENDS``; each case runs on each. Default: the one chosen.
    **settings
        For :func:`compare`.

    Returns
    -------
    Report
        With a ``case`` and a ``backend`` in every row.

    Raises
    ------
    TypeError, ValueError
        See :func:`compare`; a ValueError too if a backend is none that there is.
    BackendError
        If a backend cannot be had.

    Examples
    --------
    >>> bool(run_grid(cases=[Case((4, 3), {"momentum": 0.5}), Case((2, 3, 4), {"axis": -1})]))
    True
    """
    backends = check_backends([get_backend()] if backends is None else backends)
    reports: dict[str, Report] = {}
    for case in standard_grid() if cases is None else cases:
        data = case.data(seed, settings.get("steps", 3))
        found = []
        for backend in backends:
            one, two = (
                make(in_channels=case.channels, **case.options) for make in (layer, reference)
            )
            with use_backend(backend):
                found.append(compare(one, two, data, dtype=case.dtype, seed=seed, **settings))
        reports[case.name] = joined(found)
    if settings.get("loss") is not None:
        settings["loss"] = name_of(settings["loss"])
    made = {"cases": len(reports), "seed": seed, **settings, "backends": backends, **facts()}
    return Report.merge(reports, made)
