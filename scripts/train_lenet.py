"""Train LeNet with scratchbn's batch normalization beside MXNet's own, and compare the two.

The run of the tutorial "Batch Normalization from scratch" is the default.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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

Exit status: 0 if the comparison in float64 and the exported symbol hold; 1 if not, or if the loss
is not finite; 2 for an option, data set or device that cannot be used."""


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
    add("--device", default="auto", help="auto, cpu, gpu or gpu:1 (default: auto, a GPU if usable)")
    add(
        "--data",
        default="auto",
        help="auto, mnist, sample, fashion or a directory with the four IDX files (default: auto, "
        "full MNIST where it can be had, else the embedded sample)",
    )
    add("--epochs", type=_integer(1), default=1, help="passes over the training set (default: 1)")
    add("--batch-size", type=_integer(1), default=64, help="images per step (default: 64)")
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
        "layer for one batch",
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
    try:
        from scratchbn import DeviceError, resolve_device
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
        device = resolve_device(options.device)
        dataset = load(options.data)
        _prepare_directory(options.out)
    except (DatasetError, DeviceError, OSError, ValueError) as error:
        return _fail(2, str(error))
    train = Images.from_bytes(dataset.train_images, dataset.train_labels, options.limit)
    test = Images.from_bytes(dataset.test_images, dataset.test_labels, options.limit)
    data = {
        "name": dataset.name,
        "source": dataset.source,
        "train": len(train),
        "test": len(test),
    }
    print(f"data    {dataset.name}: {len(train):,} training and {len(test):,} test images")
    print(f"device  {device}", flush=True)
    try:
        return _train_and_report(options, device, data, train, test)
    except FloatingPointError as error:
        return _fail(1, str(error))


def _fail(status: int, message: str) -> int:
    print(f"train_lenet.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _prepare_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"argument --out: {str(directory)!r} cannot be a directory ({error.strerror})"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"argument --out: {str(directory)!r} is not writable")


def _train_and_report(
    options: argparse.Namespace, device: Any, data: dict[str, Any], train: Images, test: Images
) -> int:
    import mxnet as mx
    from _training import build, cross_check, look_inside, start, train_epoch

    compare = options.norm == "scratch" and options.compare is not False
    if options.compare and not compare:
        print(f"note: --compare does nothing with --norm {options.norm}")

    mx.random.seed(options.seed)
    orders = [
        np.random.default_rng((options.seed, epoch)).permutation(len(train))
        for epoch in range(options.epochs)
    ]
    first = orders[0][: options.batch_size]
    batch = train.pixels[first], train.labels[first]

    net = build(options.norm, options.init, device)
    if options.debug:
        copy = build(options.norm, options.init, device, like=net)
        _print_debug(look_inside(copy, *batch, device))
    check = cross_check(net, *batch, options.lr, options.seed) if compare else None
    if check is not None:
        verdict = "holds" if check.ok else "FAILED, see the end"
        print(f"cross-check with nn.BatchNorm, one step in float64: {verdict}", flush=True)

    runs = [start(net, options.norm, options.lr, device, options.hybridize)]
    if compare:
        twin = build("builtin", options.init, device, like=net)
        runs.append(start(twin, "builtin", options.lr, device, options.hybridize))
    for order in orders:
        for run in runs:
            result = train_epoch(run, train, test, order, options.batch_size)
            print(
                f"epoch {result.epoch}  {result.norm:<7}  loss {result.loss:.4f}  "
                f"train accuracy {result.train_acc:.4f}  test accuracy {result.test_acc:.4f}  "
                f"{result.seconds:.1f} s",
                flush=True,
            )

    sample = mx.nd.array(test.pixels[:256], ctx=device)
    with staged(options.out) as folder:
        exported = _save_net(runs[0].net, sample, folder)
        _draw_curves(runs, folder / "curves.png", data["name"])
        metrics = _metrics(options, device, data, runs, check, exported)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    _print_table(runs, check, exported)
    print(f"written to {options.out}", flush=True)
    return _judge(check, exported)


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


def _metrics(
    options: argparse.Namespace,
    device: Any,
    data: dict[str, Any],
    runs: list[Run],
    check: CrossCheck | None,
    exported: float,
) -> dict[str, Any]:
    epochs = [epoch for run in runs for epoch in run.epochs]
    epochs.sort(key=lambda e: e.epoch)
    return {
        "data": data,
        "device": str(device),
        "options": {**vars(options), "out": str(options.out), "compare": check is not None},
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
