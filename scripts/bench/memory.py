"""How much memory training takes: each entry in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mxnet as mx
import psutil
from tqdm import tqdm

from .nets import Net
from .runner import WARM_UP, Data, build_runner
from .torch_client import TorchError, TorchWorker

_SCRIPT = Path(__file__).parents[1] / "benchmark.py"
_TIMEOUT = 300  # seconds for one process


def peak_memory(pid: int) -> int:
    """Return the most resident memory that a process ever had, in bytes; on Linux only."""
    # By hand: psutil does not know it, and ru_maxrss starts from the parent's peak.
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def training_memory(net: Net, entry: str) -> int:
    """Return how many bytes this process grows by at most while it builds and trains a net."""
    data = Data.of(net, with_values=False)
    mx.nd.waitall()
    process = psutil.Process()
    before = process.memory_info().rss
    build_runner(net, "train", entry, data).sample(WARM_UP)
    return peak_memory(process.pid) - before


def measure_memory(
    nets: Sequence[Net], entries: Sequence[str], torch_python: str
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return bytes by net and entry, and notes on what failed; PyTorch's if a Python is given."""
    pairs = [
        (net, entry)
        for net in nets
        for entry in net.entries("train", entries)
        if entry != "control"
    ]
    if torch_python:
        pairs += [(net, "torch") for net in nets]
    found: dict[str, dict[str, int]] = {}
    notes = []
    for net, entry in tqdm(pairs, desc="peak memory", unit="process", disable=None):
        try:
            if entry == "torch":
                nbytes = _torch_memory(net, torch_python)
            else:
                nbytes = _memory_of(net.name, entry)
        except (TorchError, ValueError) as error:
            notes.append(f"{net.name}, memory: {entry}: {error}")
            continue
        found.setdefault(net.name, {})[entry] = nbytes
    return found, notes


def _memory_of(net: str, entry: str) -> int:
    command = [sys.executable, str(_SCRIPT), "--memory-of", net, entry]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"no answer within {_TIMEOUT} s") from error
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"status {process.returncode}"]
        raise ValueError(said[-1])
    return int(json.loads(process.stdout.splitlines()[-1])["bytes"])


def _torch_memory(net: Net, python: str) -> int:
    with TorchWorker(python) as worker:
        before = psutil.Process(worker.pid).memory_info().rss
        worker.build(net.name, "train", net.shape)
        worker.sample(WARM_UP)
        return peak_memory(worker.pid) - before
