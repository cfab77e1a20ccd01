"""What the benchmark measures: nets, norm layers, kinds of work, and how samples are taken."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import scratchbn
from scratchbn import ScratchBatchNorm
from scratchbn.deploy import export_inference

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import HybridBlock, SymbolBlock, nn
from mxnet.gluon.contrib.nn import Identity
from tqdm import tqdm

from models import bench
from models.lenet import lenet

WORKS = ("train", "inference", "folded")
REFERENCE = "builtin"
COPY = "copy"  # beside single layers: the memory bandwidth

STATIC = {"static_alloc": True, "static_shape": True}
WARM_UP = 3  # steps before anything is timed
LEAST_ROUNDS, MOST_ROUNDS = 5, 200
# How far outputs may be from the built-in's, relative to the largest: float32 through a deep net.
TOLERANCE = 1e-3

Sampler = Callable[[int], float]  # takes steps, returns the seconds they took together


# --- norm layers --------------------------------------------------------------------------------


class Textbook(HybridBlock):
    """Algorithm 1 as one writes it down on first reading: means and broadcasts, no view, no shift.

    It has the parameters of a norm layer and keeps no running averages. Its mode is that of its
    first call, and so is its rank. It must be called once before it is hybridized.
    """

    def __init__(self, axis: int = 1, in_channels: int = 0, epsilon: float = 1e-5) -> None:
        super().__init__()
        self._axis, self._epsilon = axis, epsilon
        self._channel: tuple[int, ...] = ()
        initial = {"gamma": "ones", "beta": "zeros", "running_mean": "zeros", "running_var": "ones"}
        for name, init in initial.items():
            parameter = self.params.get(
                name,
                shape=(in_channels,),
                init=init,
                allow_deferred_init=True,
                grad_req="null" if name.startswith("running") else "write",
            )
            setattr(self, name, parameter)

    def _alias(self) -> str:
        return "batchnorm"  # the built-in's prefix: parameters are copied by name

    def infer_shape(self, x: Any) -> None:
        """Take the number of channels from an input."""
        for name in ("gamma", "beta", "running_mean", "running_var"):
            getattr(self, name).shape = (x.shape[self._axis],)

    def hybrid_forward(
        self,
        F: Any,
        x: Any,
        gamma: Any,
        beta: Any,
        running_mean: Any,
        running_var: Any,
    ) -> Any:
        """Normalize a batch; `F` is ``mxnet.nd`` or ``mxnet.sym``."""
        if F is mx.nd:
            axis = self._axis % x.ndim
            self._channel = tuple(-1 if i == axis else 1 for i in range(x.ndim))
        if autograd.is_training():
            over = {"axis": self._axis, "exclude": True, "keepdims": True}
            mean = F.mean(x, **over)
            variance = F.mean(F.square(F.broadcast_sub(x, mean)), **over)
        else:
            mean, variance = (v.reshape(self._channel) for v in (running_mean, running_var))
        centred = F.broadcast_sub(x, mean)
        normalized = F.broadcast_div(centred, F.sqrt(variance + self._epsilon))
        scaled = F.broadcast_mul(normalized, gamma.reshape(self._channel))
        return F.broadcast_add(scaled, beta.reshape(self._channel))


def _no_norm(**_options: Any) -> Any:
    return Identity()


@dataclass(frozen=True)
class Entry:
    """A way to normalize.

    Attributes
    ----------
    norm : callable
        Makes the layer.
    about : str
        For the legend.
    backend : str or None
        Of scratchbn, in which the net is traced.
    exported : bool
        Whether the net runs as ``export_inference`` writes it.
    works : tuple of str
        Where it takes part.
    """

    norm: Callable[..., Any]
    about: str
    backend: str | None = None
    exported: bool = False
    works: tuple[str, ...] = ("train", "inference")


ENTRIES = {
    REFERENCE: Entry(nn.BatchNorm, "`nn.BatchNorm`, live", works=WORKS),
    "control": Entry(nn.BatchNorm, "the same again: how far equal things differ", works=WORKS),
    "none": Entry(_no_norm, "no normalization: the ceiling", works=WORKS),
    "textbook": Entry(Textbook, "means and broadcasts, without running averages"),
    "portable": Entry(ScratchBatchNorm, "scratchbn from stock operators", "portable"),
    "native": Entry(ScratchBatchNorm, "scratchbn's compiled kernel", "native"),
    "auto": Entry(ScratchBatchNorm, "scratchbn as it comes", "auto"),
    "builtin-folded": Entry(
        nn.BatchNorm, "`nn.BatchNorm` through `export_inference`", exported=True, works=("folded",)
    ),
    "folded": Entry(
        ScratchBatchNorm,
        "scratchbn through `export_inference`",
        "portable",
        exported=True,
        works=("folded",),
    ),
}


def missing_backend(entry: str) -> str | None:
    """Return why an entry's backend cannot be used here, or None."""
    backend = ENTRIES[entry].backend
    if backend is None:
        return None
    try:
        with scratchbn.use_backend(backend):
            return None
    except scratchbn.BackendError as error:
        return " ".join(str(error).split())


