"""What the benchmark found, as JSON, as Markdown and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _benchmark_runs import COPY, ENTRIES, REFERENCE, WORKS, Group
from _benchmark_stats import (
    FLOOR_PASSES,
    Interval,
    bandwidth,
    cache_sizes,
    floor_multiple,
    ratio_of_medians,
)

TORCH = {"torch": "PyTorch, eager", "torch-folded": "PyTorch, norms fused by torch.fx"}
ABOUT = {**{name: entry.about for name, entry in ENTRIES.items()}, **TORCH}
_TITLES = {
    "train": "Training step",
    "inference": "Inference",
    "folded": "Inference, norms folded",
}
_MIB, _GB = 2**20, 1e9

_METHOD = """\
Ratios of medians to the net with `nn.BatchNorm`, with bootstrap 95% intervals, paired by round; all
entries of a net are alive together and run in another random order every round. Training is
forward, loss, backward and a step of SGD with learning rate 0, for single layers forward and
backward. Nets are hybridized with `static_alloc` and `static_shape`."""

_FLOOR = """\
In multiples of the memory floor: {passes} passes of the tensor at the bandwidth of a copy of the
same size in the same rounds."""

_MEMORY = """\
Most resident memory (VmHWM) of a process that builds the net and trains six steps, less what the
imports and the batch need. The built-in's in MiB, the others in units of it."""


@dataclass(frozen=True)
class Row:
    """What one entry came to in a group.

    `ratio` is to the built-in, `floor` the multiple of the memory floor; None where there is none.
    """

    ms: float
    ratio: Interval | None
    floor: Interval | None


def summarize(group: Group) -> dict[str, Row]:
    """Return the row of each entry that was measured, a copy included."""
    rows = {}
    for name, times in group.samples.items():
        ratio = floor = None
        if REFERENCE in group.samples:
            ratio = ratio_of_medians(times, group.samples[REFERENCE])
        if COPY in group.samples and name != COPY:
            floor = floor_multiple(group.work, times, group.samples[COPY])
        rows[name] = Row(1000 * float(np.median(times)), ratio, floor)
    return rows


