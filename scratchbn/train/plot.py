"""The curves of runs side by side. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError(f"{error}: pip install 'scratchbn[demo]'") from error

from .._writing import PathLike
from .run import Run

__all__ = ["plot"]


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
        color, style = f"C{i}", "--" if i else "-"
        left.plot(range(1, len(run.losses) + 1), run.losses, style, color=color, label=run.name)
        for marker, part, fill in (("o", "train", "full"), ("s", "test", "none")):
            right.plot(
                range(1, len(run.epochs) + 1),
                [100 * epoch[f"{part}_acc"] for epoch in run.epochs],
                style,
                marker=marker,
                color=color,
                fillstyle=fill,
                label=f"{run.name}, {part}",
            )
    left.set(
        yscale="log",
        xlabel="training step",
        ylabel="loss (cross entropy, nats)",
        title="Moving average of the batch loss",
    )
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    right.set(xlabel="epochs", ylabel="accuracy (%)", title="Accuracy at the end of each epoch")
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.set_xlim(0.5, len(runs[0].epochs) + 0.5)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
