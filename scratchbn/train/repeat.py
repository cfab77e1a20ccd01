"""A script's training again with other seeds. Needs rich, scipy and matplotlib."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from rich.console import Console

from .._writing import staged_folder
from .plot import plot_seeds
from .results import deciding, options_of
from .seeds import summarize

__all__ = ["check_alone", "finished", "over_seeds"]


def check_alone(options: Namespace) -> None:
    """Raise ValueError if an option does not go with several seeds."""
    for name in ("kvstore", "monitor"):
        if options.seeds and getattr(options, name):
            raise ValueError(f"argument --seeds: not with --{name}, which is for a single training")


def over_seeds(options: Namespace, data: str, train: Callable[[Namespace], int]) -> int:
    """Train with several seeds, each in a directory of its own; print and write a summary.

    Parameters
    ----------
    options : Namespace
        Those of the script: `seeds` from `seed` on, in ``out/seed-S``; with `resume`, seeds whose
        results are there, of the same options, are left out.
    data : str
        The name of the data set, which those results have to be of.
    train : callable
        Trains with options of one seed, writes ``metrics.json`` to its `out`, returns an exit
        status.

    Returns
    -------
    int
        0, or the status of the first seed that failed, after which none is trained.

    Raises
    ------
    OSError
        If the disk refuses a directory, ``out/seeds.json`` or ``out/seeds.png``.
    """
    metrics: dict[int, Any] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        one = Namespace(**{**vars(options), "seed": seed, "out": options.out / f"seed-{seed}"})
        found = finished(one, data) if options.resume else None
        done = " was finished before" if found else ""
        print(f"seed {seed} ({len(metrics) + 1} of {options.seeds}){done}", flush=True)
        if found is None:
            one.out.mkdir(parents=True, exist_ok=True)
            status = train(one)
            if status:
                return status
            found = json.loads((one.out / "metrics.json").read_text("utf-8"))
        metrics[seed] = found
    summary = summarize(metrics)
    with staged_folder(options.out) as folder:
        text = json.dumps(summary.to_dict(), indent=2)
        (folder / "seeds.json").write_text(text + "\n", "utf-8")
        plot_seeds(summary, folder / "seeds.png")
    Console().print(summary.table())
    print(f"written to {options.out}", flush=True)
    return 0


def finished(options: Namespace, data: str) -> dict[str, Any] | None:
    """Return the metrics of a run whose results are there, if its options and data were these."""
    had, wanted = options_of(options.out), deciding(options, data)
    if had is None or any(name not in had or had[name] != wanted[name] for name in wanted):
        return None
    metrics: dict[str, Any] = json.loads((options.out / "metrics.json").read_text("utf-8"))
    return metrics