# --- nets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """A net, or a single norm layer, and its data.

    Attributes
    ----------
    name : str
    build : callable
        Takes a maker of norm layers, returns a net that is not initialized.
    shape : tuple of int
        Of the data.
    layer : bool
        Whether it is a single norm layer: it has no loss, no trainer, and a memory floor.
    needs : str
        A package it needs.
    """

    name: str
    build: Callable[[Callable[..., Any]], Any]
    shape: tuple[int, ...]
    layer: bool = False
    needs: str = ""

    @property
    def nbytes(self) -> int:
        """The size of the data, float32."""
        return 4 * math.prod(self.shape)

    @property
    def title(self) -> str:
        """The name, and the size of a single layer's data."""
        return f"{self.name}, {self.nbytes / 2**20:.3g} MiB" if self.layer else self.name

    def entries(self, work: str, chosen: Sequence[str]) -> list[str]:
        """Return those of the chosen entries that take part."""
        names = [name for name in chosen if work in ENTRIES[name].works]
        if not self.layer:
            return names
        left_out = ("none", "textbook") if self.nbytes > _TEXTBOOK_MOST else ("none",)
        return [name for name in names if name not in left_out]


def _zoo(name: str) -> Callable[[Callable[..., Any]], Any]:
    def build(norm: Callable[..., Any]) -> Any:
        from models.zoo import get_model

        return get_model(name, norm, classes=10)

    return build


NETS = {
    net.name: net
    for net in (
        Net("lenet", lenet, (64, 1, 28, 28)),
        Net("mlp", bench.mlp, (256, 784)),
        Net("cifar_resnet20_v1", _zoo("cifar_resnet20_v1"), (32, 3, 32, 32), needs="gluoncv"),
        Net("resnet18_v1", _zoo("resnet18_v1"), (8, 3, 112, 112), needs="gluoncv"),
        Net("channels_last", bench.channels_last, (32, 16, 16, 32)),
        Net("conv1d", bench.conv1d, (32, 16, 256)),
    )
}
_CHANNELS = 64
_TEXTBOOK_MOST = 2**23  # bytes; above, a step of it takes seconds
# A layout of a single norm layer: the shape of a sample, and the channel axis.
LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "layer_nchw": ((_CHANNELS, 28, 28), 1),
    "layer_nhwc": ((28, 28, _CHANNELS), -1),
    "layer_2d": ((512,), 1),
}


def single_layer(layout: str, nbytes: int) -> Net:
    """Return a single norm layer on data of about `nbytes`; layouts are those of `LAYOUTS`."""
    sample, axis = LAYOUTS[layout]
    batch = max(2, round(nbytes / (4 * math.prod(sample))))

    def build(norm: Callable[..., Any]) -> Any:
        net = nn.HybridSequential()
        with net.name_scope():
            net.add(norm(axis=axis, in_channels=sample[axis % (len(sample) + 1) - 1]))
        return net

    return Net(layout, build, (batch, *sample), layer=True)


