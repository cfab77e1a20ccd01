"""A group: the entries of one net in one kind of work, built from the same values and timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scratchbn._text import first_line

import mxnet as mx
from tqdm import tqdm

from .entries import REFERENCE
from .nets import Net
from .rounds import Effort, take_samples
from .runner import Data, Sampler, build_runner, copy_runner
from .torch_client import TorchError, TorchWorker

COPY = "copy"  # beside single layers: the memory bandwidth
# How far outputs may be from the built-in's, relative to the largest: float32 through a deep net.
_TOLERANCE = 1e-3


@dataclass
class Group:
    """The measurements of one net, or single layer, in one kind of work; the dicts by entry."""

    net: str
    work: str
    shape: tuple[int, ...]  # of the data
    nbytes: int
    layer: bool
    steps: dict[str, int] = field(default_factory=dict)  # in a sample
    samples: dict[str, list[float]] = field(default_factory=dict)  # seconds per step, by round
    process: dict[str, list[float]] = field(default_factory=dict)  # the same, of process time
    # How far the output is from the built-in's, relative to its largest.
    differences: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # why there are no samples

    @property
    def wrong(self) -> dict[str, float]:
        """The entries that compute something else than the built-in."""
        return {name: d for name, d in self.differences.items() if not d <= _TOLERANCE}


def measure_group(
    net: Net,
    work: str,
    entries: Sequence[str],
    effort: Effort,
    torch: TorchWorker | None = None,
) -> Group:
    """Measure the entries of one net, and PyTorch where there is a worker."""
    group = Group(net.label, work, net.shape, net.nbytes, net.layer)
    data = Data.of(net)
    samplers: dict[str, Sampler] = {}
    runner, expected = None, None
    title = f"{net.title}, {work}"
    for name in tqdm(net.entries(work, entries), title, leave=False, disable=None, unit="build"):
        try:
            runner = build_runner(net, work, name, data)
            output = runner.output()
            mx.nd.waitall()
        except mx.MXNetError as error:
            group.problems[name] = f"MXNetError: {first_line(error)}"
            continue
        samplers[name] = runner.sample
        expected = output if name == REFERENCE else expected
        if expected is not None and name not in (REFERENCE, "none"):
            group.differences[name] = _difference(output, expected)
    output = expected = None  # free their memory
    if net.layer:
        samplers[COPY] = copy_runner(data).sample
    if torch is not None and runner is not None:
        name = "torch-folded" if work == "folded" else "torch"
        try:
            torch.build(net.name, work, net.shape, runner.parameters)
            samplers[name] = torch.sample
        except TorchError as error:
            group.problems[name] = str(error)
    group.steps, taken = take_samples(samplers, effort, title)
    group.samples = {name: [seconds.wall for seconds in times] for name, times in taken.items()}
    group.process = {name: [s.process for s in times] for name, times in taken.items()}
    return group


def _difference(output: Any, expected: Any) -> float:
    largest = expected.abs().max().asscalar()
    return float((output - expected).abs().max().asscalar() / (largest or 1))
