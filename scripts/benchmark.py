"""Time nets with our layer, with ``nn.BatchNorm`` and with none, side by side."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: end at once, in silence
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for models

from scratchbn._command import Parser, fail, guarded, integer, positive
from scratchbn._writing import staged_folder

from bench import machine, memory, operators, plan
from bench.entries import ENTRIES, REFERENCE, WORKS
from bench.figure import draw
from bench.groups import measure_group
from bench.nets import LAYOUTS, NETS
from bench.report import Report
from bench.rounds import Effort
from bench.torch_client import TorchError, TorchWorker
from tqdm import tqdm

FILES = ("benchmark.json", "benchmark.md", "benchmark.png")

_ALL_NETS = (*NETS, *LAYOUTS)
_QUICK_NETS = ("lenet", "mlp", "layer_nchw")
_QUICK_WORKS = ("train", "inference")
_QUICK_ENTRIES = ("control", "none", "portable", "native", "auto")
_EFFORT, _QUICK_EFFORT = (6.0, 0.02), (0.5, 0.005)  # seconds of a group, of a sample at least

_DESCRIPTION = """\
Time nets with our layer, with nn.BatchNorm and with none, side by side.

Every entry of a net is built in the same process from the same parameters; then all take turns in
random order, round after round. What counts is the ratio of medians to nn.BatchNorm, with a
bootstrap 95% interval that is paired by round. The entry `control` is nn.BatchNorm once more: how
far it is from 1 is how far to trust the rest. Wall time and process time are both taken."""

_EPILOG = """\
entries
  builtin         nn.BatchNorm, what all others are compared with; always there
  control         nn.BatchNorm again
  none            no normalization: the ceiling
  textbook        the formula from means and broadcasts, without running averages; of the single
                  layers only the smaller ones
  portable        scratchbn from stock operators
  native          scratchbn's compiled kernel, where it is built
  auto            scratchbn as it comes
  file            what write_inference_symbol writes, imported, in the work `inference`
  builtin-folded  nn.BatchNorm through export_inference, in the work `folded`
  folded          scratchbn through export_inference, in the work `folded`

In the work `folded` the entries builtin, control and none run live, as in inference.

Single layers (layer_nchw, layer_nhwc, layer_2d) run on tensors from the size of the level 2 cache
to ten times that of level 3. Their times are given in multiples of the memory floor as well: 8
passes of the tensor for forward and backward, 2 for inference, at the bandwidth of a copy that
takes part in the same rounds. Peak memory is that of a process of its own for each entry.