# --- one entry, ready to run --------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The batch that all entries share, the gradient or the labels, and the parameters' values.

    Without values every net draws its own.
    """

    x: Any
    target: Any
    values: dict[str, np.ndarray] | None

    @classmethod
    def of(cls, net: Net, seed: int = 0, with_values: bool = True) -> Data:
        """Draw a batch and the parameters for a net."""
        mx.random.seed(seed)
        x = mx.nd.random.normal(shape=net.shape)
        if net.layer:
            x.attach_grad()
            target = mx.nd.random.normal(shape=net.shape)
        else:
            target = mx.nd.array(np.arange(net.shape[0]) % 10)
        return cls(x, target, _draw_values(net, seed) if with_values else None)


def _build(net: Net, norm: Callable[..., Any]) -> Any:
    with mx.name.NameManager():  # names that do not depend on what was built before
        return net.build(norm)


def _draw_values(net: Net, seed: int) -> dict[str, np.ndarray]:
    """Return values for all parameters by name, those of norm layers not the usual 0 and 1."""
    rng = np.random.default_rng(seed)
    block = _build(net, nn.BatchNorm)
    block.initialize(mx.init.Xavier(magnitude=2))
    block(mx.nd.zeros((2, *net.shape[1:])))
    values = {}
    for name, parameter in block.collect_params().items():
        if name.endswith(("_gamma", "_running_var")):
            values[name] = rng.uniform(0.5, 1.5, parameter.shape)
        elif name.endswith(("_beta", "_running_mean")):
            values[name] = rng.normal(0, 0.1, parameter.shape)
        else:
            values[name] = parameter.data().asnumpy()
    return values


@dataclass(frozen=True)
class Runner:
    """A net that has run already.

    Attributes
    ----------
    step : callable
        Does its work once.
    output : callable
        Returns what the net computes, in the mode of the work.
    parameters : int
        How many numbers it trains.
    """

    step: Callable[[], Any]
    output: Callable[[], Any]
    parameters: int

    def sample(self, steps: int) -> float:
        """Return the seconds that `steps` steps take together."""
        mx.nd.waitall()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        mx.nd.waitall()
        return time.perf_counter() - start


def build_runner(net: Net, work: str, entry: str, data: Data) -> Runner:
    """Build a net with an entry's norm layer, hybridize it and let it run a few times.

    Raises
    ------
    mxnet.MXNetError
        If the net cannot do this work.
    """
    norm, backend = ENTRIES[entry].norm, ENTRIES[entry].backend
    traced_in: AbstractContextManager[Any] = (
        contextlib.nullcontext() if backend is None else scratchbn.use_backend(backend)
    )
    with traced_in, warnings.catch_warnings():
        # The textbook uses no running statistics in training; an imported graph has no types.
        warnings.filterwarnings("ignore", "Parameter .* is not used by any computation")
        warnings.filterwarnings("ignore", "Cannot decide type")
        block = _build(net, norm)
        if data.values is None:
            block.initialize(mx.init.Xavier(magnitude=2))
        else:
            _give_values(block, data.values)
        block(mx.nd.zeros((2, *net.shape[1:])))  # eager, for the textbook
        trained = [p for p in block.collect_params().values() if p.grad_req != "null"]
        if ENTRIES[entry].exported:
            block = _exported(block, data.x)
        block.hybridize(**STATIC)
        step, output = _calls(net, work, block, data)
        runner = Runner(step, output, sum(parameter.data().size for parameter in trained))
        for _ in range(WARM_UP):
            runner.step()
        mx.nd.waitall()
    return runner


def _give_values(block: Any, values: Mapping[str, np.ndarray]) -> None:
    """Initialize a block that was never called: MXNet cannot write to a Conv1D's used weight."""
    for name, parameter in block.collect_params().items():
        parameter.shape = values[name].shape
        parameter.initialize()
        parameter.set_data(mx.nd.array(values[name]))


