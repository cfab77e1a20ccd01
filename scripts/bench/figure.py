"""What the benchmark found, as a picture: ratios of the nets, single layers by their size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .entries import ABOUT, REFERENCE, WORKS
from .groups import Group
from .machine import cache_sizes
from .report import MIB, TITLES, Report, columns, summarize
from .stats import FLOOR_PASSES, Interval

STYLES = {
    REFERENCE: ("#000000", "o"),
    "control": ("#888888", "o"),
    "none": ("#c0a000", "D"),
    "textbook": ("#8c564b", "v"),
    "portable": ("#1f77b4", "s"),
    "native": ("#d62728", "^"),
    "auto": ("#2ca02c", "P"),
    "file": ("#bcbd22", "h"),
    "builtin-folded": ("#9467bd", "X"),
    "folded": ("#17becf", "*"),
    "torch": ("#ff7f0e", "<"),
    "torch-folded": ("#e377c2", ">"),
}
_WIDTH, _DPI = 8.3, 200  # inches; text of 8 points is to be read where 830 pixels are shown
_FONT = {"font.size": 8, "axes.titlesize": 9, "lines.markersize": 4.5}
_TICKS = (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 8, 16, 32, 64, 128, 256)


def draw(report: Report, path: Path) -> None:
    """Draw the ratios of the nets, and the single layers against their size, into a PNG file."""
    with matplotlib.rc_context(_FONT):
        _draw(report, path)


def _draw(report: Report, path: Path) -> None:
    nets = _by_work(g for g in report.groups if not g.layer)
    layers = _by_work(g for g in report.groups if g.layer)
    lanes = [len(groups) * (1 + len(columns(groups))) for groups in nets.values()]
    heights = [*([1.2 + 0.1 * max(lanes)] if nets else []), *[2.7] * len(layers)]
    if not heights:
        return
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if nets:
        part = parts.pop(0)
        panels = part.subplots(1, len(nets), squeeze=False, sharey=True)[0]
        for axes, (work, groups) in zip(panels, nets.items()):
            _draw_nets(axes, groups)
            axes.set_title(TITLES[work])
        _draw_legend(part, panels)
    layouts = list(dict.fromkeys(g.net for g in report.groups if g.layer))
    for part, (work, groups) in zip(parts, layers.items()):
        panels = part.subplots(1, len(layouts), squeeze=False, sharey=True)[0]
        for axes, layout in zip(panels, layouts):
            _draw_sweep(axes, [group for group in groups if group.net == layout])
            axes.set_title(f"{layout}: {TITLES[work].lower()}")

        panels[0].set_ylim(_floor_limits(groups))
        _set_ticks(panels[0].yaxis, panels[0].get_ylim())
        panels[0].set_ylabel(f"← faster      slower →\n{FLOOR_PASSES[work]} tensor passes = 1")
        _draw_legend(part, panels)
    figure.savefig(path, dpi=_DPI)


def _by_work(groups: Any) -> dict[str, list[Group]]:
    groups = list(groups)
    found = {work: [group for group in groups if group.work == work] for work in WORKS}
    return {work: some for work, some in found.items() if some}


def _draw_legend(part: Any, panels: Sequence[Any]) -> None:
    """Explain the entries of all panels once, below them."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    names = [name for name in ABOUT if name in handles]
    if names:
        shown = [handles[name] for name in names]
        part.legend(shown, names, loc="outside lower center", ncols=len(names), frameon=False)


def _draw_nets(axes: Any, groups: Sequence[Group]) -> None:
    """Draw the ratios of each net below each other, an entry a lane."""
    names = [name for name in columns(groups) if name != REFERENCE]
    for i, group in enumerate(groups):
        timings = summarize(group)
        if REFERENCE not in timings:
            axes.text(
                0.5,
                i,
                "the built-in fails",
                ha="center",
                va="center",
                color="#666666",
                backgroundcolor="white",
                transform=axes.get_yaxis_transform(),
            )
            continue
        for j, name in enumerate(names):
            ratio = timings[name].process_ratio if name in timings else None
            if ratio is not None:
                lane = i + 0.8 * (j + 0.5) / len(names) - 0.4
                _draw_points(axes, name, [ratio.value], [lane], xerr=_whiskers([ratio]), ls="none")
    for i in range(len(groups) - 1):
        axes.axhline(i + 0.5, color="#dddddd", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set(xscale="log", xlabel="← faster      slower →\nprocess time / nn.BatchNorm's")
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), [group.net for group in groups])
    _set_ticks(axes.xaxis, axes.get_xlim())
    axes.grid(axis="x", alpha=0.3)


def _draw_sweep(axes: Any, groups: Sequence[Group]) -> None:
    """Draw the multiple of the memory floor against the size of the tensor, an entry a line."""
    found = [(group.nbytes / MIB, summarize(group)) for group in groups]
    axes.set(xscale="log", yscale="log", xlabel="MiB per tensor")
    for name in columns(groups):
        there = [(size, timings[name].floor) for size, timings in found if name in timings]
        points = [(size, floor) for size, floor in there if floor is not None]
        if points:
            x, floors = zip(*points)
            y = [floor.value for floor in floors]
            line = "--" if name == "control" else "-"
            _draw_points(axes, name, x, y, yerr=_whiskers(floors), ls=line)
    sizes = [size for size, _ in found]
    left, right = min(sizes) / 1.5, max(sizes) * 1.5
    for level, nbytes in cache_sizes().items():
        if left < nbytes / MIB < right:
            axes.axvline(nbytes / MIB, color="#999999", linestyle=":", linewidth=1)
            axes.annotate(
                f"L{level}",
                (nbytes / MIB, 1),
                (2, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                color="#666666",
            )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xlim(left, right)
    axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _draw_points(axes: Any, name: str, x: Any, y: Any, **options: Any) -> None:
    """Draw values of one entry with their intervals."""
    color, marker = STYLES[name]
    axes.errorbar(x, y, color=color, marker=marker, capsize=2, label=name, **options)


def _whiskers(intervals: Sequence[Interval]) -> Any:
    """Return how far intervals reach below and above their values; shape (2, N)."""
    below = [interval.value - interval.low for interval in intervals]
    above = [interval.high - interval.value for interval in intervals]
    return np.maximum([below, above], 0)


def _floor_limits(groups: Sequence[Group]) -> tuple[float, float]:
    """Return limits that show all multiples of the memory floor, and the floor."""
    floors = [timing.floor for g in groups for timing in summarize(g).values() if timing.floor]
    low, high = min(floor.low for floor in floors), max(floor.high for floor in floors)
    return 0.7 * min(1, low), 1.4 * max(1, high)


def _set_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Label a logarithmic axis with plain numbers."""
    shown = [tick for tick in _TICKS if limits[0] <= tick <= limits[1]]
    axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_tick_params(which="minor", length=0)
    axis.set_minor_formatter("")
