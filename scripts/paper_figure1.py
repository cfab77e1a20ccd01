"""Repeat the MNIST experiment of the batch normalization paper: section 4.1, figure 1."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

import scratchbn  # noqa: E402  (prepares the runtime, so it comes before mxnet)

# isort: split
from scratchbn import DeviceError, ScratchBatchNorm, resolve_device  # noqa: E402
from scratchbn.datasets import DatasetError, load  # noqa: E402

import mxnet as mx  # noqa: E402
import numpy as np  # noqa: E402
from _scripting import Parser, staged  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from mxnet import autograd, gluon  # noqa: E402
from tqdm import tqdm  # noqa: E402

from models.mlp import binarize, initialize, mlp  # noqa: E402

NETS: dict[str, Any] = {"with": ScratchBatchNorm, "without": None}
PERCENTILES = (15, 50, 85)
MILESTONES = (100, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)

_COLORS = {"with": "C0", "without": "C1"}
_LARGEST_SEED = 2**31 - 1

_DESCRIPTION = """\
Train the paper's net on binary MNIST with batch normalization and without: three layers of 100
sigmoid units, 60 images per step, plain SGD on the mean cross entropy. Both nets start from the
same weights and see the same batches.

Test accuracy is that of inference, with the running statistics. The percentiles are those of what
the sigmoids of the last hidden layer are given for the test images, normalized as in training, with
the statistics of the batch, here all test images. Taking them moves no running statistics."""

_EPILOG = """\
Each run is kept in DIR/runs when it has finished. Started again with the same options and data, the
script reads it from there.

Exit status: 0; 1 if the scores of a net are not finite; 2 for an option, data set or device that
cannot be used."""


def _integer(least: int, most: float = math.inf) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if not least <= value <= most:
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
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
    add("--steps", type=_integer(1), default=50_000, help="per run (default: 50000, the paper's)")
    add(
        "--seeds",
        type=_integer(0, _LARGEST_SEED),
        nargs="+",
        default=[1, 2, 3],
        metavar="SEED",
        help="one run of each net per seed, for the weights and the order of the images "
        "(default: 1 2 3)",
    )
    add("--batch-size", type=_integer(1), default=60, help="images per step (default: 60)")
    add("--lr", type=_positive_number, default=0.5, help="learning rate (default: 0.5)")
    add(
        "--sigma",
        type=_positive_number,
        default=0.1,
        help="standard deviation of the first weights (default: 0.1)",
    )
    add("--device", default="auto", help="auto, cpu, gpu or gpu:1 (default: auto, a GPU if usable)")
    add(
        "--data",
        default="auto",
        help="auto, mnist, sample, fashion or a directory with the four IDX files (default: auto, "
        "full MNIST where it can be had, else the embedded sample)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/paper-figure1"),
        metavar="DIR",
        help="where to write figure1.png, table.md and curves.json (default: runs/paper-figure1)",
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
        device = resolve_device(options.device)
        data = Digits(load(options.data), device)
        if options.batch_size > data.train:
            raise ValueError(
                f"argument --batch-size: {options.batch_size} is more than the {data.train:,} "
                "training images"
            )
        (options.out / "runs").mkdir(parents=True, exist_ok=True)
    except (DatasetError, DeviceError, OSError, ValueError) as error:
        return _fail(2, str(error))
    print(f"data    {data.name}: {data.train:,} training and {data.test:,} test images")
    print(f"device  {device}", flush=True)
    try:
        runs = [
            _finished_run(options, data, net, seed)
            for seed in dict.fromkeys(options.seeds)
            for net in NETS
        ]
    except FloatingPointError as error:
        return _fail(1, str(error))
    text = table(runs)
    with staged(options.out) as folder:
        draw(runs, folder / "figure1.png", data.name)
        (folder / "table.md").write_text(text, "utf-8")
        (folder / "curves.json").write_text(json.dumps(curves(runs)) + "\n", "utf-8")
    print(f"\n{text}\nwritten to {options.out}", flush=True)
    return 0


def _fail(status: int, message: str) -> int:
    print(f"paper_figure1.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


# --- training ----------------------------------------------------------------------------------


class Digits:
    """A data set as the experiment needs it, on the device.

    Parameters
    ----------
    dataset : scratchbn.datasets.Dataset
    device : mxnet.Context

    Attributes
    ----------
    name, digest : str
        The digest is a SHA-256 of all images and labels.
    train, test : int
        How many images there are.
    train_images, test_images : NDArray, shape (N, 784), float32
        Of 0 and 1.
    train_labels : NDArray, shape (N,), float32
    test_labels : numpy.ndarray, shape (N,), int32
    """

    def __init__(self, dataset: Any, device: Any) -> None:
        self.name = dataset.name
        self.device = device
        self.train, self.test = len(dataset.train_labels), len(dataset.test_labels)
        digest = hashlib.sha256()
        for part in ("train_images", "train_labels", "test_images", "test_labels"):
            digest.update(np.ascontiguousarray(getattr(dataset, part)).tobytes())
        self.digest = digest.hexdigest()
        self.train_images = mx.nd.array(binarize(dataset.train_images), ctx=device)
        self.train_labels = mx.nd.array(dataset.train_labels, ctx=device, dtype="float32")
        self.test_images = mx.nd.array(binarize(dataset.test_images), ctx=device)
        self.test_labels = dataset.test_labels


class Loss(gluon.HybridBlock):
    """The cross entropy of a net for chosen images: all of a step's forward in one graph."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()

    def hybrid_forward(self, F: Any, chosen: Any, images: Any, labels: Any) -> Any:
        """Return the losses, shape (n,), of the n images at the indices `chosen`."""
        return self.cross_entropy(self.net(F.take(images, chosen)), F.take(labels, chosen))