def _exported(block: Any, x: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        export_inference(block, f"{folder}/net", x)
        return SymbolBlock.imports(
            f"{folder}/net-symbol.json", ["data"], f"{folder}/net-0000.params"
        )


def _calls(
    net: Net, work: str, block: Any, data: Data
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return what does a step of the work, and what computes the output alone."""
    if work != "train":
        return partial(block, data.x), partial(block, data.x)

    def train_output() -> Any:
        with autograd.record():
            return block(data.x)

    if net.layer:

        def layer_step() -> None:
            with autograd.record():
                y = block(data.x)
            y.backward(data.target)

        return layer_step, train_output

    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    loss.hybridize(**STATIC)
    # Without learning, every step is the same work on the same numbers, with any norm layer.
    trainer = gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.0})

    def step() -> None:
        with autograd.record():
            losses = loss(block(data.x), data.target)
        losses.backward()
        trainer.step(data.x.shape[0])

    return step, train_output


def copy_sampler(data: Data) -> Sampler:
    """Return what times copies of the batch."""
    target = mx.nd.empty(data.x.shape)
    source = data.x.detach()
    return Runner(lambda: mx.nd.identity(source, out=target), lambda: target, 0).sample


# --- a group: the entries of one net and work ---------------------------------------------------


@dataclass
class Group:
    """The measurements of one net in one kind of work.

    Attributes
    ----------
    net, work : str
    shape : tuple of int
        Of the data.
    nbytes : int
        Of the data.
    layer : bool
        Whether it is a single norm layer.
    steps : dict
        How many a sample has, by entry.
    samples : dict
        Seconds per step in each round, by entry.
    differences : dict
        How far the output is from the built-in's, relative to its largest, by entry.
    problems : dict
        Why an entry has no samples.
    """

    net: str
    work: str
    shape: tuple[int, ...]
    nbytes: int
    layer: bool
    steps: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> dict[str, float]:
        """The entries that compute something else than the built-in."""
        return {name: d for name, d in self.differences.items() if not d <= TOLERANCE}


@dataclass(frozen=True)
class Effort:
    """How much to measure: seconds or rounds for a group, and the least seconds of a sample."""

    seconds: float
    rounds: int | None
    sample_seconds: float


def measure_group(
    net: Net,
    work: str,
    entries: Sequence[str],
    effort: Effort,
    others: Callable[[Runner], Mapping[str, Sampler | str]] | None = None,
) -> Group:
    """Measure the entries of one net, alive together, in random order every round.

    Parameters
    ----------
    net : Net
    work : str
    entries : sequence of str
    effort : Effort
    others : callable, optional
        Takes a runner of the net and returns more samplers by name, or why there is none.

    Returns
    -------
    Group
    """
    group = Group(net.name, work, net.shape, net.nbytes, net.layer)
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
            group.problems[name] = _reason(error)
            continue
        samplers[name] = runner.sample
        expected = output if name == REFERENCE else expected
        if expected is not None and name not in (REFERENCE, "none"):
            group.differences[name] = _difference(output, expected)
        output = None
    expected = None
    if net.layer:
        samplers[COPY] = copy_sampler(data)
    for name, sampler in (others(runner) if others and runner else {}).items():
        if isinstance(sampler, str):
            group.problems[name] = sampler
        else:
            samplers[name] = sampler
    group.steps, group.samples = take_samples(samplers, effort, title)
    return group


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _difference(output: Any, expected: Any) -> float:
    largest = expected.abs().max().asscalar()
    return float((output - expected).abs().max().asscalar() / (largest or 1))


def take_samples(
    samplers: Mapping[str, Sampler], effort: Effort, title: str = ""
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Time samplers in turn, in another random order every round.

    Parameters
    ----------
    samplers : mapping of str to callable
    effort : Effort
    title : str
        Of the progress bar.

    Returns
    -------
    steps : dict of str to int
        In a sample of each, enough for it to take ``effort.sample_seconds``.
    samples : dict of str to list of float
        Seconds per step, one for each round.
    """
    if not samplers:
        return {}, {}
    first = {name: min(sampler(1) for _ in range(2)) for name, sampler in samplers.items()}
    steps = {name: math.ceil(effort.sample_seconds / once) for name, once in first.items()}
    # What ran before leaves caches and threads in some state: a step between, unless it is long.
    between = {name: 1 if count > 1 else 0 for name, count in steps.items()}
    round_seconds = sum(once * (steps[name] + between[name]) for name, once in first.items())
    fitting = round(effort.seconds / round_seconds)
    rounds = effort.rounds or min(max(fitting, LEAST_ROUNDS), MOST_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    rng = np.random.default_rng(0)
    names = list(samplers)
    bar = tqdm(total=rounds, desc=title, unit="round", leave=False, disable=None)
    with _no_garbage_collection(), bar:
        for _ in range(rounds):
            for i in rng.permutation(len(names)):
                name = names[i]
                if between[name]:
                    samplers[name](between[name])
                samples[name].append(samplers[name](steps[name]) / steps[name])
            bar.update()
    return steps, samples


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- memory -------------------------------------------------------------------------------------

_STATUS = Path("/proc/self/status")


def resident(kind: str) -> int:
    """Return this process's resident memory in bytes: now (VmRSS), or the most ever (VmHWM).

    Raises
    ------
    OSError
        If the system does not tell, as only Linux does.
    """
    for line in _STATUS.read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} does not tell {kind}")


def training_memory(net: Net, entry: str) -> int:
    """Return how many bytes this process grows by at most while it builds and trains a net."""
    data = Data.of(net, with_values=False)
    mx.nd.waitall()
    before = resident("VmRSS")
    build_runner(net, "train", entry, data).sample(WARM_UP)
    return resident("VmHWM") - before


# --- profile ------------------------------------------------------------------------------------


def prepare_profile() -> None:
    """Let operators run one by one, so that each has its time; before MXNet's first graph."""
    os.environ["MXNET_EXEC_BULK_EXEC_TRAIN"] = os.environ["MXNET_EXEC_BULK_EXEC_INFERENCE"] = "0"


@dataclass(frozen=True)
class OperatorTime:
    """The time of one operator in a step: how often it runs, and milliseconds together."""

    operator: str
    calls: float
    ms: float


def profile(net: Net, work: str, entry: str, steps: int) -> tuple[list[OperatorTime], float]:
    """Return the time of each operator, the most expensive first, and that of a step, in ms.

    Raises
    ------
    mxnet.MXNetError
        If the net cannot do this work.
    """
    runner = build_runner(net, work, entry, Data.of(net))
    with tempfile.TemporaryDirectory() as folder:
        mx.profiler.set_config(
            profile_symbolic=True,
            profile_imperative=True,
            profile_memory=False,
            profile_api=False,
            aggregate_stats=True,
            filename=f"{folder}/profile.json",
        )
        mx.profiler.set_state("run")
        seconds = runner.sample(steps)
        mx.profiler.set_state("stop")
        found = json.loads(mx.profiler.dumps(reset=True, format="json"))
    rows = [
        OperatorTime(name, times["Count"] / steps, times["Total"] / steps)
        for name, times in found["Time"]["operator"].items()
    ]
    return sorted(rows, key=lambda row: -row.ms), 1000 * seconds / steps
