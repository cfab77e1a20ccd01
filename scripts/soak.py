"""Run random nets in child processes for some minutes, and count how the processes end.

Ours, native and portable, run the same programs as the built-in layer, which is the control: nets
eager and hybridized, forward and backward, in one thread or several, left at a random moment with
operators pending. A process that dies keeps its core dump and its messages under --out. The exit
status is 1 if ours died in a scenario in which the control did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import scratchbn
from scratchbn._command import Parser, integer, positive
from scratchbn._text import table
from scratchbn._writing import write_text

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn
from tqdm import tqdm

CONTROL = "builtin"
KINDS = ("native", "portable", CONTROL)
RUNS = ("eager", "hybrid", "static", "threads")
# How the process ends, and its exit status if nothing went wrong.
ENDS = {"waits": 0, "returns": 0, "sys.exit": 3, "os._exit": 4, "raises": 1}
HANG = 120  # seconds after which a child is taken to hang


def random_net(rng: random.Random, norm: Any) -> tuple[nn.HybridSequential, tuple[int, ...]]:
    """Return an uninitialized net and the shape of an input, without the batch axis."""
    net = nn.HybridSequential()
    channels = rng.choice([3, 8, 16, 20])
    if rng.random() < 0.2:
        net.add(nn.Dense(channels), norm(), nn.Activation("relu"), nn.Dense(3))
        return net, (rng.choice([4, 50]),)
    kind, size = (nn.Conv3D, 8) if rng.random() < 0.15 else (nn.Conv2D, rng.choice([16, 24]))
    axis = rng.choice([1, 2, -1])
    if norm is nn.BatchNorm:  # it fails in five dimensions and with other axes: "!is_view"
        kind, size, axis = nn.Conv2D, max(size, 16), 1
    known = rng.random() < 0.5
    net.add(kind(channels, 3, padding=1), norm(in_channels=channels if known else 0))
    net.add(nn.Activation("relu"), kind(16, 3, strides=2), norm(momentum=rng.choice([0.9, 0.5])))
    if kind is nn.Conv2D:
        net.add(nn.MaxPool2D(2), norm(axis=axis))
    net.add(nn.Dense(5), norm(center=rng.random() < 0.5), nn.Dense(3))
    return net, (3,) + (size,) * (3 if kind is nn.Conv3D else 2)


def work(kind: str, run: str, seed: int, seconds: float) -> None:
    """Build nets and use them, hardly ever waiting for a result."""
    rng, until = random.Random(seed), time.monotonic() + seconds
    norm = nn.BatchNorm if kind == CONTROL else scratchbn.ScratchBatchNorm
    kept: list[Any] = []
    while time.monotonic() < until:
        net, shape = random_net(rng, norm)
        net.initialize()
        if run in ("hybrid", "static") or (run == "threads" and rng.random() < 0.5):
            net.hybridize(static_alloc=run == "static", static_shape=run == "static")
        for _ in range(rng.choice([1, 2, 4])):
            x = mx.nd.random.normal(shape=(rng.choice([2, 4, 8]), *shape))
            if rng.random() < 0.7:
                with autograd.record():
                    y = net(x)
                y.backward()
            else:
                y = net(x)
            if rng.random() < 0.1:
                y.wait_to_read()
        kept = [*kept[-4:], (net, y)] if rng.random() < 0.3 else []


def play(kind: str, run: str, end: str, seed: int) -> NoReturn:
    """Be the child process."""
    seconds = random.Random(seed).uniform(0.2, 4)
    if kind != CONTROL:
        scratchbn.set_backend(kind)
    if run == "threads":
        threads = [
            threading.Thread(target=work, args=(kind, run, seed + k, seconds), daemon=True)
            for k in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if end == "waits" else random.Random(seed).uniform(0, seconds / 3))
    else:
        work(kind, run, seed, seconds)
    if end == "waits":
        mx.nd.waitall()
    if end == "os._exit":
        os._exit(ENDS[end])
    if end == "raises":
        raise RuntimeError("the end that was asked for")
    sys.exit(ENDS[end])


class Child:
    """A child process in a folder of its own, which is kept if it dies."""

    def __init__(self, folder: Path, kind: str, run: str, end: str, seed: int) -> None:
        self.folder, self.kind, self.scenario, self.right = folder, kind, f"{run}, {end}", ENDS[end]
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier soak of the same seed
        folder.mkdir(parents=True)
        self.began = time.monotonic()
        program = [sys.executable, "-X", "faulthandler", str(Path(__file__).resolve())]
        self.process = subprocess.Popen(
            [*program, "--child", kind, run, end, str(seed)],
            cwd=folder,
            stdout=(folder / "messages.txt").open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )

    def ended(self) -> str | None:
        """Return how it ended, 'right', 'hang' or its exit status; None while it runs."""
        status = self.process.poll()
        if status is None:
            if time.monotonic() - self.began < HANG:
                return None
            self.process.kill()
            self.process.wait()
            return "hang"
        if status != self.right:
            return str(status)
        shutil.rmtree(self.folder)
        return "right"


def soak(out: Path, minutes: float, workers: int, seed: int) -> dict[tuple[str, str], Counter[str]]:
    """Keep `workers` children going; return how those of each kind and scenario ended."""
    rng, counts = random.Random(seed), dict[tuple[str, str], Counter[str]]()
    children: list[Child] = []
    queue: list[tuple[str, str, str, int]] = []
    began = time.monotonic()
    with tqdm(total=round(60 * minutes), desc="soak", unit="s", disable=None) as bar:
        while children or time.monotonic() - began < 60 * minutes:
            if len(children) < workers and time.monotonic() - began < 60 * minutes:
                if not queue:  # the same program by each kind
                    run, end, number = rng.choice(RUNS), rng.choice([*ENDS]), rng.randrange(2**30)
                    queue = [(kind, run, end, number) for kind in KINDS]
                kind, run, end, number = queue.pop()
                folder = out / f"{kind}-{run}-{end}-{number}"
                children.append(Child(folder, kind, run, end, number))
            for child in [*children]:
                how = child.ended()
                if how is not None:
                    children.remove(child)
                    counts.setdefault((child.kind, child.scenario), Counter())[how] += 1
            done = sum(sum(c.values()) for c in counts.values())
            died = sum(sum(c.values()) - c["right"] for c in counts.values())
            bar.set_postfix(processes=done, died=died, refresh=False)
            bar.update(min(round(time.monotonic() - began), bar.total) - bar.n)
            time.sleep(0.1)
    return counts


def died(counts: dict[tuple[str, str], Counter[str]], kind: str, scenario: str) -> int:
    """Count the processes that did not end as they should."""
    ends = counts.get((kind, scenario), Counter())
    return sum(ends.values()) - ends["right"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="soak.py", description=__doc__)
    parser.add_argument("--minutes", type=positive, default=5.0, help="how long (default: 5)")
    parser.add_argument(
        "--workers", type=integer(1), default=2, help="processes at a time (default: 2)"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of the programs (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/soak"), help="for what died (default: runs/soak)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    options = build_parser().parse_args(arguments)
    scratchbn.set_backend("native")  # built before the clock starts
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
    out = options.out.absolute()
    counts = soak(out, options.minutes, options.workers, options.seed)
    rows = []
    for kind in KINDS:
        ends = sum((c for (k, _), c in counts.items() if k == kind), Counter[str]())
        others = ", ".join(f"{how}: {n}" for how, n in sorted(ends.items()) if how != "right")
        rows.append([kind, sum(ends.values()), ends["right"], others or "none"])
    text = table(["kind", "processes", "ended as told", "died (exit status: how many)"], rows)
    ours = sorted(
        f"{kind}, {scenario}"
        for kind, scenario in counts
        if kind != CONTROL and died(counts, kind, scenario) and not died(counts, CONTROL, scenario)
    )
    by_scenario = {f"{kind}, {scenario}": ends for (kind, scenario), ends in sorted(counts.items())}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "soak.json", json.dumps(by_scenario, indent=2) + "\n")
    print(text)
    for line in ours:
        print(f"died where the control did not: {line}")
    return 1 if ours else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        play(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    sys.exit(main())