@dataclass
class Report:
    """Everything that is written.

    Attributes
    ----------
    command : str
    machine, versions : dict
    groups : list of Group
    memory : dict
        Bytes by net, then by entry.
    notes : list of str
        What was left out, and why.
    """

    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    groups: list[Group] = field(default_factory=list)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the report with all samples."""
        groups = []
        for group in self.groups:
            rows = {name: asdict(row) for name, row in summarize(group).items()}
            groups.append({**asdict(group), "rows": rows})
        return json.dumps({**asdict(self), "groups": groups}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return a table for each kind of work, for single layers and for memory."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        parts = ["# Benchmark", f"`{self.command}`", f"{machine}; {versions}.", _METHOD]
        parts.append(_table(("entry", "what it is"), [(n, ABOUT[n]) for n in self._entries()]))
        for work in WORKS:
            nets = [g for g in self.groups if g.work == work and not g.layer]
            if nets:
                parts += [f"## {_TITLES[work]}", _net_table(nets)]
            layers = [g for g in self.groups if g.work == work and g.layer]
            if layers:
                parts += [f"## Single layer: {_TITLES[work].lower()}", _layer_table(layers)]
                parts += [_FLOOR.format(passes=FLOOR_PASSES[work]), _floor_table(layers)]
        if self.memory:
            parts += ["## Peak memory in training", _MEMORY, _memory_table(self.memory)]
        if self.notes:
            parts += ["## Notes", "\n".join(f"- {note}" for note in self.notes)]
        return "\n\n".join(parts) + "\n"

    def _entries(self) -> list[str]:
        return _columns(self.groups)


def _columns(groups: Iterable[Group]) -> list[str]:
    """Return the entries of some groups, in the order of `ABOUT`."""
    there = {name for group in groups for name in (*group.samples, *group.problems)}
    return [name for name in ABOUT if name in there]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _milliseconds(row: Row | None, problem: str | None) -> str:
    if row is None:
        return "fails" if problem else ""
    return f"{row.ms:.3g} ms"


def _ratio(row: Row | None, problem: str | None) -> str:
    return str(row.ratio) if row and row.ratio else _milliseconds(row, problem)


def _cells(group: Group, names: Iterable[str]) -> list[str]:
    rows = summarize(group)
    return [
        (_milliseconds if name == REFERENCE else _ratio)(rows.get(name), group.problems.get(name))
        for name in names
    ]


def _net_table(groups: Sequence[Group]) -> str:
    names = _columns(groups)
    return _table(
        ("net", "data", *names),
        [(g.net, "x".join(map(str, g.shape)), *_cells(g, names)) for g in groups],
    )


def _layer_table(groups: Sequence[Group]) -> str:
    names = _columns(groups)
    return _table(
        ("layer", "data", "MiB", *names),
        [
            (g.net, "x".join(map(str, g.shape)), f"{g.nbytes / _MIB:.3g}", *_cells(g, names))
            for g in groups
        ],
    )


def _floor_table(groups: Sequence[Group]) -> str:
    names = _columns(groups)
    lines = []
    for group in groups:
        rows = summarize(group)
        speed = bandwidth(group.nbytes, rows[COPY].ms / 1000) / _GB
        cells = [str(rows[name].floor) if name in rows else "" for name in names]
        lines.append((group.net, f"{group.nbytes / _MIB:.3g}", f"{speed:.1f} GB/s", *cells))
    return _table(("layer", "MiB", "copy", *names), lines)


def _memory_table(memory: dict[str, dict[str, int]]) -> str:
    names = [name for name in ABOUT if any(name in found for found in memory.values())]
    lines = []
    for net, found in memory.items():
        reference = found.get(REFERENCE)
        cells = []
        for name in names:
            if name not in found:
                cells.append("")
            elif name == REFERENCE or not reference:
                cells.append(f"{found[name] / _MIB:.0f} MiB")
            else:
                cells.append(f"{found[name] / reference:.2f}")
        lines.append((net, *cells))
    return _table(("net", *names), lines)


# --- picture ------------------------------------------------------------------------------------

_STYLES = {
    REFERENCE: ("#000000", "o"),
    "control": ("#888888", "o"),
    "none": ("#c0a000", "D"),
    "textbook": ("#8c564b", "v"),
    "portable": ("#1f77b4", "s"),
    "native": ("#d62728", "^"),
    "auto": ("#2ca02c", "P"),
    "builtin-folded": ("#9467bd", "X"),
    "folded": ("#17becf", "*"),
    "torch": ("#ff7f0e", "<"),
    "torch-folded": ("#e377c2", ">"),
}
_TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def draw(report: Report, path: Path) -> None:
    """Draw the ratios of the nets, and the single layers against their size.

    Parameters
    ----------
    report : Report
    path : Path
        Of the PNG file.
    """
    from matplotlib.figure import Figure

    nets = [g for g in report.groups if not g.layer]
    layers = [g for g in report.groups if g.layer]
    works = [work for work in WORKS if any(g.work == work for g in nets)]
    layer_works = [work for work in WORKS if any(g.work == work for g in layers)]
    layouts = list(dict.fromkeys(g.net for g in layers))
    tallest = max((_lanes(nets, work) for work in works), default=0)
    heights = [1.4 + 0.2 * tallest] * bool(works) + [3.4] * len(layer_works)
    if not heights:
        return
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if works:
        panels = parts[0].subplots(1, len(works), squeeze=False, sharey=True)[0]
        for axes, work in zip(panels, works):
            _draw_nets(axes, [g for g in nets if g.work == work], _TITLES[work])
        _draw_legend(parts[0], panels)
    for part, work in zip(parts[bool(works) :], layer_works):
        panels = part.subplots(1, len(layouts), squeeze=False, sharey=True)[0]
        for axes, layout in zip(panels, layouts):
            _draw_sweep(axes, [g for g in layers if (g.work, g.net) == (work, layout)])
            axes.set_title(f"{layout}: {_TITLES[work].lower()}")
        panels[0].set_ylim(_floor_limits([g for g in layers if g.work == work]))
        _set_ticks(panels[0].yaxis, panels[0].get_ylim())
        panels[0].set_ylabel(f"multiple of the memory floor\n({FLOOR_PASSES[work]} tensor passes)")
        _draw_legend(part, panels)
    figure.savefig(path, dpi=110)


def _draw_legend(part: Any, panels: Sequence[Any]) -> None:
    """Explain the entries of all panels once, on the right."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if not handles:
        return
    names = [name for name in ABOUT if name in handles]
    part.legend([handles[name] for name in names], names, loc="outside right upper", frameon=False)


