"""Train nets on the same batches, compare their first step in float64, look into their layers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scratchbn import ScratchBatchNorm, recalibrate

import mxnet as mx
import numpy as np
from _cluster import ALONE, Workers
from mxnet import autograd, gluon
from mxnet.gluon import nn
from tqdm import tqdm

from models.lenet import initialize, lenet

NORMS: dict[str, Any] = {"scratch": ScratchBatchNorm, "builtin": nn.BatchNorm, "none": None}

# Largest difference allowed in the cross-check, relative to max(1, |expected|). The built-in keeps
# its momentum in float32, which moves its float64 running statistics; ours must meet the formula.
TOLERANCES = {
    "outputs": 1e-10,
    "gradients": 1e-10,
    "parameters": 1e-10,
    "running_statistics": 1e-6,
    "running_statistics_formula": 1e-12,
}

_PREFIX = "lenet_"
_KEEP = 0.99  # of the moving average of the loss
_MOMENTUM = 0.9  # the default of both layers
_EVALUATION_BATCH = 256

_cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels of shape (N, 1, 28, 28), float32 in [0, 1], and labels of shape (N,)."""

    pixels: np.ndarray
    labels: np.ndarray

    @classmethod
    def from_bytes(cls, images: np.ndarray, labels: np.ndarray, limit: int | None) -> Images:
        """Scale the first `limit` uint8 images of shape (N, 28, 28)."""
        pixels = images[:limit, np.newaxis].astype(np.float32) / 255
        return cls(pixels, labels[:limit])

    def __len__(self) -> int:
        return len(self.labels)

    def on(self, device: Any, chosen: np.ndarray) -> tuple[Any, Any]:
        """Return the images of these numbers as (pixels, labels) arrays."""
        dtype = self.pixels.dtype
        return (
            mx.nd.array(self.pixels[chosen], ctx=device, dtype=dtype),
            mx.nd.array(self.labels[chosen], ctx=device, dtype=dtype),
        )

    def batches(self, size: int, device: Any) -> Iterator[tuple[Any, Any]]:
        """Yield all images in order as (pixels, labels) arrays; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.on(device, np.arange(start, min(start + size, len(self))))


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to; `seconds` is the time for its training steps alone."""

    epoch: int
    norm: str
    loss: float
    train_acc: float
    test_acc: float
    seconds: float


@dataclass
class Run:
    """A net in training, on one device or on several.

    `losses` is the moving average of the mean batch loss after each step, `seconds` the time for
    the training steps of the epoch under way, `measured` the net that the last epoch measured.
    """

    norm: str
    net: Any
    trainer: Any
    devices: list[Any]
    workers: Workers
    hybridize: bool
    losses: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0
    measured: Any = None


def build(norm: str, init: str, devices: list[Any], like: Any = None) -> Any:
    """Build a LeNet whose parameters all have values: fresh ones, or those of the net `like`."""
    net = lenet(NORMS[norm], prefix=_PREFIX)
    initialize(net, init, devices)
    net(mx.nd.zeros((1, 1, 28, 28), ctx=devices[0]))
    if like is not None:
        write_values(net, read_values(like))
    return net


def start(
    net: Any, norm: str, lr: float, devices: list[Any], hybridize: bool, workers: Workers = ALONE
) -> Run:
    """Prepare a net for plain SGD on the summed loss."""
    if hybridize:
        net.hybridize()
    trainer = gluon.Trainer(
        # Without the statistics: a Trainer's first step copies device 0's values to all devices.
        _trained(net),
        "sgd",
        {"learning_rate": lr},
        kvstore=workers.key_store(norm),
        update_on_kvstore=False,
    )
    return Run(norm, net, trainer, devices, workers, hybridize)


def read_values(net: Any) -> dict[str, np.ndarray]:
    """Return the value of every parameter by name, as it is on the net's first device."""
    mx.nd.waitall()
    return {name: p.list_data()[0].asnumpy() for name, p in net.collect_params().items()}


