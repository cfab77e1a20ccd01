"""Records drawn over the steps, a line per layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._writing import PathLike, check_directory, staged
from ..environment.install import install_command
from .measure import SATURATION
from .records import Record


class _Panel(NamedTuple):
    """One of the eight pictures; its fields are drawn solid and dashed, named in its legend."""

    title: str
    hint: str  # what to see in it
    unit: str
    scale: str
    fields: dict[str, str]
    aim: float | None = None  # a line at the value to be reached
    band: bool = False  # from the least to the greatest channel


_PANELS = (
    _Panel(
        "Input mean",
        "training uses the batch's, inference the running one",
        "units of the input",
        "linear",
        {"batch": "batch_mean_mean", "running": "running_mean_mean"},
    ),
    _Panel(
        "Input variance",
        "training uses the batch's, inference the running one",
        "units squared",
        "log",
        {"batch": "batch_var_mean", "running": "running_var_mean"},
    ),
    _Panel(
        "Distance of batch and running mean",
        "0 where training and inference centre the input alike",
        "running standard deviations",
        "log",
        {"": "mean_distance_mean"},
    ),
    _Panel(
        "Batch variance / running variance",
        "1 where the running variance has caught up",
        "ratio",
        "log",
        {"": "var_ratio_mean"},
        aim=1,
    ),
    _Panel(
        "Scale gamma",
        "mean and range of the channels; 0 switches one off",
        "units of the output",
        "linear",
        {"": "gamma"},
        band=True,
    ),
    _Panel(
        "Shift beta",
        "mean and range of the channels",
        "units of the output",
        "linear",
        {"": "beta"},
        band=True,
    ),
    _Panel(
        "Dead channels",
        "nowhere positive in the batch: a ReLU gives zeros only",
        "%",
        "linear",
        {"": "dead"},
    ),
    _Panel(
        f"Outputs beyond {SATURATION:g}",
        "a sigmoid is flat there",
        "%",
        "linear",
        {"": "saturated"},
    ),
)
_STYLES = ("-", "--")
_MOST_IN_LEGEND = 12


def plot(records: list[Record], path: PathLike) -> None:
    """Draw records into a file whose suffix says how; needs matplotlib."""
    check_directory(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot needs matplotlib: {install_command('demo')}") from error
    figure = Figure(figsize=(10, 11), layout="constrained")
    _draw(figure, records)
    with staged(path) as file:
        figure.savefig(file, dpi=120)


def _draw(figure: Any, records: list[Record]) -> None:
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    layers = list(dict.fromkeys(record["layer"] for record in records))
    colors = dict(zip(layers, colormaps["viridis"](np.linspace(0, 0.9, len(layers)))))
    for axes, panel in zip(figure.subplots(4, 2, sharex=True).flat, _PANELS):
        _draw_panel(axes, panel, records, colors)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("training step")
    named = layers
    if len(layers) > _MOST_IN_LEGEND:
        named = [layers[int(i)] for i in np.linspace(0, len(layers) - 1, _MOST_IN_LEGEND).round()]
    lines = [Line2D([], [], color=colors[layer]) for layer in named]
    figure.legend(lines, named, loc="outside lower center", ncols=min(len(named), 6))
    figure.suptitle("Norm layers during training, mean over the channels")


def _draw_panel(axes: Any, panel: _Panel, records: list[Record], colors: dict[str, Any]) -> None:
    factor = 100 if panel.unit == "%" else 1
    for layer, color in colors.items():
        own = [record for record in records if record["layer"] == layer]
        steps = [record["step"] for record in own]
        for style, field in zip(_STYLES, panel.fields.values()):
            name = f"{field}_mean" if panel.band else field
            axes.plot(
                steps,
                [factor * record[name] for record in own],
                style,
                color=color,
                linewidth=1.2,
                marker="o" if len(own) == 1 else None,
            )
            if panel.band:
                least, most = ([r[f"{field}_{end}"] for r in own] for end in ("min", "max"))
                axes.fill_between(steps, least, most, color=color, alpha=0.15, linewidth=0)
    if panel.aim is not None:
        axes.axhline(panel.aim, color="0.3", linewidth=0.8)
    axes.set(ylabel=panel.unit, yscale=panel.scale)
    if panel.unit == "%":
        top = axes.get_ylim()[1] if axes.dataLim.ymax > 0 else 1
        axes.set_ylim(-0.03 * top, top)
    axes.set_title(panel.title, loc="left", pad=18)
    axes.text(0, 1.03, panel.hint, transform=axes.transAxes, color="0.35", fontsize="small")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(panel.fields) > 1:
        keys = [axes.plot([], [], style, color="0.3")[0] for style in _STYLES]
        axes.legend(keys, list(panel.fields), fontsize="small")