def _lanes(nets: Sequence[Group], work: str) -> int:
    groups = [g for g in nets if g.work == work]
    return len(groups) * (1 + len(_columns(groups)))


def _draw_nets(axes: Any, groups: Sequence[Group], title: str) -> None:
    """Draw the ratios of each net below each other, an entry a lane."""
    names = [name for name in _columns(groups) if name != REFERENCE]
    for i, group in enumerate(groups):
        rows = summarize(group)
        if REFERENCE not in rows:
            axes.text(
                *(0.5, i, "the built-in fails"),
                **{"ha": "center", "va": "center", "color": "#666666", "backgroundcolor": "white"},
                transform=axes.get_yaxis_transform(),
            )
            continue
        for j, name in enumerate(names):
            ratio = rows[name].ratio if name in rows else None
            if ratio is None:
                continue
            color, marker = _STYLES[name]
            axes.errorbar(
                ratio.value,
                i + 0.8 * (j + 0.5) / len(names) - 0.4,
                xerr=_whiskers([ratio]),
                color=color,
                marker=marker,
                capsize=2,
                linestyle="none",
                label=name,
            )
    for i in range(len(groups) - 1):
        axes.axhline(i + 0.5, color="#dddddd", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set(xscale="log", title=title, xlabel="time / time with nn.BatchNorm")
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), [group.net for group in groups])
    _set_ticks(axes.xaxis, axes.get_xlim())
    axes.grid(axis="x", alpha=0.3)


def _whiskers(intervals: Sequence[Interval]) -> Any:
    """Return how far intervals reach below and above their values; shape (2, N)."""
    below = [interval.value - interval.low for interval in intervals]
    above = [interval.high - interval.value for interval in intervals]
    return np.maximum([below, above], 0)


def _draw_sweep(axes: Any, groups: Sequence[Group]) -> None:
    """Draw the multiple of the memory floor against the size of the tensor, an entry a line."""
    rows = [(group.nbytes / _MIB, summarize(group)) for group in groups]
    axes.set(xscale="log", yscale="log", xlabel="MiB per tensor")
    for name in _columns(groups):
        there = [(size, row[name].floor) for size, row in rows if name in row]
        points = [(size, floor) for size, floor in there if floor is not None]
        if not points:
            continue
        color, marker = _STYLES[name]
        axes.errorbar(
            [size for size, _ in points],
            [floor.value for _, floor in points],
            yerr=_whiskers([floor for _, floor in points]),
            color=color,
            marker=marker,
            capsize=2,
            linestyle="--" if name == "control" else "-",
            label=name,
        )
    sizes = [size for size, _ in rows]
    left, right = min(sizes) / 1.5, max(sizes) * 1.5
    for level, nbytes in cache_sizes().items():
        if left < nbytes / _MIB < right:
            axes.axvline(nbytes / _MIB, color="#999999", linestyle=":", linewidth=1)
            axes.annotate(
                f"L{level}",
                (nbytes / _MIB, 1),
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


def _floor_limits(groups: Sequence[Group]) -> tuple[float, float]:
    """Return limits that show all multiples of the memory floor, and the floor."""
    floors = [row.floor for group in groups for row in summarize(group).values() if row.floor]
    low, high = min(floor.low for floor in floors), max(floor.high for floor in floors)
    return 0.7 * min(1, low), 1.4 * max(1, high)


def _set_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Label a logarithmic axis with plain numbers."""
    shown = [tick for tick in _TICKS if limits[0] <= tick <= limits[1]]
    axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_tick_params(which="minor", length=0)
    axis.set_minor_formatter("")
