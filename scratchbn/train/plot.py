"""The curves of runs side by side. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..environment.install import install_command

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError(f"{error}: {install_command('demo')}") from error

from .._writing import PathLike
from .run import Run
from .seeds import MEASURES, Paired, Summary

__all__ = ["plot", "plot_seeds"]


def plot(runs: Sequence[Run], path: PathLike, title: str = "") -> None:
    """Draw the losses of runs over the steps, and their accuracies over the epochs.

    Parameters
    ----------
    runs : sequence of Run
        Of the results of their epochs, ``train_acc`` and ``test_acc`` are drawn.
    path : str or path
        What to write; the suffix says how.
    title : str
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, run in enumerate(runs):
        left.plot(range(1, len(run.losses) + 1), run.losses, "--" if i else "-", label=run.name)
    left.set(
        yscale="log",
        xlabel="training step",
        ylabel="loss (cross entropy, nats)",
        title="Moving average of the batch loss",
    )
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    (_draw_epochs if len(runs[0].epochs) > 1 else _draw_one_epoch)(right, runs)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _draw_epochs(axes: Any, runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        for marker, part, fill in (("o", "train", "full"), ("s", "test", "none")):
            axes.plot(
                range(1, len(run.epochs) + 1),
                [100 * epoch[f"{part}_acc"] for epoch in run.epochs],
                "--" if i else "-",
                marker=marker,
                color=f"C{i}",
                fillstyle=fill,
                label=f"{run.name}, {part}",
            )
    axes.set(xlabel="epochs", ylabel="accuracy (%)", title="Accuracy at the end of each epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, len(runs[0].epochs) + 0.5)


def _draw_one_epoch(axes: Any, runs: Sequence[Run]) -> None:
    """Draw a bar for each accuracy, with its value: there is no line through one point."""
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        values = [100 * epoch[key] for epoch in run.epochs for key in ("train_acc", "test_acc")]
        places = [place + (i + 0.5) * width - 0.4 for place in range(len(values))]
        axes.bar_label(axes.bar(places, values, 0.9 * width, label=run.name), fmt="%.2f")
    axes.set_xticks([0, 1], ["train", "test"])
    axes.set(ylabel="accuracy (%)", title="Accuracy after the epoch", ylim=(0, 140))
    axes.set_yticks(range(0, 101, 20))


def plot_seeds(summary: Summary, path: PathLike, measure: str = "test_acc") -> None:
    """Draw what each seed gave with each net, and the differences between two nets.

    Parameters
    ----------
    summary : Summary
    path : str or path
        What to write; the suffix says how.
    measure : str
        ``'test_acc'``, ``'train_acc'`` or ``'loss'``.
    """
    differences = summary.differences()
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplot_mosaic("SSSD" if differences else "S")
    _draw_seeds(axes["S"], summary, measure)
    if differences:
        _draw_difference(axes["D"], summary, measure, differences[measure])
    figure.savefig(path, dpi=120)


def _draw_seeds(axes: Any, summary: Summary, measure: str) -> None:
    order = range(1, len(summary.seeds) + 1)
    for (net, results), marker, fill in zip(summary.results.items(), "os", ("full", "none")):
        axes.plot(order, results[measure], marker, fillstyle=fill, label=net)
    if len(summary.results) == 2:
        axes.vlines(order, *(r[measure] for r in summary.results.values()), color="0.7", zorder=0)
    title = f"{MEASURES[measure].capitalize()} after epoch {summary.epochs}"
    axes.set(xlabel="seed", ylabel=MEASURES[measure], title=title)
    axes.set_xticks(order, summary.seeds)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_difference(axes: Any, summary: Summary, measure: str, found: Paired) -> None:
    first, second = (results[measure] for results in summary.results.values())
    above = [a - b for a, b in zip(first, second)]
    axes.plot([0] * len(above), above, "o", color="0.6", fillstyle="none")
    axes.errorbar([0], [found.mean], [found.high - found.mean], fmt="o", color="C3", capsize=6)
    axes.axhline(0, color="0.3", linewidth=0.8)
    title = " minus ".join(summary.results)
    axes.set(xticks=[], xlim=(-1, 1), title=title, xlabel="each seed;\nmean, 95% interval")
    axes.grid(alpha=0.3, axis="y")
