"""Time nets with our layer, with ``nn.BatchNorm`` and with none, side by side."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _scripting import Parser, staged

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from _benchmark_report import Report
    from _benchmark_runs import Net, Runner, Sampler
    from _benchmark_torch import TorchWorker

# Named here so that --help and wrong options need no MXNet.
NETS = ("lenet", "mlp", "cifar_resnet20_v1", "resnet18_v1", "channels_last", "conv1d")
LAYOUTS = ("layer_nchw", "layer_nhwc", "layer_2d")
WORKS = ("train", "inference", "folded")
ENTRIES = (
    *("builtin", "control", "none", "textbook", "portable", "native", "auto"),
    *("builtin-folded", "folded"),
)
FILES = ("benchmark.json", "benchmark.md", "benchmark.png")

_QUICK_NETS = ("lenet", "mlp", *LAYOUTS)
_SECONDS, _SAMPLE_SECONDS = 6.0, 0.02
_QUICK_SECONDS, _QUICK_SAMPLE_SECONDS = 1.0, 0.005
_MEMORY_TIMEOUT = 300  # seconds for one process
_PROFILE_STEPS = 20
_ALIVE = 40  # tensors of a single layer's size that all its entries hold together, at most

_DESCRIPTION = """\
Time nets with our layer, with nn.BatchNorm and with none, side by side.

Every entry of a net is built in the same process from the same parameters; then all take turns in
random order, round after round. What counts is the ratio of medians to nn.BatchNorm, with a
bootstrap 95% interval that is paired by round. The entry `control` is nn.BatchNorm once more: how
far it is from 1 is how far to trust the rest."""

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
  builtin-folded  nn.BatchNorm through export_inference, in the work `folded`
  folded          scratchbn through export_inference, in the work `folded`

In the work `folded` the entries builtin, control and none run live, as in inference.

Single layers (layer_nchw, layer_nhwc, layer_2d) run on tensors from the size of the level 2 cache
to ten times that of level 3. Their times are given in multiples of the memory floor as well: 8
passes of the tensor for forward and backward, 2 for inference, at the bandwidth of a copy that
takes part in the same rounds. Peak memory is that of a process of its own for each entry.

Exit status: 0; 1 if an entry computes something else than nn.BatchNorm; 2 for an option that
cannot be used."""


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer, at least 1; got {text!r}")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    all_nets = (*NETS, *LAYOUTS)
    add(
        "--nets",
        nargs="+",
        choices=all_nets,
        metavar="NET",
        help=f"which of {', '.join(all_nets)} (default: all; with --quick "
        f"{', '.join(_QUICK_NETS)})",
    )
    add(
        "--entries",
        nargs="+",
        choices=ENTRIES,
        metavar="ENTRY",
        help="which entries, see below (default: all that can run here)",
    )
    add(
        "--work",
        nargs="+",
        choices=WORKS,
        default=list(WORKS),
        metavar="WORK",
        help="which of train, inference and folded (default: all)",
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument(
        "--seconds",
        type=_positive_number,
        help=f"for each net in each kind of work (default: {_SECONDS:g}, with --quick "
        f"{_QUICK_SECONDS:g}); at least 5 rounds are run",
    )
    effort.add_argument("--rounds", type=_positive_integer, help="rounds, instead of seconds")
    add(
        "--quick",
        action="store_true",
        help="a look in under a minute: few nets, small layers, short samples, no memory",
    )
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure peak memory in training (default: on, but for --quick)",
    )
    add("--against", choices=("torch",), help="add the same nets in PyTorch, which must be there")
    add(
        "--torch-python",
        metavar="PATH",
        help="with --against torch, a Python that has it (default: this one)",
    )
    add(
        "--threads",
        type=_positive_integer,
        metavar="N",
        help="sets OMP_NUM_THREADS (default: what MXNet takes)",
    )
    add(
        "--profile",
        nargs=2,
        metavar=("NET", "ENTRY"),
        help="only print the time of each operator in a step of the first --work",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/benchmark"),
        metavar="DIR",
        help=f"where to write {', '.join(FILES)} (default: runs/benchmark)",
    )
    add("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Parameters
    ----------
    argv : sequence of str, optional
        The command line without the program's name; default: this process's.

    Returns
    -------
    int
        Exit status: 0, 1 or 2; ``--help`` says what they mean.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read when MXNet is loaded
    try:
        for needed in ("scratchbn.deploy", "matplotlib.figure", "tqdm"):
            import_module(needed)
        from _benchmark_torch import TorchError
    except (ImportError, OSError) as error:
        return _fail(2, f"{error}: pip install 'scratchbn[cpu,gluoncv,demo]' has all this needs")
    if options.memory_of:
        return _print_memory(*options.memory_of)
    try:
        notes = _leave_out(options)
        if options.profile:
            return _print_profile(options.profile, options.work[0])
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK | os.X_OK):
            raise ValueError(f"argument --out: {str(options.out)!r} is not writable")
        with ExitStack() as stack:
            worker = None
            if options.against:
                worker = _start_torch(options, stack)
            report = _measure(options, arguments, notes, worker)
    except (OSError, TorchError, ValueError) as error:
        return _fail(2, str(error))
    return _write(report, options.out)