def build_pair(norm: Any, sigma: float, seed: int, device: Any) -> tuple[Any, Any]:
    """Build a net, and what shows the input of its last sigmoids in training.

    Parameters
    ----------
    norm : ScratchBatchNorm or None
    sigma : float
        Standard deviation of the weights.
    seed : int
        Nets of the same seed start from the same weights, whatever their norm layer.
    device : mxnet.Context

    Returns
    -------
    net, probe : HybridSequential
        They share their Parameters. The probe ends before the last sigmoid and never moves running
        statistics, as its layers have a momentum of 1.
    """
    mx.random.seed(seed)
    net = mlp(norm, prefix="mlp_")
    initialize(net, sigma, device)
    net(mx.nd.zeros((1, 784), ctx=device))
    still = None if norm is None else {"momentum": 1.0}
    twin = mlp(norm, still, prefix=net.prefix, params=net.collect_params())
    probe = gluon.nn.HybridSequential()
    probe.add(*list(twin)[:-2])
    for block in (net, probe):
        block.hybridize(static_alloc=True, static_shape=True)
    return net, probe


def evaluation_steps(steps: int) -> list[int]:
    """Return when to evaluate: at the start, then ever more seldom, and evenly spread as well."""
    growing = np.geomspace(1, steps, 40).round()
    even = np.linspace(0, steps, 51).round()
    return sorted({*map(int, growing), *map(int, even), *(m for m in MILESTONES if m <= steps)})


def batches(images: int, size: int, steps: int, seed: int) -> np.ndarray:
    """Return the images of each step, shape (steps, size), int32: one permutation after another."""
    rng = np.random.default_rng(seed)
    epochs = math.ceil(steps * size / images)
    order = np.concatenate([rng.permutation(images).astype(np.int32) for _ in range(epochs)])
    return order[: steps * size].reshape(steps, size)


