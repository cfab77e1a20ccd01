"""Records drawn over the steps, a line per layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._writing import PathLike, check_directory, staged
from ..environment.install import install_command
from .measure import SATURATION
from .records import Record


class _Panel(NamedTuple):
    """One of the six pictures; its fields are drawn solid and dashed, named in its legend."""

    title: str
    unit: str
    scale: str
    fields: dict[str, str]


_PANELS = (
    _Panel(
        "Input mean",
        "units of the input",
        "linear",
        {"batch": "batch_mean_mean", "running": "running_mean_mean"},
    ),
    _Panel(
        "Input variance",
        "units squared",
        "log",
        {"batch": "batch_var_mean", "running": "running_var_mean"},
    ),
    _Panel(
        "Distance of batch and running mean",
        "standard deviations",
        "log",
        {"": "mean_distance_mean"},
    ),
    _Panel("Batch variance / running variance", "ratio", "log", {"": "var_ratio_mean"}),
    _Panel(
        "Scale and shift",
        "units of the output",
        "linear",
        {"gamma": "gamma_mean", "beta": "beta_mean"},
    ),
    _Panel(
        "Dead channels, saturated outputs",
        "%",
        "linear",
        {"dead": "dead", f"beyond {SATURATION:g}": "saturated"},
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
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    _draw(figure, records)
    with staged(path) as file:
        figure.savefig(file, dpi=120)


def _draw(figure: Any, records: list[Record]) -> None:
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    layers = list(dict.fromkeys(record["layer"] for record in records))
    colors = dict(zip(layers, colormaps["viridis"](np.linspace(0, 0.9, len(layers)))))
    for axes, panel in zip(figure.subplots(2, 3, sharex=True).flat, _PANELS):
        _draw_panel(axes, panel, records, colors)
    for axes in figure.axes[3:]:
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
        for style, field in zip(_STYLES, panel.fields.values()):
            axes.plot(
                [record["step"] for record in own],
                [factor * record[field] for record in own],
                style,
                color=color,
                linewidth=1.2,
                marker="o" if len(own) == 1 else None,
            )
    axes.set(title=panel.title, ylabel=panel.unit, yscale=panel.scale)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(panel.fields) > 1:
        keys = [axes.plot([], [], style, color="0.3")[0] for style in _STYLES]
        axes.legend(keys, list(panel.fields), fontsize="small")