Exit status: 0; 1 if an entry computes something else than nn.BatchNorm; 2 for an option that
cannot be used."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=_DESCRIPTION, epilog=_EPILOG)
    add = parser.add_argument
    nets = f"which of {', '.join(_ALL_NETS)} (default: all; with --quick {', '.join(_QUICK_NETS)})"
    entries = (
        "which entries, see below (default: all that can run here; with --quick "
        f"{', '.join(_QUICK_ENTRIES)})"
    )
    works = f"which of {', '.join(WORKS)} (default: all; with --quick {', '.join(_QUICK_WORKS)})"
    add("--nets", nargs="+", choices=_ALL_NETS, metavar="NET", help=nets)
    add("--entries", nargs="+", choices=ENTRIES, metavar="ENTRY", help=entries)
    batch = "sizes of batch for the nets (default: each its own)"
    add("--batch", nargs="+", type=integer(1), metavar="N", help=batch)
    add("--work", nargs="+", choices=WORKS, metavar="WORK", help=works)
    eager = "do not hybridize: nets and layers as they run live, without folded work and memory"
    add("--eager", action="store_true", help=eager)
    effort = parser.add_mutually_exclusive_group()
    seconds = (
        f"for each net in each kind of work (default: {_EFFORT[0]:g}, with --quick "
        f"{_QUICK_EFFORT[0]:g}); at least 5 rounds are run"
    )
    effort.add_argument("--seconds", type=positive, help=seconds)
    effort.add_argument("--rounds", type=integer(1), help="rounds, instead of seconds")
    quick = "a look in under a minute: few nets and entries, small layers, short samples, no memory"
    add("--quick", action="store_true", help=quick)
    peak = "measure peak memory in training (default: on, but for --quick and --eager)"
    add("--memory", action=argparse.BooleanOptionalAction, default=None, help=peak)
    add("--against", choices=("torch",), help="add the same nets in PyTorch, which must be there")
    python = "with --against torch, a Python that has it (default: this one)"
    add("--torch-python", metavar="PATH", help=python)
    threads = "sets OMP_NUM_THREADS (default: what MXNet takes)"
    add("--threads", type=integer(1), metavar="N", help=threads)
    profile = "only print the time of each operator in a step of the first --work"
    add("--profile", nargs=2, metavar=("NET", "ENTRY"), help=profile)
    out = f"where to write {', '.join(FILES)} (default: runs/benchmark)"
    add("--out", type=Path, default=Path("runs/benchmark"), metavar="DIR", help=out)
    add("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script on the arguments of the command line and return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    if options.threads and os.environ.get("OMP_NUM_THREADS") != str(options.threads):
        # MXNet read it when it was imported, before there were options.
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        return subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode
    if options.memory_of:
        net, entry = options.memory_of
        print(json.dumps({"bytes": memory.training_memory(NETS[net], entry)}))
        return 0
    try:
        if options.profile:
            net, entry = options.profile
            plan.runnable([net], {entry}, options.profile)
            print(operators.profile(net, entry, (options.work or WORKS)[0]), flush=True)
            return 0
        report = _measure(options, arguments)
    except (OSError, TorchError, ValueError) as error:
        return fail("benchmark.py", 2, str(error))
    text = report.to_markdown()
    with staged_folder(options.out) as folder:
        for name, content in zip(FILES, (report.to_json(), text)):
            (folder / name).write_text(content, "utf-8")
        draw(report, folder / FILES[2])
    print(f"{text}\nwritten to {options.out}", flush=True)
    return fail("benchmark.py", 1, "; ".join(report.wrong)) if report.wrong else 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what argparse cannot."""
    if options.torch_python and not options.against:
        parser.error("argument --torch-python: needs --against torch")
    if options.eager and options.memory:
        parser.error("argument --memory: only of hybridized nets, without --eager")
    for given, there in zip(options.profile or (), (_ALL_NETS, ENTRIES)):
        if given not in there:
            parser.error(f"argument --profile: {given!r} is none of {', '.join(there)}")


def _measure(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    """Measure what can run here of what was asked for."""
    quick = options.quick
    works = options.work or (_QUICK_WORKS if quick else WORKS)
    nets, entries, notes = plan.runnable(
        options.nets or (_QUICK_NETS if quick else _ALL_NETS),
        {REFERENCE, *(options.entries or (_QUICK_ENTRIES if quick else ENTRIES))},
        [*(options.nets or ()), *(options.entries or ())],
    )
    options.out.mkdir(parents=True, exist_ok=True)
    if not os.access(options.out, os.W_OK | os.X_OK):
        raise ValueError(f"argument --out: {str(options.out)!r} is not writable")
    command = shlex.join(["python", "scripts/benchmark.py", *arguments])
    report = Report(command, machine.describe(), machine.versions(), notes=notes)
    groups = plan.groups(nets, works, quick, report.notes, options.batch, options.eager)
    seconds, sample_seconds = _QUICK_EFFORT if quick else _EFFORT
    effort = Effort(options.seconds or seconds, options.rounds, sample_seconds)
    python = (options.torch_python or sys.executable) if options.against else ""
    with contextlib.ExitStack() as stack:
        torch = None
        if python:
            torch = stack.enter_context(_start_torch(python))
            report.versions["torch"] = torch.version
        for net, work in tqdm(groups, desc="benchmark", unit="group", disable=None):
            group = measure_group(net, work, entries, effort, torch)
            report.groups.append(group)
            for name, problem in group.problems.items():
                report.notes.append(f"{net.title}, {work}: {name} fails: {problem}")
    without = quick or options.eager
    if not without if options.memory is None else options.memory:
        measured = [NETS[name] for name in nets if name in NETS]
        report.memory, failed = memory.measure_memory(measured, entries, python)
        report.notes += failed
    report.machine["load average after"] = machine.load_average()
    return report


def _start_torch(python: str) -> TorchWorker:
    try:
        return TorchWorker(python)
    except TorchError as error:
        raise TorchError(
            f"argument --against: {error}; pip install torch, or name a Python that has it with "
            "--torch-python"
        ) from error


if __name__ == "__main__":
    sys.exit(guarded("benchmark.py", main))