def write_values(net: Any, values: dict[str, np.ndarray]) -> None:
    """Give every parameter of a net the value of that name, on every device."""
    for name, parameter in net.collect_params().items():
        parameter.set_data(mx.nd.array(values[name], dtype=parameter.dtype))


def _trained(net: Any) -> list[Any]:
    return [p for p in net.collect_params().values() if p.grad_req != "null"]


def _statistics(net: Any) -> list[Any]:
    return [p for p in net.collect_params().values() if p.grad_req == "null"]


def train_epoch(
    run: Run,
    train: Images,
    test: Images,
    order: np.ndarray,
    batch_size: int,
    *,
    after_step: Callable[[Run], None] = lambda run: None,
    check: Callable[[], None] = lambda: None,
    recalibrated: bool = False,
    bars: bool = True,
) -> Epoch:
    """Train a net on the images in `order`, measure it, append the result to the run.

    A run that was restored in the middle of an epoch goes on with the next batch.

    Parameters
    ----------
    run : Run
    train, test : Images
        The test images, and the training images again, are for the worker of rank 0 to measure.
    order : numpy.ndarray
        Of the training images, the same for all workers. Each takes its part of every batch and
        divides that among its devices.
    batch_size : int
        Images per step, over all devices of all workers.
    after_step : callable
        Called with the run after each step, when it can be saved.
    check : callable
        Called now and then while the net is measured; may raise.
    recalibrated : bool
        Measure with statistics of the whole training set.
    bars : bool
        Show progress on a terminal.

    Raises
    ------
    FloatingPointError
        If a batch has a loss that is not finite.
    """
    number = len(run.epochs) + 1
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    done = len(run.losses) - len(run.epochs) * len(batches)
    mx.nd.waitall()
    began = time.perf_counter()
    with tqdm(
        batches[done:],
        total=len(batches),
        initial=done,
        desc=f"epoch {number} {run.norm}",
        unit="batch",
        leave=False,
        disable=None if bars else True,
    ) as bar:
        for batch in bar:
            loss = _step(run, train, batch)
            average = _KEEP * run.losses[-1] + (1 - _KEEP) * loss if run.losses else loss
            run.losses.append(average)
            run.seconds += time.perf_counter() - began
            after_step(run)
            began = time.perf_counter()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        mx.nd.waitall()
        run.seconds += time.perf_counter() - began

    accuracies = [0.0, 0.0]
    net = run.measured = measurable(run, train, batch_size, recalibrated)
    if run.workers.rank == 0:
        device = run.devices[0]
        for i, (images, part) in enumerate(((train, "train"), (test, "test"))):
            accuracies[i] = accuracy(net, images, device, f"{part} accuracy", check, bars)
    train_acc, test_acc = run.workers.gather("accuracy", accuracies)[0].tolist()
    result = Epoch(number, run.norm, run.losses[-1], train_acc, test_acc, run.seconds)
    run.epochs.append(result)
    run.seconds = 0.0
    return result


def _step(run: Run, images: Images, batch: np.ndarray) -> float:
    """Train on the images of these numbers; return the mean of their losses over all workers."""
    mine = np.array_split(batch, run.workers.size)[run.workers.rank]
    parts = np.array_split(mine, len(run.devices))  # as gluon.utils.split_data divides them
    loaded = [images.on(d, p) if len(p) else None for d, p in zip(run.devices, parts)]
    with autograd.record():
        losses = [
            _nothing(run.net, device) if data is None else _cross_entropy(run.net(data[0]), data[1])
            for device, data in zip(run.devices, loaded)
        ]
    autograd.backward(losses)  # of their sum
    run.trainer.step(1)
    total = sum(float(loss.sum().asscalar()) for loss in losses)
    loss = float(run.workers.gather("loss", total).sum()) / len(batch)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of the {run.norm} net is {loss} at step {len(run.losses) + 1}: "
            "try a lower --lr"
        )
    return loss


def _nothing(net: Any, device: Any) -> Any:
    """Return a loss of 0 whose gradients are 0, for a device that has no image of a batch.

    Without a backward it would add the gradients of the step before.
    """
    return mx.nd.add_n(*((p.data(device) * 0).sum() for p in _trained(net)))


