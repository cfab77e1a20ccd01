"""Train LeNet on MNIST with scratchbn's batch norm, beside the same net with nn.BatchNorm.

Both nets start from the same parameters and see the same batches. Before training, one step of
both layers in float64 is compared on the CPU: outputs, gradients and running statistics. The run
of the tutorial "Batch Normalization from scratch" is the default.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: end at once, in silence
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # models stands beside scripts

from scratchbn._command import Parser, fail, guarded, integer, positive
from scratchbn.environment.install import install_command

NAME = "train_lenet.py"
try:
    import scratchbn.train as training  # first: mxnet alone would serve in a server, not return
    from scratchbn import DeviceError, ScratchBatchNorm
    from scratchbn._text import fitted, print_fitted, rich_table, terminal_width
    from scratchbn.datasets import Dataset, DatasetError, load
    from scratchbn.launch import LAUNCHER
    from scratchbn.monitor import Monitor
    from scratchbn.parity import Report, compare
    from scratchbn.train import Run, Session, Workers
    from scratchbn.train.plot import plot
    from scratchbn.train.repeat import check_alone, over_seeds
    from scratchbn.train.results import (
        check_metrics,
        earlier_results,
        finite_or_none,
        save_net,
        write_or_elsewhere,
    )

    import mxnet as mx
    import numpy as np
    from mxnet import autograd, gluon
    from mxnet.gluon import nn
    from rich.console import Console
    from tqdm import tqdm

    from models.lenet import INITIALIZATIONS, initialize, lenet
except (ImportError, OSError) as error:
    sys.exit(fail(NAME, 2, f"{error}: {install_command('cpu', 'demo')} has all this needs"))

NORMS: dict[str, Any] = {"scratch": ScratchBatchNorm, "builtin": nn.BatchNorm, "none": None}
EXPORT_TOLERANCE = 1e-4
EVALUATION_BATCH = 256

cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()

# --- options -----------------------------------------------------------------------------------

EPILOG = """\
The loss shown is the moving average (.99 of the old value, .01 of the new) of the mean loss of each
training batch. Seconds are those of the training steps, without the evaluation.

Ctrl-C and SIGTERM save a checkpoint and print the command that continues; a second one does not
wait. What the disk refuses is kept in memory, and written to a directory for temporary files at
the end.