def train(options: argparse.Namespace, data: Digits, name: str, seed: int) -> dict[str, Any]:
    """Train a net and return what was measured on the way.

    Parameters
    ----------
    options : argparse.Namespace
        Of :func:`build_parser`.
    data : Digits
    name : {'with', 'without'}
        The net.
    seed : int

    Returns
    -------
    dict
        ``step``, a list of length T; ``accuracy``, the fraction of test images classified right,
        likewise; ``percentiles``, nested lists of shape (T, 3, 100), in the unit of the sigmoid's
        input.

    Raises
    ------
    FloatingPointError
        If the scores for the test images are not finite.
    """
    net, probe = build_pair(NETS[name], options.sigma, seed, data.device)
    loss = Loss(net)
    loss.hybridize(static_alloc=True, static_shape=True)
    trainer = gluon.Trainer(
        net.collect_params(), "sgd", {"learning_rate": options.lr}, kvstore=None
    )
    chosen = mx.nd.array(
        batches(data.train, options.batch_size, options.steps, seed), data.device, "int32"
    )
    wanted = evaluation_steps(options.steps)
    found: dict[str, Any] = {"step": wanted, "accuracy": [], "percentiles": []}

    def evaluate(step: int) -> None:
        mx.nd.waitall()  # a static graph does not make readers of running statistics wait
        scores = net(data.test_images).asnumpy()
        if not np.isfinite(scores).all():
            raise FloatingPointError(
                f"the scores of the net {name} batch normalization, seed {seed}, are not finite at "
                f"step {step}: try a lower --lr"
            )
        with autograd.train_mode():
            inputs = probe(data.test_images).asnumpy()
        found["accuracy"].append(float((scores.argmax(axis=1) == data.test_labels).mean()))
        found["percentiles"].append(np.percentile(inputs, PERCENTILES, axis=0).tolist())

    title = f"{name} batch normalization, seed {seed}"
    with tqdm(total=options.steps, desc=title, unit="step", disable=None) as bar:
        evaluate(0)
        for before, until in zip(wanted, wanted[1:]):
            for step in range(before, until):
                with autograd.record():
                    losses = loss(chosen[step], data.train_images, data.train_labels)
                losses.backward()
                trainer.step(options.batch_size)
            evaluate(until)
            bar.set_postfix(accuracy=f"{found['accuracy'][-1]:.4f}", refresh=False)
            bar.update(until - before)
    return found


def _finished_run(
    options: argparse.Namespace, data: Digits, name: str, seed: int
) -> dict[str, Any]:
    """Return a run from its file if it was made with the same options, else train and keep it."""
    made_with = {
        "net": name,
        "seed": seed,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "sigma": options.sigma,
        "data": data.name,
        "sha256": data.digest,
        "device": str(data.device),
        "version": scratchbn.__version__,
    }
    file = options.out / "runs" / f"{name}-{seed}.json"
    kept = _read(file)
    if kept is not None and kept["options"] == made_with:
        print(f"{name} batch normalization, seed {seed}: read from {file}", flush=True)
        return kept
    run = {"options": made_with, **train(options, data, name, seed)}
    with staged(file.parent) as folder:
        (folder / file.name).write_text(json.dumps(run) + "\n", "utf-8")
    return run


def _read(file: Path) -> dict[str, Any] | None:
    """Return the run in a file, or None if there is none."""
    try:
        run = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    needed = {"options", "step", "accuracy", "percentiles"}
    return run if isinstance(run, dict) and needed <= run.keys() else None


# --- what came of it ----------------------------------------------------------------------------


def median_range(run: dict[str, Any]) -> np.ndarray:
    """Return how far the median of each sigmoid's input wandered, shape (100,).

    The distance between its least and its greatest value during training.
    """
    medians = np.array(run["percentiles"])[:, 1]
    return medians.max(axis=0) - medians.min(axis=0)


def width_ratio(run: dict[str, Any]) -> np.ndarray:
    """Return how much the spread of each sigmoid's input changed, shape (100,).

    The greatest distance from the 15th to the 85th percentile during training, over the least.
    """
    found = np.array(run["percentiles"])
    widths = found[:, 2] - found[:, 0]
    return widths.max(axis=0) / widths.min(axis=0)