def measurable(run: Run, train: Images, batch_size: int, recalibrated: bool) -> Any:
    """Return the net to measure and to save: on one device, with the average of all statistics.

    All workers call this. The net in training keeps the statistics it has on each device.

    Parameters
    ----------
    run : Run
    train : Images
    batch_size : int
    recalibrated : bool
        Take the statistics of the training set instead, in batches as they were trained on.
    """
    if len(run.devices) * run.workers.size == 1 and not recalibrated:
        return run.net
    device = run.devices[0]
    net = build(run.norm, "tutorial", [device])
    write_values(net, averages(run))
    if run.hybridize:
        net.hybridize()
    if recalibrated and run.workers.rank == 0:
        recalibrate(net, train.batches(batch_size, device))
    return net


def averages(run: Run) -> dict[str, np.ndarray]:
    """Return the value of every parameter, of the statistics their average over all devices."""
    values = read_values(run.net)
    for name, copies in gather_statistics(run).items():
        values[name] = copies.mean(axis=(0, 1))
    return values


def gather_statistics(run: Run) -> dict[str, np.ndarray]:
    """Return all copies of each running statistic, float64, shape (workers, devices, C)."""
    mx.nd.waitall()
    return {
        p.name: run.workers.gather(
            f"{run.norm}:{p.name}", np.stack([copy.asnumpy() for copy in p.list_data()])
        )
        for p in _statistics(run.net)
    }


def accuracy(
    net: Any,
    images: Images,
    device: Any,
    title: str,
    check: Callable[[], None] = lambda: None,
    bars: bool = True,
) -> float:
    """Return the fraction of images to whose label the net gives its highest score."""
    correct = 0.0
    with tqdm(
        total=len(images),
        desc=title,
        unit="image",
        leave=False,
        disable=None if bars else True,
    ) as bar:
        for pixels, labels in images.batches(_EVALUATION_BATCH, device):
            correct += (net(pixels).argmax(axis=1) == labels).sum().asscalar()
            bar.update(len(labels))
            check()
    return float(correct / len(images))


# --- a run on disk -----------------------------------------------------------------------------


def save_run(run: Run, statistics: dict[str, np.ndarray], folder: Path) -> None:
    """Write all that a run needs to go on.

    Parameters
    ----------
    run : Run
    statistics : dict of str to numpy.ndarray
        From :func:`gather_statistics`.
    folder : Path
        An existing directory; the files are named after the norm layer.
    """
    values = {**read_values(run.net), **statistics}
    np.savez(folder / f"{run.norm}.npz", **values)
    run.trainer.save_states(str(folder / f"{run.norm}.states"))
    progress = {
        "losses": run.losses,
        "epochs": [asdict(epoch) for epoch in run.epochs],
        "seconds": run.seconds,
    }
    (folder / f"{run.norm}.json").write_text(json.dumps(progress), "utf-8")


def load_run(run: Run, folder: Path) -> None:
    """Make a run what it was when :func:`save_run` wrote it."""
    with np.load(folder / f"{run.norm}.npz", allow_pickle=False) as values:
        for parameter in _trained(run.net):
            parameter.set_data(mx.nd.array(values[parameter.name], dtype=parameter.dtype))
        for parameter in _statistics(run.net):
            for copy, value in zip(parameter.list_data(), values[parameter.name][run.workers.rank]):
                copy[:] = mx.nd.array(value, ctx=copy.context, dtype=parameter.dtype)
    run.trainer.load_states(str(folder / f"{run.norm}.states"))
    progress = json.loads((folder / f"{run.norm}.json").read_text("utf-8"))
    run.losses = progress["losses"]
    run.epochs = [Epoch(**epoch) for epoch in progress["epochs"]]
    run.seconds = progress["seconds"]
    mx.nd.waitall()


def seed_step(seed: int, step: int) -> None:
    """Seed MXNet's generator for the steps that follow.

    Its state cannot be read, so it cannot be saved: it is set anew where a run can be resumed.
    """
    mx.random.seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]) % 2**31)


