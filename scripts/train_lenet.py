"""Train LeNet with scratchbn's batch normalization beside MXNet's own, and compare the two.

The run of the tutorial "Batch Normalization from scratch" is the default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _checkpoint import CheckpointError, Checkpoints
from _cluster import ALONE, LAUNCHER, ClusterError, Workers, end_on_error, join
from _scripting import Parser, staged

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from _training import CrossCheck, Images, LayerView, Run

_EXPORT_TOLERANCE = 1e-4
_LARGEST_SEED = 2**31 - 1

_DESCRIPTION = """\
Train LeNet on MNIST with scratchbn's batch normalization, beside the same net with nn.BatchNorm.

Both nets start from the same parameters and see the same batches. Before training, one step of
both in float64 is compared on the CPU: outputs, gradients, parameters and running statistics."""

_EPILOG = """\
The loss shown is the moving average (.99 of the old value, .01 of the new) of the mean loss of each
training batch. Seconds are those of the training steps, without the evaluation.

Ctrl-C saves a checkpoint and prints the command that goes on; a second Ctrl-C does not wait.

Exit status: 0 if the comparison in float64 and the exported symbol hold; 1 if not, or if the loss
is not finite; 2 for an option, data set, device or checkpoint that cannot be used; 130 after
Ctrl-C."""


def _integer(least: int, most: int | None = None) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text!r}")
        return value

    return parse


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
    return value


def _record_file(text: str) -> Path:
    if Path(text).suffix.lower() not in (".csv", ".jsonl"):
        raise argparse.ArgumentTypeError(f"must end in .csv or .jsonl, got {text!r}")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--norm",
        choices=("scratch", "builtin", "none"),
        default="scratch",
        help="norm layer of the net to train (default: scratch)",
    )
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="with --norm scratch, train the twin with nn.BatchNorm too and compare one step in "
        "float64 (default: on)",
    )
    add(
        "--init",
        choices=("tutorial", "xavier"),
        default="tutorial",
        help="tutorial: weights, biases and beta N(0, 0.01), gamma N(1, 0.01); xavier: "
        "Xavier(magnitude=2.24) (default: tutorial)",
    )
    add(
        "--device",
        default="auto",
        help="auto, cpu, gpu, gpu:1, or several that divide every batch among them, as gpu:0,gpu:1 "
        "(default: auto, a GPU if usable)",
    )
    add(
        "--data",
        default="auto",
        help="auto, mnist, sample, fashion or a directory with the four IDX files (default: auto, "
        "full MNIST where it can be had, else the embedded sample)",
    )
    add("--epochs", type=_integer(1), default=1, help="passes over the training set (default: 1)")
    add(
        "--batch-size",
        type=_integer(1),
        default=64,
        help="images per step, over all devices and workers (default: 64)",
    )
    add(
        "--lr",
        type=_positive_number,
        default=0.001,
        help="learning rate of plain SGD on the summed loss of a batch; the default, 0.001, equals "
        "0.064 on the mean loss of 64 images",
    )
    add(
        "--seed",
        type=_integer(0, _LARGEST_SEED),
        default=1,
        help="for the initial parameters and the order of the images (default: 1)",
    )
    add(
        "--limit",
        type=_integer(1),
        metavar="N",
        help="use only the first N training and the first N test images",
    )
    add("--no-hybridize", dest="hybridize", action="store_false", help="train in eager mode")
    add(
        "--debug",
        action="store_true",
        help="before training, print the shapes of all layers and the statistics of every norm "
        "layer for one batch; while training, keep a table of the norm layers of the first net",
    )
    add(
        "--monitor",
        type=_record_file,
        metavar="FILE",
        help="record the norm layers of the first net after every step, as .csv or .jsonl",
    )
    add(
        "--recalibrate",
        action="store_true",
        help="measure and save the nets with statistics of the whole training set in place of the "
        "moving averages",
    )
    add(
        "--checkpoint-every",
        type=_integer(1),
        metavar="STEPS",
        help="save what the run needs to go on, in DIR/checkpoints, after so many training steps "
        "(those of the twin count too) and at the end",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the newest good checkpoint in DIR/checkpoints, if there is any",
    )
    add(
        "--kvstore",
        choices=("dist_sync",),
        help="train as a worker of a job on MXNet's parameter server; scripts/launch_local.py "
        "starts one on this machine, docs/training.md is for several machines",
    )
    add(
        "--timeout",
        type=_integer(2),
        default=60,
        metavar="SECONDS",
        help="with --kvstore, how long a process may be silent before the job ends (default: 60)",
    )
    add(
        "--join-timeout",
        type=_integer(1),
        default=300,
        metavar="SECONDS",
        help="with --kvstore, how long the processes may take to join the job (default: 300)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/lenet"),
        metavar="DIR",
        help="where to write metrics.json, curves.png, lenet.params, lenet-symbol.json and "
        "lenet-0000.params (default: runs/lenet)",
    )
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
    options = build_parser().parse_args(argv)
    arguments = list(sys.argv[1:] if argv is None else argv)
    workers: Workers = ALONE
    try:
        from scratchbn import DeviceError  # noqa: F401  (prepares numpy and CUDA for mxnet)

        if options.kvstore is not None:
            workers = join(options.join_timeout, options.timeout)
        elif os.environ.get("DMLC_ROLE"):
            raise ClusterError("DMLC_ROLE is set: add --kvstore dist_sync, or unset it")
    except (ClusterError, ImportError, OSError) as error:
        return _fail(2, str(error))
    try:
        return workers.leave(_run(options, arguments, workers))
    except BaseException:
        end_on_error(workers)


def _run(options: argparse.Namespace, arguments: list[str], workers: Workers) -> int:
    try:
        from scratchbn import DeviceError
        from scratchbn.datasets import DatasetError, load

        from _training import Images

        for needed_at_the_end in ("matplotlib.figure", "rich.table"):
            import_module(needed_at_the_end)
    except (ImportError, OSError) as error:
        return _fail(
            2,
            f"{error}: pip install 'scratchbn[cpu,demo]' has all this needs "
            "(python -m scratchbn doctor says what is there)",
        )
    try:
        devices = _devices(options.device)
        dataset = load(options.data)
        _prepare_directory(options.out)
        train = Images.from_bytes(dataset.train_images, dataset.train_labels, options.limit)
        test = Images.from_bytes(dataset.test_images, dataset.test_labels, options.limit)
        data = {
            "name": dataset.name,
            "source": dataset.source,
            "train": len(train),
            "test": len(test),
        }
        training = _Training(options, arguments, workers, devices, data, train, test)
    except (DatasetError, DeviceError, OSError, ValueError) as error:
        return _fail(2, str(error))
    training.say(f"data    {dataset.name}: {len(train):,} training and {len(test):,} test images")
    training.say(f"device  {training.device_names}")
    if workers.size > 1:
        training.say(f"workers {workers.size}")
    try:
        with _ctrl_c(training):
            return training.run()
    except _Interrupted:
        return training.interrupt()
    except FloatingPointError as error:
        return _fail(1, str(error))
    except (CheckpointError, OSError) as error:
        return _fail(2, str(error))


def _fail(status: int, message: str) -> int:
    print(f"train_lenet.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _devices(spec: str) -> list[Any]:
    from scratchbn import resolve_device

    names = spec.split(",")
    devices = [resolve_device(name) for name in names]
    if len(devices) > 1 and "auto" in names:
        raise ValueError(f"argument --device: auto is one device, it cannot be in {spec!r}")
    if len(set(devices)) < len(devices):
        raise ValueError(f"argument --device: {spec!r} has a device twice")
    if len({device.device_type for device in devices}) > 1:
        raise ValueError(f"argument --device: {spec!r} has devices of two kinds")
    return devices


def _prepare_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"argument --out: {str(directory)!r} cannot be a directory ({error.strerror})"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"argument --out: {str(directory)!r} is not writable")


class _Interrupted(Exception):
    """Ctrl-C, at a point where the run can be saved."""


@contextmanager
def _ctrl_c(training: _Training) -> Iterator[None]:
    """Have Ctrl-C asked for, not thrown into the middle of a step; a second one is thrown."""

    def request(*_: Any) -> None:
        if training.stop_requested:
            raise KeyboardInterrupt
        training.stop_requested = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class _Training:
    """One command: the runs it trains, from where they stand to the files at the end."""

    def __init__(
        self,
        options: argparse.Namespace,
        arguments: list[str],
        workers: Workers,
        devices: list[Any],
        data: dict[str, Any],
        train: Images,
        test: Images,
    ) -> None:
        self.stop_requested = False
        self.device_names = ", ".join(map(str, devices))
        self._options = options
        self._arguments = arguments
        self._workers = workers
        self._devices = devices
        self._data = data
        self._train = train
        self._test = test
        self._compare = options.norm == "scratch" and options.compare is not False
        self._orders = [
            np.random.default_rng((options.seed, epoch)).permutation(len(train))
            for epoch in range(options.epochs)
        ]
        self._checkpoints = Checkpoints(options.out / "checkpoints", self._identity())
        self._runs: list[Run] = []
        self._monitor: Any = None

    def say(self, line: str) -> None:
        """Print a line, in one worker."""
        if self._workers.rank == 0:
            print(line, flush=True)

    def run(self) -> int:
        """Train, measure, write the files; return the exit status."""
        import mxnet as mx
        from _training import build, cross_check, look_inside, start

        options, device = self._options, self._devices[0]
        folder = self._checkpoint_to_resume()
        if options.compare and not self._compare:
            self.say(f"note: --compare does nothing with --norm {options.norm}")

        mx.random.seed(options.seed)
        first = self._orders[0][: options.batch_size]
        batch = self._train.pixels[first], self._train.labels[first]
        net = build(options.norm, options.init, self._devices)
        check = None
        if self._workers.rank == 0:
            if options.debug:
                copy = build(options.norm, options.init, [device], like=net)
                _print_debug(look_inside(copy, *batch, device))
            if self._compare:
                check = cross_check(net, *batch, options.lr, options.seed)
                verdict = "holds" if check.ok else "FAILED, see the end"
                self.say(f"cross-check with nn.BatchNorm, one step in float64: {verdict}")

        nets = [(net, options.norm)]
        if self._compare:
            nets.append((build("builtin", options.init, self._devices, like=net), "builtin"))
        self._runs = [
            start(net, norm, options.lr, self._devices, options.hybridize, self._workers)
            for net, norm in nets
        ]
        if folder is not None:
            self._load(folder)
        self._train_all()
        return self._write_files(check)

    def interrupt(self) -> int:
        """Save a checkpoint after Ctrl-C and say how to go on; return the exit status."""
        try:
            path = self._save()
        except CheckpointError as error:
            return _fail(130, f"interrupted; no checkpoint was saved: {error}")
        resume = [] if self._options.resume else ["--resume"]
        script = [sys.executable, str(Path(__file__).resolve())]
        command = shlex.join([*script, *self._arguments, *resume])
        self.say(f"interrupted; saved {path}\nto go on: {os.environ.get(LAUNCHER, '')}{command}")
        return 130

    def _identity(self) -> dict[str, Any]:
        """Return what decides the result."""
        import scratchbn

        import mxnet as mx

        options = self._options
        return {
            "--norm": options.norm,
            "--compare": self._compare,
            "--init": options.init,
            "--device": self.device_names,
            "--batch-size": options.batch_size,
            "--lr": options.lr,
            "--seed": options.seed,
            "--no-hybridize": not options.hybridize,
            "--recalibrate": options.recalibrate,
            "workers": self._workers.size,
            "data": self._data["name"],
            "images": _digest(
                self._train.pixels, self._train.labels, self._test.pixels, self._test.labels
            ),
            "order of the images": _digest(self._orders[0]),
            "backend": scratchbn.get_backend(),
            "versions": f"scratchbn {scratchbn.__version__}, mxnet {mx.__version__}",
        }

    def _checkpoint_to_resume(self) -> Path | None:
        """Return the checkpoint to go on from; raise CheckpointError before anything is changed."""
        folder = None
        if self._options.resume:
            folder = self._checkpoints.newest(lambda line: self.say(f"note: {line}"))
            if folder is None:
                self.say(f"no checkpoint in {self._checkpoints.directory}: starting afresh")
        elif self._options.checkpoint_every and self._checkpoints.steps():
            raise CheckpointError(
                f"{self._checkpoints.directory} has checkpoints already: add --resume to go on "
                "from them, or choose another --out"
            )
        steps = self._workers.gather("resumed", -1 if folder is None else int(folder.name[5:]))
        if len(set(steps.tolist())) > 1:
            raise CheckpointError(
                f"the workers found different checkpoints, of steps {steps.tolist()}: --out must "
                "be a directory that all of them share"
            )
        return folder

    def _load(self, folder: Path) -> None:
        from _training import load_run

        for run in self._runs:
            load_run(run, folder)
            if len(run.losses) > len(self._orders) * self._steps_per_epoch:
                raise CheckpointError(
                    f"{folder} is beyond the end of --epochs {len(self._orders)}: its "
                    f"{run.norm} net has taken {len(run.losses)} steps"
                )
        self.say(f"resumed from {folder}")

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self._train) / self._options.batch_size)

    @property
    def _steps(self) -> int:
        return sum(len(run.losses) for run in self._runs)

    def _save(self) -> Path:
        """Save a checkpoint of all runs; all workers call this."""
        from _training import gather_statistics, save_run

        path = self._checkpoints.path(self._steps)
        statistics = [gather_statistics(run) for run in self._runs]

        def write(folder: Path) -> None:
            for run, copies in zip(self._runs, statistics):
                save_run(run, copies, folder)

        if self._workers.rank == 0:
            self._checkpoints.save(self._steps, write)
        self._workers.gather("saved", 0)
        return path

    def _train_all(self) -> None:
        from scratchbn.monitor import Monitor

        from _training import seed_step, train_epoch

        options = self._options
        watch: Any = nullcontext()
        if self._is_monitored():
            watch = Monitor(self._runs[0].net, path=self._monitor_file(), console=options.debug)
        with watch as self._monitor:
            for epoch, order in enumerate(self._orders):
                for run in self._runs:
                    if len(run.epochs) > epoch:  # before the checkpoint
                        continue
                    seed_step(options.seed, len(run.losses))
                    result = train_epoch(
                        run,
                        self._train,
                        self._test,
                        order,
                        options.batch_size,
                        after_step=self._after_step,
                        check=self._stop_if_alone,
                        recalibrated=options.recalibrate,
                        bars=not options.debug,
                    )
                    self.say(
                        f"epoch {result.epoch}  {result.norm:<7}  loss {result.loss:.4f}  "
                        f"train accuracy {result.train_acc:.4f}  "
                        f"test accuracy {result.test_acc:.4f}  {result.seconds:.1f} s"
                    )
        if options.checkpoint_every:
            self._save()

    def _is_monitored(self) -> bool:
        options = self._options
        wanted = options.monitor is not None or options.debug
        return wanted and options.norm != "none" and self._workers.rank == 0

    def _monitor_file(self) -> Path | None:
        """Return where to record: a file beside that of the steps before the checkpoint."""
        file: Path | None = self._options.monitor
        taken = len(self._runs[0].losses)
        if file is None or not taken:
            return file
        file = file.with_name(f"{file.stem}-after-step-{taken}{file.suffix}")
        self.say(f"the monitor counts on from step {taken} in {file}")
        return file

    def _after_step(self, run: Run) -> None:
        from _training import seed_step

        if self._monitor is not None and run is self._runs[0]:
            self._monitor.step()
        if self._workers.gather("stop", self.stop_requested).any():
            raise _Interrupted
        every = self._options.checkpoint_every
        if every and self._steps % every == 0:
            self._save()
            seed_step(self._options.seed, len(run.losses))

    def _stop_if_alone(self) -> None:
        # Only one worker measures; the others would not know.
        if self.stop_requested and self._workers.size == 1:
            raise _Interrupted

    def _write_files(self, check: CrossCheck | None) -> int:
        import mxnet as mx
        from _training import measurable

        options, run = self._options, self._runs[0]
        if run.measured is None:  # all epochs were in the checkpoint
            run.measured = measurable(run, self._train, options.batch_size, options.recalibrate)
        if self._workers.rank != 0:
            return 0
        sample = mx.nd.array(self._test.pixels[:256], ctx=self._devices[0])
        with staged(options.out) as folder:
            exported = _save_net(run.measured, sample, folder)
            _draw_curves(self._runs, folder / "curves.png", self._data["name"])
            metrics = {
                "data": self._data,
                "device": self.device_names,
                "workers": self._workers.size,
                "options": {**vars(options), "compare": check is not None},
                **_metrics(self._runs, check, exported),
            }
            text = json.dumps(metrics, indent=2, default=str)
            (folder / "metrics.json").write_text(text + "\n", "utf-8")
        _print_table(self._runs, check, exported)
        self.say(f"written to {options.out}")
        return _judge(check, exported)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _judge(check: CrossCheck | None, exported: float) -> int:
    status = 0
    if check is not None and not check.ok:
        worst = [str(d) for d in check.worst().values() if not d.ok]
        status = _fail(
            1,
            f"the cross-check failed for {len(check.failed)} of {len(check.differences)} tensors; "
            f"the worst of each group: {'; '.join(worst)}",
        )
    if not exported <= _EXPORT_TOLERANCE:
        status = _fail(1, f"the exported symbol's scores differ from the net's by {exported:.1e}")
    return status


# --- files -------------------------------------------------------------------------------------


def _save_net(net: Any, sample: Any, folder: Path) -> float:
    """Write parameters and symbol; return how far the symbol read back differs in its scores."""
    from mxnet.gluon import SymbolBlock

    net.save_parameters(str(folder / "lenet.params"))
    expected = net(sample)
    net.hybridize()
    net(sample)
    net.export(str(folder / "lenet"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Cannot decide type")  # of data; it is float32
        imported = SymbolBlock.imports(
            str(folder / "lenet-symbol.json"),
            ["data"],
            str(folder / "lenet-0000.params"),
            ctx=sample.context,
        )
    return float((imported(sample) - expected).abs().max().asscalar())


def _metrics(runs: list[Run], check: CrossCheck | None, exported: float) -> dict[str, Any]:
    epochs = [epoch for run in runs for epoch in run.epochs]
    epochs.sort(key=lambda e: e.epoch)
    return {
        "epochs": [asdict(epoch) for epoch in epochs],
        "crosscheck": _cross_check_metrics(check),
        "export": {"max_abs_diff": _finite_or_none(exported)},
    }


def _cross_check_metrics(check: CrossCheck | None) -> dict[str, Any]:
    if check is None:
        return {"ok": None, "max_abs_diff": {}}
    from _training import TOLERANCES

    tensors: dict[str, dict[str, float | None]] = {group: {} for group in TOLERANCES}
    for d in check.differences:
        tensors[d.group][d.tensor] = _finite_or_none(d.absolute)
    return {
        "ok": check.ok,
        "max_abs_diff": {g: _finite_or_none(v) for g, v in check.max_abs_diff().items()},
        "tolerance": TOLERANCES,
        "failed": [f"{d.group}: {d.tensor}" for d in check.failed],
        "tensors": tensors,
    }


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _draw_curves(runs: list[Run], path: Path, data_name: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, style, run in zip(("C0", "C1"), ("-", "--"), runs):
        steps = range(1, len(run.losses) + 1)
        left.plot(steps, run.losses, style, color=color, label=run.norm)
        numbers = [e.epoch for e in run.epochs]
        for marker, part in (("o", "train"), ("s", "test")):
            right.plot(
                numbers,
                [100 * getattr(e, f"{part}_acc") for e in run.epochs],
                style,
                marker=marker,
                color=color,
                fillstyle="full" if part == "train" else "none",
                label=f"{run.norm}, {part}",
            )
    left.set(
        yscale="log",
        xlabel="training step",
        ylabel="loss (cross entropy, nats)",
        title="Moving average of the batch loss",
    )
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    right.set(xlabel="epochs", ylabel="accuracy (%)", title="Accuracy at the end of each epoch")
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.set_xlim(0.5, len(runs[0].epochs) + 0.5)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(f"LeNet on {data_name}")
    figure.savefig(path, dpi=120)


# --- tables ------------------------------------------------------------------------------------


def _print_debug(layers: list[LayerView]) -> None:
    from rich.console import Console
    from rich.table import Table

    print("shapes of one batch:", layers[0].input_shape)
    for layer in layers:
        print(f"  {layer.name:<28} -> {layer.output_shape}")
    norms = [layer for layer in layers if layer.arrays]
    if not norms:
        print("no norm layers")
        return
    table = Table(title="Norm layers in one training batch: least and largest channel")
    table.add_column("")
    for layer in norms:
        table.add_column(f"{layer.name}\n{layer.input_shape}", justify="right")
    for quantity in norms[0].arrays:
        ranges = [(layer.arrays[quantity].min(), layer.arrays[quantity].max()) for layer in norms]
        table.add_row(quantity, *(f"{low:.4g}\n{high:.4g}" for low, high in ranges))
    Console().print(table)


def _print_table(runs: list[Run], check: CrossCheck | None, exported: float) -> None:
    from _training import TOLERANCES
    from rich.console import Console
    from rich.table import Table

    last = [run.epochs[-1] for run in runs]
    table = Table(title=f"LeNet after {last[0].epoch} epoch{'s' if last[0].epoch > 1 else ''}")
    table.add_column("")
    for run in runs:
        table.add_column(run.norm, justify="right")
    table.add_row("loss", *(f"{e.loss:.4f}" for e in last))
    table.add_row("train accuracy", *(f"{e.train_acc:.4f}" for e in last))
    table.add_row("test accuracy", *(f"{e.test_acc:.4f}" for e in last))
    table.add_row("seconds", *(f"{sum(e.seconds for e in run.epochs):.1f}" for run in runs))
    if check is not None:
        table.caption = "* relative to max(1, |expected|); eager and hybridized"
        table.add_section()
        table.add_row("largest difference in float64*", "found", "allowed")
        for group, d in check.worst().items():
            title = group.replace("_", " ")
            flag = "" if d.ok else "FAILED "
            table.add_row(f"  {title}", f"{flag}{d.relative:.1e}", f"{TOLERANCES[group]:.0e}")
    table.add_section()
    table.add_row("exported symbol, scores", f"{exported:.1e}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
