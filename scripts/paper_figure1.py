"""Repeat the MNIST experiment of the batch normalization paper: section 4.1, figure 1."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: end at once, in silence
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for models

import scratchbn
from scratchbn import DeviceError, ScratchBatchNorm, resolve_device
from scratchbn._command import Parser, fail, guarded, integer, positive
from scratchbn._text import table
from scratchbn._writing import staged_folder, write_text
from scratchbn.datasets import Dataset, DatasetError, load

import mxnet as mx
import numpy as np
from matplotlib.figure import Figure
from mxnet import autograd, gluon
from tqdm import tqdm

from models.mlp import binarize, initialize, mlp

NETS: dict[str, Any] = {"with": ScratchBatchNorm, "without": None}
PERCENTILES = (15, 50, 85)
MILESTONES = (100, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)

Run = dict[str, Any]  # what is kept of a run, as JSON

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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=_DESCRIPTION, epilog=_EPILOG)
    add = parser.add_argument
    add("--steps", type=integer(1), default=50_000, help="per run (default: 50000, the paper's)")
    seed = integer(0, 2**31 - 1)
    seeds = "one run of each net per seed, for weights and the order of images (default: 1 2 3)"
    add("--seeds", type=seed, nargs="+", default=[1, 2, 3], metavar="SEED", help=seeds)
    add("--batch-size", type=integer(1), default=60, help="images per step (default: 60)")
    add("--lr", type=positive, default=0.5, help="learning rate (default: 0.5)")
    sigma = "standard deviation of the first weights (default: 0.1)"
    add("--sigma", type=positive, default=0.1, help=sigma)
    add("--device", default="auto", help="auto, cpu, gpu or gpu:1 (default: auto, a GPU if usable)")
    data = (
        "auto, mnist, sample, fashion or a directory with the four IDX files (default: auto, "
        "full MNIST where it can be had, else the embedded sample)"
    )
    add("--data", default="auto", help=data)
    out = "where to write figure1.png, table.md and curves.json (default: runs/paper-figure1)"
    add("--out", type=Path, default=Path("runs/paper-figure1"), metavar="DIR", help=out)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script on the arguments of the command line and return its exit status."""
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
        return fail("paper_figure1.py", 2, str(error))
    print(f"data    {data.name}: {data.train:,} training and {data.test:,} test images")
    print(f"device  {device}", flush=True)
    try:
        seeds = dict.fromkeys(options.seeds)
        runs = [_finished_run(options, data, net, seed) for seed in seeds for net in NETS]
    except FloatingPointError as error:
        return fail("paper_figure1.py", 1, str(error))
    curves = [curve_of(run) for run in runs]
    text = summary(curves)
    with staged_folder(options.out) as folder:
        draw(curves, folder / "figure1.png", data.name)
        (folder / "table.md").write_text(text, "utf-8")
        (folder / "curves.json").write_text(json.dumps(curves) + "\n", "utf-8")
    print(f"\n{text}\nwritten to {options.out}", flush=True)
    return 0


class Digits:
    """A data set as the experiment needs it, on the device: images of 0 and 1, shape (N, 784)."""

    def __init__(self, dataset: Dataset, device: Any) -> None:
        self.name = dataset.name
        self.device = device
        self.train, self.test = len(dataset.train_labels), len(dataset.test_labels)
        digest = hashlib.sha256()
        for part in ("train_images", "train_labels", "test_images", "test_labels"):
            digest.update(np.ascontiguousarray(getattr(dataset, part)).tobytes())
        self.digest = digest.hexdigest()  # SHA-256 of all images and labels
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

    They share their Parameters, and nets of one seed their weights. The probe ends before the last
    sigmoid and never moves running statistics, as its layers have a momentum of 1.
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


def train(options: argparse.Namespace, data: Digits, name: str, seed: int) -> Run:
    """Train a net and return what was measured at T steps of it.

    ``step`` and ``accuracy`` on the test images have length T, ``percentiles`` of the sigmoids'
    inputs shape (T, 3, 100). FloatingPointError if the scores are not finite.
    """
    title = f"{name} batch normalization, seed {seed}"
    net, probe = build_pair(NETS[name], options.sigma, seed, data.device)
    loss = Loss(net)
    loss.hybridize(static_alloc=True, static_shape=True)
    sgd = {"learning_rate": options.lr}
    trainer = gluon.Trainer(net.collect_params(), "sgd", sgd, kvstore=None)
    order = batches(data.train, options.batch_size, options.steps, seed)
    chosen = mx.nd.array(order, data.device, "int32")
    wanted = evaluation_steps(options.steps)
    found: Run = {"step": wanted, "accuracy": [], "percentiles": []}

    def evaluate(step: int) -> None:
        mx.nd.waitall()  # a static graph does not make readers of running statistics wait
        scores = net(data.test_images).asnumpy()
        if not np.isfinite(scores).all():
            raise FloatingPointError(
                f"the scores of the net {title}, are not finite at step {step}: try a lower --lr"
            )
        with autograd.train_mode():
            inputs = probe(data.test_images).asnumpy()
        found["accuracy"].append(float((scores.argmax(axis=1) == data.test_labels).mean()))
        found["percentiles"].append(np.percentile(inputs, PERCENTILES, axis=0).tolist())

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


def _finished_run(options: argparse.Namespace, data: Digits, name: str, seed: int) -> Run:
    """Return a run from its file if it was made with the same options, else train and keep it."""
    made_with = {
        "net": name,
        "seed": seed,
        **{key: getattr(options, key) for key in ("steps", "batch_size", "lr", "sigma")},
        "data": data.name,
        "sha256": data.digest,
        "device": str(data.device),
        "version": scratchbn.__version__,
    }
    file = options.out / "runs" / f"{name}-{seed}.json"
    with suppress(FileNotFoundError, KeyError, TypeError, ValueError):
        kept: Run = json.loads(file.read_text("utf-8"))
        if kept["options"] == made_with:
            print(f"{name} batch normalization, seed {seed}: read from {file}", flush=True)
            return kept
    run = {"options": made_with, **train(options, data, name, seed)}
    write_text(file, json.dumps(run) + "\n")
    return run