def _fail(status: int, message: str) -> int:
    print(f"benchmark.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what argparse cannot, and fill in the defaults that depend on other options."""
    if options.torch_python and not options.against:
        parser.error("argument --torch-python: needs --against torch")
    if options.profile:
        net, entry = options.profile
        if net not in (*NETS, *LAYOUTS):
            parser.error(f"argument --profile: {net!r} is none of {', '.join((*NETS, *LAYOUTS))}")
        if entry not in ENTRIES:
            parser.error(f"argument --profile: {entry!r} is none of {', '.join(ENTRIES)}")
    if options.memory is None:
        options.memory = not options.quick


def _leave_out(options: argparse.Namespace) -> list[str]:
    """Take out what cannot run here; return notes on it.

    Raises
    ------
    ValueError
        If it was asked for by name.
    """
    from _benchmark_runs import NETS as nets
    from _benchmark_runs import REFERENCE, missing_backend

    chosen_nets = options.nets or (_QUICK_NETS if options.quick else (*NETS, *LAYOUTS))
    chosen_entries = {REFERENCE, *(options.entries or ENTRIES)}
    named = [*(options.nets or ()), *(options.entries or ())]
    if options.profile:
        named = options.profile
        chosen_nets, chosen_entries = named[:1], set(named[1:])
    reasons = {}
    for name in chosen_nets:
        needs = nets[name].needs if name in nets else ""
        if needs and importlib.util.find_spec(needs) is None:
            reasons[name] = f"needs {needs}"
    for name in ENTRIES:
        reason = missing_backend(name) if name in chosen_entries else None
        if reason:
            reasons[name] = reason
    for name, reason in reasons.items():
        if name in named:
            raise ValueError(f"{name} cannot run here: {reason}")
    options.nets = [name for name in dict.fromkeys(chosen_nets) if name not in reasons]
    options.entries = [name for name in ENTRIES if name in chosen_entries - reasons.keys()]
    return [f"{name} left out: {reason}" for name, reason in reasons.items()]


# --- measuring ----------------------------------------------------------------------------------


def _start_torch(options: argparse.Namespace, stack: ExitStack) -> TorchWorker:
    from _benchmark_torch import TorchError, TorchWorker

    python = options.torch_python or sys.executable
    try:
        return stack.enter_context(TorchWorker(python))
    except TorchError as error:
        raise TorchError(
            f"argument --against: {error}; pip install torch, or name a Python that has it with "
            "--torch-python"
        ) from error


def _measure(
    options: argparse.Namespace,
    arguments: Sequence[str],
    notes: list[str],
    worker: TorchWorker | None,
) -> Report:
    from _benchmark_report import Report
    from _benchmark_runs import Effort, measure_group
    from tqdm import tqdm

    report = Report(
        command=shlex.join(["python", "scripts/benchmark.py", *arguments]),
        machine=_machine(),
        versions=_versions(worker),
        notes=notes,
    )
    seconds, sample_seconds = (
        (_QUICK_SECONDS, _QUICK_SAMPLE_SECONDS) if options.quick else (_SECONDS, _SAMPLE_SECONDS)
    )
    effort = Effort(options.seconds or seconds, options.rounds, sample_seconds)
    jobs = _jobs(options, notes)
    with tqdm(jobs, desc="benchmark", unit="group", disable=None) as bar:
        for net, work in bar:
            others = None if worker is None else _torch_samplers(worker, net, work)
            group = measure_group(net, work, options.entries, effort, others)
            report.groups.append(group)
            for name, problem in group.problems.items():
                report.notes.append(f"{net.title}, {work}: {name} fails: {problem}")
    if options.memory:
        _measure_memory(options, report)
    report.machine["load average after"] = _load()
    return report


def _jobs(options: argparse.Namespace, notes: list[str]) -> list[tuple[Net, str]]:
    from _benchmark_runs import LAYOUTS as layouts
    from _benchmark_runs import NETS as nets
    from _benchmark_runs import single_layer
    from _benchmark_stats import available_memory, cache_sizes, sweep_sizes

    caches, memory = cache_sizes(), available_memory()
    sizes = sweep_sizes(caches[2], caches[3])[: 1 if options.quick else None]
    jobs = [(nets[name], work) for name in options.nets if name in nets for work in options.work]
    for layer in [single_layer(n, size) for n in options.nets if n in layouts for size in sizes]:
        if memory is not None and memory < _ALIVE * layer.nbytes:
            notes.append(f"{layer.title} left out: needs {_ALIVE} tensors of memory")
            continue
        jobs += [(layer, work) for work in options.work if work != "folded"]
    if not jobs:
        why = "; ".join(notes) or "single layers have no folded work"
        raise ValueError(f"there is nothing to measure: {why}")
    return jobs


def _torch_samplers(
    worker: TorchWorker, net: Net, work: str
) -> Callable[[Runner], Mapping[str, Sampler | str]]:
    from _benchmark_torch import TorchError

    name = "torch-folded" if work == "folded" else "torch"

    def offer(runner: Runner) -> Mapping[str, Sampler | str]:
        try:
            worker.build(net.name, work, net.shape, runner.parameters)
        except TorchError as error:
            return {name: str(error)}
        return {name: worker.sample}

    return offer


def _measure_memory(options: argparse.Namespace, report: Report) -> None:
    from _benchmark_runs import NETS as nets
    from _benchmark_torch import TorchError, TorchWorker
    from tqdm import tqdm

    chosen = [nets[name] for name in options.nets if name in nets]
    pairs = [
        (net, entry)
        for net in chosen
        for entry in net.entries("train", options.entries)
        if entry != "control"
    ]
    if options.against:
        pairs += [(net, options.against) for net in chosen]
    with tqdm(pairs, desc="peak memory", unit="process", disable=None) as bar:
        for net, entry in bar:
            try:
                if entry == options.against:
                    with TorchWorker(options.torch_python or sys.executable) as worker:
                        nbytes = worker.training_memory(net.name, net.shape)
                else:
                    nbytes = _memory_of(net.name, entry)
            except (TorchError, ValueError) as error:
                report.notes.append(f"{net.name}, memory: {entry}: {error}")
                continue
            report.memory.setdefault(net.name, {})[entry] = nbytes


def _memory_of(net: str, entry: str) -> int:
    """Measure in a process of its own.

    Raises
    ------
    ValueError
        If it fails.
    """
    try:
        process = subprocess.run(
            [sys.executable, __file__, "--memory-of", net, entry],
            capture_output=True,
            text=True,
            timeout=_MEMORY_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"no answer within {_MEMORY_TIMEOUT} s") from error
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"status {process.returncode}"]
        raise ValueError(said[-1])
    return int(json.loads(process.stdout.splitlines()[-1])["bytes"])


