"""Where the time of a step goes: MXNet's profiler, operator by operator."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass

from scratchbn._text import table

import mxnet as mx

from .entries import ENTRIES
from .machine import cache_sizes
from .nets import LAYOUTS, NETS, Net, single_layer
from .runner import Data, build_runner

_STEPS = 20


@dataclass(frozen=True)
class OperatorTime:
    """The time of one operator in a step: how often it runs, and milliseconds together."""

    operator: str
    calls: float
    ms: float


def profile(name: str, entry: str, work: str) -> str:
    """Return the time of each operator in a step as a table, the most expensive first."""
    if work not in ENTRIES[entry].works:
        raise ValueError(f"argument --profile: {entry!r} takes no part in --work {work}")
    net = single_layer(name, cache_sizes()[3]) if name in LAYOUTS else NETS[name]
    times, step = operator_times(net, work, entry)
    total = sum(time.ms for time in times)
    rows = [(t.operator, f"{t.calls:>5g}", f"{t.ms:8.3f}", f"{t.ms / total:6.1%}") for t in times]
    rows.append(("all", "", f"{total:8.3f}", f"{1:6.1%}"))
    title = f"{name} {'x'.join(map(str, net.shape))}, {work}, {entry}: {step:.2f} ms a step"
    return f"{title}\n\n{table(('operator', 'calls', 'ms', 'share'), rows)}"


def operator_times(net: Net, work: str, entry: str) -> tuple[list[OperatorTime], float]:
    """Return the time of each operator, the most expensive first, and that of a step, in ms."""
    # One by one, so that each has its time; read when MXNet builds its first graph.
    os.environ["MXNET_EXEC_BULK_EXEC_TRAIN"] = os.environ["MXNET_EXEC_BULK_EXEC_INFERENCE"] = "0"
    runner = build_runner(net, work, entry, Data.of(net))
    with tempfile.TemporaryDirectory() as folder:
        mx.profiler.set_config(
            profile_symbolic=True,
            profile_imperative=True,
            profile_memory=False,
            profile_api=False,
            aggregate_stats=True,
            filename=f"{folder}/profile.json",
        )
        mx.profiler.set_state("run")
        seconds = runner.sample(_STEPS)
        mx.profiler.set_state("stop")
        found = json.loads(mx.profiler.dumps(reset=True, format="json"))
    times = [
        OperatorTime(name, time["Count"] / _STEPS, time["Total"] / _STEPS)
        for name, time in found["Time"]["operator"].items()
    ]
    return sorted(times, key=lambda time: -time.ms), 1000 * seconds.wall / _STEPS