# --- the cross-check ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from what it should be, the largest over its elements.

    `relative` is to max(1, |expected|).
    """

    group: str
    tensor: str
    absolute: float
    relative: float

    @property
    def ok(self) -> bool:
        """Whether it is within the tolerance of its group; NaN is not."""
        return self.relative <= TOLERANCES[self.group]

    def __str__(self) -> str:
        return (
            f"{self.group.replace('_', ' ')}: {self.tensor} differs by {self.relative:.1e} "
            f"(allowed {TOLERANCES[self.group]:.0e})"
        )


@dataclass(frozen=True)
class CrossCheck:
    """All differences of a cross-check."""

    differences: list[Difference]

    @property
    def ok(self) -> bool:
        """Whether every tensor is within its tolerance."""
        return all(d.ok for d in self.differences)

    @property
    def failed(self) -> list[Difference]:
        """The tensors out of tolerance."""
        return [d for d in self.differences if not d.ok]

    def worst(self) -> dict[str, Difference]:
        """Return, for each group, the tensor with the largest relative difference."""
        return {
            group: max(self._of(group), key=lambda d: _rank(d.relative)) for group in TOLERANCES
        }

    def max_abs_diff(self) -> dict[str, float]:
        """Return the largest absolute difference of each group."""
        return {
            group: max((d.absolute for d in self._of(group)), key=_rank) for group in TOLERANCES
        }

    def _of(self, group: str) -> list[Difference]:
        return [d for d in self.differences if d.group == group]


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


_Tensors = dict[str, dict[str, np.ndarray]]


def cross_check(
    net: Any, pixels: np.ndarray, labels: np.ndarray, lr: float, seed: int
) -> CrossCheck:
    """Take one training step in float64 with both layers and compare everything it computes.

    The nets start from the weights of `net`, with norm parameters and running statistics drawn at
    random, as the usual ones and zeros would hide errors. The scratch net takes its step twice,
    eager and hybridized. Its running statistics are compared with the formula as well.

    It runs on the CPU whatever `net` runs on: there the built-in keeps the biased variance, as the
    scratch layer does; with cuDNN it keeps the unbiased one.

    Parameters
    ----------
    net : HybridSequential
        A LeNet with norm layers.
    pixels : numpy.ndarray, shape (N, 1, 28, 28)
    labels : numpy.ndarray, shape (N,)
    lr : float
        Learning rate on the summed loss.
    seed : int
        For the random values.

    Returns
    -------
    CrossCheck
    """
    values = _randomize_norms(read_values(net), np.random.default_rng(seed))
    expected, _ = _float64_step("builtin", values, pixels, labels, lr)
    eager, norm_inputs = _float64_step("scratch", values, pixels, labels, lr)
    hybridized, _ = _float64_step("scratch", values, pixels, labels, lr, hybridize=True)
    # Layers inside a graph cannot be listened to: both modes are held to the eager net's inputs.
    expected["running_statistics_formula"] = _statistics_by_formula(values, norm_inputs)
    for tensors in (eager, hybridized):
        tensors["running_statistics_formula"] = tensors["running_statistics"]
    return CrossCheck(
        [*_compare("eager", eager, expected), *_compare("hybridized", hybridized, expected)]
    )


def _randomize_norms(
    values: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    drawn = {}
    for name, value in values.items():
        if name.endswith(("gamma", "running_var")):
            drawn[name] = rng.uniform(0.5, 2, value.shape)
        elif name.endswith(("beta", "running_mean")):
            drawn[name] = rng.normal(size=value.shape)
        else:
            drawn[name] = value.astype(np.float64)
    return drawn


def _float64_step(
    norm: str,
    values: dict[str, np.ndarray],
    pixels: np.ndarray,
    labels: np.ndarray,
    lr: float,
    hybridize: bool = False,
) -> tuple[_Tensors, list[tuple[Any, np.ndarray]]]:
    """Return all tensors of one step and, of an eager net, its norm layers with their inputs."""
    with mx.cpu():
        net = lenet(NORMS[norm], prefix=_PREFIX)
        net.cast("float64")
        initialize(net)
        x = mx.nd.array(pixels, dtype="float64")
        y = mx.nd.array(labels, dtype="float64")
        net(x)
        write_values(net, values)
        if hybridize:
            net.hybridize()
        x.attach_grad()
        trainer = gluon.Trainer(_trained(net), "sgd", {"learning_rate": lr})

        outputs = {"inference": net(x).asnumpy()}
        with _listen(net) as heard, autograd.record():
            scores = net(x)
            loss = _cross_entropy(scores, y)
        loss.backward()
        mx.nd.waitall()
        outputs.update(training=scores.asnumpy(), loss=loss.asnumpy())
        trained = {p.name: p for p in _trained(net)}
        gradients = {"data": x.grad.asnumpy()}
        gradients.update((name, p.grad().asnumpy()) for name, p in trained.items())
        trainer.step(1)
        after = read_values(net)
    tensors = {
        "outputs": outputs,
        "gradients": gradients,
        "parameters": {name: after[name] for name in trained},
        "running_statistics": {name: after[name] for name in after if name not in trained},
    }
    norm_inputs = [(layer, x.asnumpy()) for layer, x, _ in heard if is_norm(layer)]
    return tensors, norm_inputs


def _statistics_by_formula(
    values: dict[str, np.ndarray], norm_inputs: list[tuple[Any, np.ndarray]]
) -> dict[str, np.ndarray]:
    expected = {}
    for layer, x in norm_inputs:
        axes = (0, *range(2, x.ndim))
        for parameter, batch in (
            (layer.running_mean, x.mean(axis=axes)),
            (layer.running_var, x.var(axis=axes)),
        ):
            old = values[parameter.name]
            expected[parameter.name] = _MOMENTUM * old + (1 - _MOMENTUM) * batch
    return expected


def _compare(mode: str, actual: _Tensors, expected: _Tensors) -> list[Difference]:
    differences = []
    for group in TOLERANCES:
        for name, reference in expected[group].items():
            absolute = np.abs(actual[group].get(name, np.inf) - reference)
            relative = absolute / np.maximum(1, np.abs(reference))
            differences.append(
                Difference(group, f"{mode} {name}", float(absolute.max()), float(relative.max()))
            )
    return differences


# --- a look into the layers --------------------------------------------------------------------


def is_norm(layer: Any) -> bool:
    """Whether a layer keeps running statistics."""
    return hasattr(layer, "running_mean") and hasattr(layer, "running_var")


@contextmanager
def _listen(net: Any) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Collect (layer, input, output) of the layers of a net that is not hybridized."""
    heard: list[tuple[Any, Any, Any]] = []
    handles = [
        layer.register_forward_hook(lambda layer, x, y: heard.append((layer, x[0], y)))
        for layer in net
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.detach()


@dataclass(frozen=True)
class LayerView:
    """A layer in one training batch.

    `arrays` is empty unless it is a norm layer: the batch mean and variance of its input, its
    running statistics after the batch, gamma and beta, each of shape (C,).
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    arrays: dict[str, np.ndarray]


def look_inside(net: Any, pixels: np.ndarray, labels: np.ndarray, device: Any) -> list[LayerView]:
    """Train on one batch without a parameter update, and report on every layer.

    It moves the running statistics of `net`, which must not be hybridized.
    """
    x, y = mx.nd.array(pixels, ctx=device), mx.nd.array(labels, ctx=device)
    with _listen(net) as heard, autograd.record():
        loss = _cross_entropy(net(x), y)
    loss.backward()  # when the built-in moves its statistics
    mx.nd.waitall()
    return [
        LayerView(layer.name, x.shape, y.shape, _norm_arrays(layer, x.asnumpy()))
        for layer, x, y in heard
    ]


def _norm_arrays(layer: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    if not is_norm(layer):
        return {}
    axes = (0, *range(2, x.ndim))
    parameters = ("running_mean", "running_var", "gamma", "beta")
    return {
        "batch mean": x.mean(axis=axes, dtype=np.float64),
        "batch variance": x.var(axis=axes, dtype=np.float64),
        **{name.replace("_", " "): getattr(layer, name).data().asnumpy() for name in parameters},
    }