def _print_memory(net: str, entry: str) -> int:
    from _benchmark_runs import NETS as nets
    from _benchmark_runs import training_memory

    print(json.dumps({"bytes": training_memory(nets[net], entry)}))
    return 0


def _print_profile(net_and_entry: Sequence[str], work: str) -> int:
    from _benchmark_runs import ENTRIES as entries
    from _benchmark_runs import LAYOUTS as layouts
    from _benchmark_runs import NETS as nets
    from _benchmark_runs import prepare_profile, profile, single_layer
    from _benchmark_stats import cache_sizes

    name, entry = net_and_entry
    if work not in entries[entry].works:
        raise ValueError(f"argument --profile: {entry!r} takes no part in --work {work}")
    prepare_profile()
    net = single_layer(name, cache_sizes()[3]) if name in layouts else nets[name]
    rows, step = profile(net, work, entry, _PROFILE_STEPS)
    total = sum(row.ms for row in rows)
    print(f"{name} {'x'.join(map(str, net.shape))}, {work}, {entry}: {step:.2f} ms a step\n")
    width = max(len(row.operator) for row in rows)
    print(f"{'operator':<{width}}  {'calls':>6}  {'ms':>8}  {'share':>6}")
    for row in rows:
        print(f"{row.operator:<{width}}  {row.calls:>6g}  {row.ms:>8.3f}  {row.ms / total:>6.1%}")
    print(f"{'all':<{width}}  {'':>6}  {total:>8.3f}  {1:>6.1%}", flush=True)
    return 0


# --- where, and the files -----------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    from _benchmark_stats import cache_sizes

    facts: dict[str, Any] = {"CPU": _cpu_name(), "cores": os.cpu_count()}
    for level, nbytes in cache_sizes().items():
        facts[f"L{level}"] = f"{nbytes / 2**20:g} MiB"
    facts["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "not set")
    facts["load average before"] = _load()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _versions(worker: TorchWorker | None) -> dict[str, str]:
    import scratchbn

    import mxnet as mx

    found = {
        "scratchbn": scratchbn.__version__,
        "mxnet": mx.__version__,
        "numpy": metadata.version("numpy"),
        "Python": platform.python_version(),
        platform.system(): platform.release(),
    }
    if importlib.util.find_spec("gluoncv"):
        found["gluoncv"] = metadata.version("gluoncv")
    if worker is not None:
        found["torch"] = worker.version
    return found


def _write(report: Report, out: Path) -> int:
    from _benchmark_report import draw

    text = report.to_markdown()
    with staged(out) as folder:
        for name, content in zip(FILES, (report.to_json(), text)):
            (folder / name).write_text(content, "utf-8")
        draw(report, folder / FILES[2])
    print(text)
    print(f"written to {out}", flush=True)
    wrong = [
        f"{group.net}, {group.work}: {name} is {difference:.1e} from the built-in"
        for group in report.groups
        for name, difference in group.wrong.items()
    ]
    return _fail(1, "; ".join(wrong)) if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