Exit status: 0 if the comparison in float64 and the exported symbols hold; 1 if not, or if the loss
is not finite; 2 for an option, data set, device or checkpoint that cannot be used; 3 if the disk
refused a file; 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the output any more."""


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=NAME, description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--norm", choices=NORMS, default="scratch", help="norm layer (default: scratch)")
    add("--compare", action=argparse.BooleanOptionalAction,
        help="with --norm scratch, train the twin too and compare a step in float64 (default: on)")
    add("--init", choices=INITIALIZATIONS, default="tutorial",
        help="tutorial: weights, biases and beta N(0, 0.01), gamma N(1, 0.01); xavier: "
        "Xavier(magnitude=2.24) (default: tutorial)")
    add("--data", default="auto",
        help="mnist, sample, fashion, a directory with the four IDX files, or auto, full MNIST "
        "where it can be had, else the embedded sample (default: auto)")
    add("--epochs", type=integer(1), default=1, help="passes over the training set (default: 1)")
    add("--batch-size", type=integer(1), default=64, help="images per step, in all (default: 64)")
    add("--lr", type=positive, default=0.001,
        help="learning rate of plain SGD on the summed loss of a batch; the default, 0.001, equals "
        "0.064 on the mean loss of 64 images")
    add("--seed", type=integer(0, 2**31 - 1), default=1, help="for weights and order (default: 1)")
    add("--seeds", type=integer(2), metavar="N",
        help="train with N seeds, from --seed on, each in DIR/seed-S, and print the difference to "
        "nn.BatchNorm with its 95%% interval; --resume leaves out the seeds that are finished")
    add("--limit", type=integer(1), metavar="N", help="use the first N training and test images")
    add("--no-hybridize", dest="hybridize", action="store_false", help="train in eager mode")
    add("--debug", action="store_true",
        help="print the shapes of all layers and the statistics of every norm layer for one batch; "
        "while training, keep a table of the norm layers of the first net")
    add("--monitor", type=record_file, metavar="FILE",
        help="record the norm layers of the first net after every step, as .csv or .jsonl")
    add("--recalibrate", action="store_true",
        help="measure and save with statistics of the whole training set, not moving averages")
    add("--out", type=Path, default=Path("runs/lenet"), metavar="DIR",
        help="where to write metrics.json, curves.png, lenet.params, lenet-symbol.json, the faster "
        "lenet-infer-symbol.json and lenet-0000.params of both (default: runs/lenet)")
    training.add_arguments(parser)
    return parser
# fmt: on


def record_file(text: str) -> Path:
    """Parse the name of a file for the monitor."""
    if Path(text).suffix.lower() not in (".csv", ".jsonl"):
        raise argparse.ArgumentTypeError(f"must end in .csv or .jsonl, got {text!r}")
    return Path(text)


# --- data and nets -----------------------------------------------------------------------------

Data = tuple[np.ndarray, np.ndarray]


def prepare(images: np.ndarray, labels: np.ndarray, limit: int | None) -> Data:
    """Return pixels of shape (N, 1, 28, 28) in [0, 1] and labels of shape (N,), both float32."""
    return images[:limit, np.newaxis].astype("f4") / 255, labels[:limit].astype("f4")


def batches_of(data: Data, size: int, device: Any) -> Iterator[Any]:
    """Yield all images in order, as (pixels, labels) on a device."""
    for i in range(0, len(data[1]), size):
        yield [mx.nd.array(values[i : i + size], device) for values in data]


def build(norm: str, options: Namespace, devices: list[Any]) -> Any:
    """Build a LeNet whose parameters have values, the same ones whatever the norm layer."""
    mx.random.seed(options.seed)
    net = lenet(NORMS[norm], prefix="lenet_")
    initialize(net, options.init, devices)
    net(mx.nd.zeros((1, 1, 28, 28), devices[0]))
    net.hybridize(active=options.hybridize)
    return net


# --- before training ---------------------------------------------------------------------------


def cross_check(pixels: np.ndarray, labels: np.ndarray, seed: int) -> Report:
    """Compare a training step of both layers in float64, on the CPU (cuDNN's variance differs)."""
    with mx.cpu():
        y = mx.nd.array(labels)
        nets = lenet(NORMS["scratch"]), lenet(NORMS["builtin"])
        return compare(*nets, pixels, steps=1, seed=seed, loss=lambda x: cross_entropy(x, y))


def look_inside(net: Any, pixels: Any, labels: Any) -> None:
    """Print the shapes of one batch, and the statistics of each norm layer in a training step."""
    x = pixels
    print("shapes of one batch:", x.shape)
    for layer in net:
        x = layer(x)
        print(f"  {layer.name:<28} -> {x.shape}")
    with Monitor(net) as monitor:
        with autograd.record():
            loss = cross_entropy(net(pixels), labels)
        loss.backward()  # which is when the built-in moves its statistics
        monitor.step()
    names = ("batch_mean", "batch_var", "running_mean", "running_var", "gamma", "beta")
    rows = [
        [record["layer"], *(f"{record[f'{n}_min']:.3g} to {record[f'{n}_max']:.3g}" for n in names)]
        for record in monitor.records
    ]
    header = ["norm layer, least to largest channel", *(name.replace("_", " ") for name in names)]
    print(fitted(header, rows, terminal_width()) if rows else "no norm layers")


def watch(run: Run, options: Namespace, say: Callable[[str], None]) -> Any:
    """Return a monitor of a net in training, if one is asked for."""
    wanted = (options.debug or options.monitor) and run.name != "none"
    if not wanted or run.workers.rank != 0:
        return nullcontext()
    file, taken = options.monitor, len(run.losses)
    if file is not None and taken:  # resumed: beside the file of the steps before
        file = file.with_name(f"{file.stem}-after-step-{taken}{file.suffix}")
        say(f"the monitor counts on from step {taken} in {file}")
    return Monitor(run.net, path=file, console=options.debug)


# --- training ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script, as a worker of a job with --kvstore; return the exit status."""
    options = build_parser().parse_args(argv)
    try:
        workers = training.workers_of(options)
    except training.ClusterError as error:
        return fail(NAME, 2, str(error))
    try:
        return workers.leave(attempt(options, sys.argv[1:] if argv is None else argv, workers))
    except BaseException:
        training.end_on_error(workers)


def attempt(options: Namespace, arguments: Sequence[str], workers: Workers) -> int:
    """Train; return the exit status, and report in one line what the user can do about."""
    try:
        check_alone(options)
        devices, dataset = training.resolve_devices(options.device), load(options.data)
        training.make_directory(options.out)
    except (DatasetError, DeviceError, OSError, ValueError) as error:
        return fail(NAME, 2, str(error).replace("spec=", "argument --data: ", 1))
    twin = options.norm == "scratch" and options.compare is not False
    if options.compare and not twin and workers.rank == 0:
        print(f"note: --compare does nothing with --norm {options.norm}", flush=True)
    options.compare = twin
    try:
        if options.seeds:
            once = partial(train, devices=devices, dataset=dataset, workers=workers)
            return over_seeds(options, dataset.name, once)
        return train(options, devices, dataset, workers)
    except training.Interrupted as interruption:
        if interruption.path is None:
            return fail(NAME, interruption.status, str(interruption))
        if workers.rank == 0:
            resume = [] if options.resume else ["--resume"]
            command = shlex.join([sys.executable, os.path.abspath(__file__), *arguments, *resume])
            launcher = os.environ.get(LAUNCHER, "")
            output = sys.stderr if interruption.status == 128 + signal.SIGPIPE else sys.stdout
            print(f"{interruption}\nto go on: {launcher}{command}", file=output, flush=True)
        return interruption.status
    except FloatingPointError as error:
        return fail(NAME, 1, f"{error}: try a lower --lr")
    except training.WriteError as error:
        return fail(NAME, 3, str(error))
    except BrokenPipeError:
        raise
    except (training.CheckpointError, OSError) as error:
        return fail(NAME, 2, str(error))


def train(options: Namespace, devices: list[Any], dataset: Dataset, workers: Workers) -> int:
    """Train, measure, write the files; return the exit status."""
    say = print_fitted if workers.rank == 0 else lambda line: None
    images = prepare(dataset.train_images, dataset.train_labels, options.limit)
    test = prepare(dataset.test_images, dataset.test_labels, options.limit)
    counts = {"train": len(images[1]), "test": len(test[1])}
    device, device_names = devices[0], ", ".join(map(str, devices))
    say(f"data    {dataset.name}: {counts['train']:,} training and {counts['test']:,} test images")
    say(f"device  {device_names}" + (f"\nworkers {workers.size}" if workers.size > 1 else ""))
    if there := earlier_results(options.out, options, dataset.name):
        say(f"note: {options.out} holds {there}; they are replaced at the end")
    sgd = {"learning_rate": options.lr}
    runs = [
        Run(norm, build(norm, options, devices), cross_entropy, "sgd", sgd, workers)
        for norm in ([options.norm, "builtin"] if options.compare else [options.norm])
    ]
    orders = [
        np.random.default_rng((options.seed, epoch)).permutation(counts["train"])
        for epoch in range(options.epochs)
    ]
    decisive = ("norm", "compare", "init", "batch_size", "lr", "seed", "recalibrate")
    session = Session(
        runs,
        orders,
        options.batch_size,
        options.out / "checkpoints",
        identity={
            **{f"--{name.replace('_', '-')}": getattr(options, name) for name in decisive},
            "--no-hybridize": not options.hybridize,
            "data": dataset.name,
            "images": [*images, *test],
        },
        seed=options.seed,
        every=options.checkpoint_every,
        place={"--device": device_names},
        resume=options.resume,
        say=say,
        progress=not options.debug,  # which shows a table
    )

    def evaluated(run: Run) -> Any:
        seen = batches_of(images, options.batch_size, device) if options.recalibrate else None
        return run.evaluated(partial(build, run.name, options, [device]), seen)

    def accuracy(net: Any, data: Data) -> float:
        correct = 0.0
        batches = batches_of(data, EVALUATION_BATCH, device)
        for x, y in tqdm(batches, "accuracy", leave=False, disable=options.debug or None):
            correct += (net(x).argmax(axis=1) == y).sum().asscalar()
            session.interruption_point()
        return float(correct / len(data[1]))

    with session:
        check = None
        if workers.rank == 0:
            pixels, labels = (values[orders[0][: options.batch_size]] for values in images)
            if options.debug:
                net = build(options.norm, options, [device])
                look_inside(net, mx.nd.array(pixels, device), mx.nd.array(labels, device))
            if options.compare:
                check = cross_check(pixels, labels, options.seed)
                verdict = "holds" if check else "FAILED, see the end"
                say(f"cross-check with nn.BatchNorm, one step in float64: {verdict}")

        with watch(runs[0], options, say) as monitor:
            for run, epoch, batches in session.epochs():
                for batch in batches:
                    run.step(images[0][batch], images[1][batch])
                    if monitor is not None and run is runs[0]:
                        monitor.step()

                net, measured = evaluated(run), [0.0, 0.0]
                if workers.rank == 0:  # and tells the others
                    measured = [accuracy(net, images), accuracy(net, test)]
                train_acc, test_acc = workers.gather("accuracy", measured)[0].tolist()
                end = run.end_epoch(train_acc=train_acc, test_acc=test_acc)
                accuracies = f"train accuracy {train_acc:.4f}  test accuracy {test_acc:.4f}"
                taken = f"{end['seconds']:.{int(end['seconds'] < 10)}f} s"
                say(f"epoch {epoch} {run.name:<7}  loss {end['loss']:.4f}  {accuracies}  {taken}")

        net = evaluated(runs[0])
        if workers.rank != 0:
            return 0
        about = {"device": device_names, "workers": workers.size, "options": vars(options)}
        metrics = {"data": {"name": dataset.name, "source": dataset.source, **counts}, **about}
        sample = mx.nd.array(test[0][:EVALUATION_BATCH], device)
        status = write_results(metrics, runs, net, sample, check)
        return fail(NAME, 3, session.unsaved) if session.unsaved else status


# --- results -----------------------------------------------------------------------------------


def write_results(
    metrics: dict[str, Any], runs: list[Run], net: Any, sample: Any, check: Report | None
) -> int:
    """Write all files at once, print a table and what failed; return the exit status."""
    out, status = metrics["options"]["out"], 0
    epochs = [{"norm": run.name, **epoch} for run in runs for epoch in run.epochs]
    metrics["epochs"] = sorted(epochs, key=lambda epoch: epoch["epoch"])
    metrics["crosscheck"] = check_metrics(check)

    def write(folder: Path) -> float:
        exported = save_net(net, sample, folder / "lenet")
        plot(runs, folder / "curves.png", f"LeNet on {metrics['data']['name']}")
        metrics["export"] = {"max_abs_diff": finite_or_none(exported)}
        text = json.dumps(metrics, indent=2, default=str)
        (folder / "metrics.json").write_text(text + "\n", "utf-8")
        return exported

    exported, out, refused = write_or_elsewhere(out, write)
    if refused is not None:
        status = fail(NAME, 3, f"cannot write to {refused}; the results are in {out}")
    print_table(runs, check, exported)
    print(f"written to {out}", flush=True)

    if check is not None and not check:
        print(check)
        status = fail(NAME, 1, f"the cross-check {check.verdict}")
    if not exported <= EXPORT_TOLERANCE:
        status = fail(NAME, 1, f"an exported symbol differs from the net by {exported:.1e}")
    if not status:
        agreeing = "" if check is None else "a step in float64 is that of nn.BatchNorm, "
        print_fitted(f"holds: {agreeing}the exported symbols agree with the net")
    return status


def print_table(runs: list[Run], check: Report | None, exported: float) -> None:
    """Print the last epoch of each net, and the largest differences of the comparisons."""
    last = [run.epochs[-1] for run in runs]
    rows = [
        [key.replace("_acc", " accuracy"), *(f"{epoch[key]:.4f}" for epoch in last)]
        for key in ("loss", "train_acc", "test_acc")
    ]
    rows += [["seconds", *(f"{sum(e['seconds'] for e in run.epochs):.1f}" for run in runs)]]
    if check is not None:
        rows += [["largest difference in float64", "found", "allowed"]]
        for kind, row in check.worst(lambda row: row.kind).items():
            found = f"{'' if row.ok else 'FAILED '}{row.absolute:.1e}"
            rows += [[f"  {kind}", found, f"{row.allowed:.0e}"]]
    rows += [["exported symbols, scores", f"{exported:.1e}"]]
    count = last[0]["epoch"]
    title = f"LeNet after {count} epoch{'s' if count > 1 else ''}"
    Console().print(rich_table(title, ["", *(run.name for run in runs)], rows))


if __name__ == "__main__":
    sys.exit(guarded(NAME, main))