def median_range(run: Run) -> np.ndarray:
    """Return the greatest less the least median of each sigmoid's input, shape (100,)."""
    medians = np.array(run["percentiles"])[:, 1]
    return medians.max(axis=0) - medians.min(axis=0)


def width_ratio(run: Run) -> np.ndarray:
    """Return the greatest over the least width, 15% to 85%, of each sigmoid's input, (100,)."""
    low, _, high = np.moveaxis(np.array(run["percentiles"]), 1, 0)
    widths = high - low
    return widths.max(axis=0) / widths.min(axis=0)


def curve_of(run: Run) -> Run:
    """Return what is shown of a run; the sigmoid is the one whose median has the middle range."""
    ranges = median_range(run)
    unit = int(np.argsort(ranges, kind="stable")[len(ranges) // 2])
    return {
        **{key: run[key] for key in ("options", "step", "accuracy")},
        "unit": unit,
        "percentiles": np.array(run["percentiles"])[:, :, unit].tolist(),
        "median_range": float(np.median(ranges)),
        "width_ratio": float(np.median(width_ratio(run))),
    }


def summary(curves: Sequence[Run]) -> str:
    """Return the result as a Markdown table: means over the seeds, with least and greatest."""
    rows: list[tuple[str, ...]] = []

    def add(title: str, values: list[float], show: Callable[[Any], str]) -> None:
        cells = []
        for name in NETS:
            of_net = [v for v, curve in zip(values, curves) if curve["options"]["net"] == name]
            mean, least, most = map(show, (np.mean(of_net), min(of_net), max(of_net)))
            cells.append(f"{mean} ({least} to {most})" if len(of_net) > 1 else mean)
        rows.append((title, *cells))

    def accuracy(value: float) -> str:
        return f"{value:.4f}".removeprefix("0")

    steps = curves[0]["step"]
    for step in sorted({*(m for m in MILESTONES if m < steps[-1]), steps[-1]}):
        i = steps.index(step)
        add(f"test accuracy after {step:,} steps", [c["accuracy"][i] for c in curves], accuracy)
    add("best test accuracy", [max(c["accuracy"]) for c in curves], accuracy)
    ranges, ratios = ([c[key] for c in curves] for key in ("median_range", "width_ratio"))
    add("range of the median of a sigmoid's input", ranges, "{:.2f}".format)
    add("width of its middle 70%, greatest over least", ratios, "{:.1f}".format)
    seeds = len(curves) // len(NETS)
    header = (f"{seeds} seed{'s' if seeds > 1 else ''}", *(f"{name} BN" for name in NETS))
    return table(header, rows, markdown=True) + "\n"


def draw(curves: Sequence[Run], path: Path, data_name: str) -> None:
    """Draw the three panels of the paper's figure and write them as PNG.

    Of the bands, the steps are on a logarithmic axis with 0 in front: the input of a sigmoid drifts
    most in the first hundreds.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, *bands = figure.subplots(1, 3)
    bands[1].sharey(bands[0])
    steps = curves[0]["step"]
    for axes, letter, name, color in zip(bands, "bc", NETS, ("C0", "C1")):
        of_net = [curve for curve in curves if curve["options"]["net"] == name]
        accuracy = 100 * np.array([curve["accuracy"] for curve in of_net])
        left.fill_between(
            steps, accuracy.min(axis=0), accuracy.max(axis=0), color=color, alpha=0.25
        )
        left.plot(steps, accuracy.mean(axis=0), color=color, label=f"{name} BN")
        _draw_band(axes, of_net[0], color)
        axes.set_title(f"({letter}) Input of a sigmoid, {name} BN")
    seeds = len(of_net)
    left.set(xscale="log", xlabel="training step", ylabel="test accuracy (%)")
    left.set_xlim(min(100, steps[-1] / 2), steps[-1])
    left.set_ylim(80 if min(curve["accuracy"][-1] for curve in curves) > 0.8 else 0, 100)
    left.set_title(f"(a) Mean and range of {seeds} seeds" if seeds > 1 else "(a) One seed")
    low, high = bands[0].get_ylim()
    bands[0].set_ylim(low - 0.25 * (high - low), high)
    for axes in (left, *bands):
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    left.legend(loc="lower right")
    figure.suptitle(f"Figure 1 of the batch normalization paper, on {data_name}")
    figure.savefig(path, dpi=120)


def _draw_band(axes: Any, curve: Run, color: str) -> None:
    steps = curve["step"]
    low, middle, high = np.array(curve["percentiles"]).T
    axes.fill_between(steps, low, high, color=color, alpha=0.25)
    for values, percentile, style in zip((low, middle, high), PERCENTILES, ("--", "-", "--")):
        axes.plot(steps, values, style, color=color)
        axes.text(1.15 * steps[-1], values[-1], f"{percentile}%", verticalalignment="center")
    width = high - low
    seen = (
        f"the median drifts by {np.ptp(middle):.1f},\n"
        f"the width grows {width.max() / width.min():.1f}-fold"
    )
    axes.text(0.04, 0.03, seen, transform=axes.transAxes)
    axes.set(xlabel="training step", xlim=(0, 5 * steps[-1]))
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, *(10**i for i in range(0, 1 + int(math.log10(steps[-1])), 2))])
    axes.minorticks_off()


if __name__ == "__main__":
    sys.exit(guarded("paper_figure1.py", main))
