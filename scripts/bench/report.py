"""What the benchmark found, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scratchbn._text import table

import numpy as np

from .entries import ABOUT, REFERENCE, WORKS
from .groups import COPY, Group
from .stats import FLOOR_PASSES, Interval, bandwidth, floor_multiple, ratio_of_medians

TITLES = dict(zip(WORKS, ("Training step", "Inference", "Inference, norms folded")))
MIB = 2**20

_METHOD = """\
Ratios of medians to the net with `nn.BatchNorm`, with bootstrap 95% intervals, paired by round; all
entries of a net are alive together and run in another random order every round. Training is
forward, loss, backward and a step of SGD with learning rate 0, for single layers forward and
backward. Nets are hybridized with `static_alloc` and `static_shape`, but for those marked eager.
Wall time is what passes on the clock, process time what all cores compute for it, which other
programs disturb less."""

_FLOOR = """\
In multiples of the memory floor: {passes} passes of the tensor at the bandwidth of a copy of the
same size in the same rounds, in process time."""

_MEMORY = """\
Most resident memory (VmHWM) of a process that builds the net and trains six steps, less what the
imports and the batch need. The built-in's in MiB, the others in units of it."""


@dataclass(frozen=True)
class Timing:
    """One entry in a group: its ratio to the built-in and its multiple of the memory floor."""

    ms: float
    ratio: Interval | None
    floor: Interval | None
    process_ms: float
    process_ratio: Interval | None


def summarize(group: Group) -> dict[str, Timing]:
    """Return the timing of each entry that was measured, a copy included."""
    timings = {}
    for name, times in group.samples.items():
        process = group.process[name]
        ratio = floor = process_ratio = None
        if REFERENCE in group.samples:
            ratio = ratio_of_medians(times, group.samples[REFERENCE])
            process_ratio = ratio_of_medians(process, group.process[REFERENCE])
        if COPY in group.samples and name != COPY:
            floor = floor_multiple(group.work, process, group.process[COPY])
        timings[name] = Timing(_ms(times), ratio, floor, _ms(process), process_ratio)
    return timings


def _ms(times: Sequence[float]) -> float:
    return 1000 * float(np.median(times))


def columns(groups: Iterable[Group]) -> list[str]:
    """Return the entries of some groups, in the order of `ABOUT`."""
    there = {name for group in groups for name in (*group.samples, *group.problems)}
    return [name for name in ABOUT if name in there]


@dataclass
class Report:
    """Everything that is written; `memory` in bytes by net and entry, `notes` on what failed."""

    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    groups: list[Group] = field(default_factory=list)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """What computes something else than the built-in."""
        return [
            f"{group.net}, {group.work}: {name} is {difference:.1e} from the built-in"
            for group in self.groups
            for name, difference in group.wrong.items()
        ]

    def to_json(self) -> str:
        """Return the report with all samples."""
        groups = []
        for group in self.groups:
            rows = {name: asdict(timing) for name, timing in summarize(group).items()}
            groups.append({**asdict(group), "rows": rows})
        return json.dumps({**asdict(self), "groups": groups}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return a table for each kind of work, for single layers and for memory."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        parts = ["# Benchmark", f"`{self.command}`", f"{machine}; {versions}.", _METHOD]
        legend = [(name, ABOUT[name]) for name in columns(self.groups)]
        parts.append(table(("entry", "what it is"), legend, markdown=True))
        for work in WORKS:
            nets = [g for g in self.groups if g.work == work and not g.layer]
            if nets:
                parts += [f"## {TITLES[work]}", _net_table(nets)]
            layers = [g for g in self.groups if g.work == work and g.layer]
            if layers:
                parts += [f"## Single layer: {TITLES[work].lower()}", _layer_table(layers)]
                parts += [_FLOOR.format(passes=FLOOR_PASSES[work]), _floor_table(layers)]
        if self.memory:
            parts += ["## Peak memory in training", _MEMORY, _memory_table(self.memory)]
        if self.notes:
            parts += ["## Notes", "\n".join(f"- {note}" for note in self.notes)]
        return "\n\n".join(parts) + "\n"


def _timed_rows(group: Group, names: Sequence[str], *about: str) -> list[list[str]]:
    """Return two rows, of wall time and of process time."""
    timings = summarize(group)
    walls, processes = [], []
    for name in names:
        timing = timings.get(name)
        if timing is None:
            walls.append("fails" if name in group.problems else "")
            processes.append("")
        else:
            walls.append(_cell(name, timing.ms, timing.ratio))
            processes.append(_cell(name, timing.process_ms, timing.process_ratio))
    return [[*about, "wall", *walls], [*("",) * len(about), "process", *processes]]


def _cell(name: str, ms: float, ratio: Interval | None) -> str:
    return f"{ms:.3g} ms" if name == REFERENCE or ratio is None else str(ratio)


def _data(group: Group) -> str:
    return "x".join(map(str, group.shape))


def _mib(group: Group) -> str:
    return f"{group.nbytes / MIB:.3g}"


def _net_table(groups: Sequence[Group]) -> str:
    names = columns(groups)
    rows = [row for g in groups for row in _timed_rows(g, names, g.net, _data(g))]
    return table(("net", "data", "time", *names), rows, markdown=True)


def _layer_table(groups: Sequence[Group]) -> str:
    names = columns(groups)
    rows = [row for g in groups for row in _timed_rows(g, names, g.net, _data(g), _mib(g))]
    return table(("layer", "data", "MiB", "time", *names), rows, markdown=True)


def _floor_table(groups: Sequence[Group]) -> str:
    names = columns(groups)
    rows = []
    for group in groups:
        timings = summarize(group)
        speed = bandwidth(group.nbytes, timings[COPY].process_ms / 1000) / 1e9
        cells = [str(timings[name].floor) if name in timings else "" for name in names]
        rows.append((group.net, _mib(group), f"{speed:.1f} GB/s", *cells))
    return table(("layer", "MiB", "copy", *names), rows, markdown=True)


def _memory_table(memory: Mapping[str, Mapping[str, int]]) -> str:
    names = [name for name in ABOUT if any(name in found for found in memory.values())]

    def cell(name: str, found: Mapping[str, int]) -> str:
        if name not in found:
            return ""
        if name == REFERENCE or not found.get(REFERENCE):
            return f"{found[name] / MIB:.0f} MiB"
        return f"{found[name] / found[REFERENCE]:.2f}"

    rows = [(net, *(cell(name, found) for name in names)) for net, found in memory.items()]
    return table(("net", *names), rows, markdown=True)