def typical_unit(run: dict[str, Any]) -> int:
    """Return the sigmoid whose median wandered neither much nor little: the middle one of all."""
    ranges = median_range(run)
    return int(np.argsort(ranges, kind="stable")[len(ranges) // 2])


def curves(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the picture shows, for each run, ready for JSON."""
    return [
        {
            "options": run["options"],
            "step": run["step"],
            "accuracy": run["accuracy"],
            "unit": typical_unit(run),
            "percentiles": np.array(run["percentiles"])[:, :, typical_unit(run)].tolist(),
            "median_range": float(np.median(median_range(run))),
            "width_ratio": float(np.median(width_ratio(run))),
        }
        for run in runs
    ]


def table(runs: list[dict[str, Any]]) -> str:
    """Return the result as a Markdown table: means over the seeds, with least and greatest."""
    first = runs[0]
    seeds = {run["options"]["seed"] for run in runs}
    last = first["step"][-1]
    heads = [f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}", *(f"{name} BN" for name in NETS)]
    rows = [f"| {' | '.join(heads)} |", "|---|---|---|"]

    def add(title: str, of_run: Any, show: Any) -> None:
        cells = []
        for name in NETS:
            values = [of_run(run) for run in runs if run["options"]["net"] == name]
            mean, least, most = np.mean(values), min(values), max(values)
            spread = f" ({show(least)} to {show(most)})" if len(values) > 1 else ""
            cells.append(show(mean) + spread)
        rows.append(f"| {title} | {' | '.join(cells)} |")

    def accuracy(value: float) -> str:
        return f"{value:.4f}".removeprefix("0")

    for step in sorted({*(m for m in MILESTONES if m < last), last}):
        place = first["step"].index(step)
        add(f"test accuracy after {step:,} steps", lambda r, p=place: r["accuracy"][p], accuracy)
    add("best test accuracy", lambda run: max(run["accuracy"]), accuracy)
    add(
        "range of the median of a sigmoid's input",
        lambda run: np.median(median_range(run)),
        "{:.2f}".format,
    )
    add(
        "width of its middle 70%, greatest over least",
        lambda run: np.median(width_ratio(run)),
        "{:.1f}".format,
    )
    return "\n".join(rows) + "\n"


def draw(runs: list[dict[str, Any]], path: Path, data_name: str) -> None:
    """Draw the three panels of the paper's figure and write them as PNG."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, *bands = figure.subplots(1, 3)
    bands[1].sharey(bands[0])
    for axes, name in zip(bands, NETS):
        of_net = [run for run in runs if run["options"]["net"] == name]
        steps, label = of_net[0]["step"], f"{name} BN"
        accuracies = 100 * np.array([run["accuracy"] for run in of_net])
        left.fill_between(
            steps, accuracies.min(axis=0), accuracies.max(axis=0), color=_COLORS[name], alpha=0.25
        )
        left.plot(steps, accuracies.mean(axis=0), color=_COLORS[name], label=label)

        unit = typical_unit(of_net[0])
        low, middle, high = np.array(of_net[0]["percentiles"])[:, :, unit].T
        axes.fill_between(steps, low, high, color=_COLORS[name], alpha=0.25)
        for values, percentile, style in zip((low, middle, high), PERCENTILES, ("--", "-", "--")):
            axes.plot(steps, values, style, color=_COLORS[name])
            axes.annotate(
                f"{percentile}%",
                (steps[-1], values[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                verticalalignment="center",
            )
        axes.set(
            xlim=(0, 1.14 * steps[-1]),
            xlabel="training step",
            ylabel="input of a sigmoid",
            title=f"({'bc'[bands.index(axes)]}) Percentiles {label}",
        )
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    seeds = len({run["options"]["seed"] for run in runs})
    left.set(
        xscale="log",
        xlim=(min(100, runs[0]["step"][-1] / 2), runs[0]["step"][-1]),
        ylim=(80 if min(run["accuracy"][-1] for run in runs) > 0.8 else 0, 100),
        xlabel="training step",
        ylabel="test accuracy (%)",
        title=f"(a) Mean and range of {seeds} seeds" if seeds > 1 else "(a) One seed",
    )
    left.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (left, *bands):
        axes.grid(alpha=0.3)
    left.legend(loc="lower right")
    figure.suptitle(f"Figure 1 of the batch normalization paper, on {data_name}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
