"""One net with one entry's norm layers, ready to run."""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import scratchbn
from scratchbn.deploy import export_inference, write_inference_symbol

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import SymbolBlock, nn

from .entries import ENTRIES
from .nets import Net, NormLayer

WARM_UP = 3  # steps before anything is timed
_STATIC = {"static_alloc": True, "static_shape": True}


class Seconds(NamedTuple):
    """What passed on the clock, and what the process computed, on all its cores together."""

    wall: float
    process: float


Sampler = Callable[[int], Seconds]  # takes steps, returns what they took together


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


@dataclass(frozen=True)
class Runner:
    """A net that has run already.

    `step` does its work once, `output` returns what the net computes in the mode of the work;
    `parameters` is how many numbers it trains.
    """

    step: Callable[[], Any]
    output: Callable[[], Any]
    parameters: int

    def sample(self, steps: int) -> Seconds:
        """Return the seconds that `steps` steps take together."""
        mx.nd.waitall()
        wall, process = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        mx.nd.waitall()
        return Seconds(time.perf_counter() - wall, time.process_time() - process)


def build_runner(net: Net, work: str, name: str, data: Data) -> Runner:
    """Build a net with an entry's norm layer, hybridized or eager, and let it run a few times."""
    entry = ENTRIES[name]
    with _chosen(entry.backend), warnings.catch_warnings():
        # The textbook uses no running statistics in training; an imported graph has no types.
        warnings.filterwarnings("ignore", "Parameter .* is not used by any computation")
        warnings.filterwarnings("ignore", "Cannot decide type")
        block = _build(net, entry.norm)
        if data.values is None:
            block.initialize(mx.init.Xavier(magnitude=2))
        else:
            _give_values(block, data.values)
        block(mx.nd.zeros((2, *net.shape[1:])))  # eager, for the textbook
        trained = [p for p in block.collect_params().values() if p.grad_req != "null"]
        if entry.file:
            block = _imported(block, data.x, entry.file)
        if not net.eager:
            block.hybridize(**_STATIC)
        step, output = _calls(net, work, block, data)
        if net.eager:
            step, output = (partial(_within, entry.backend, call) for call in (step, output))
        runner = Runner(step, output, sum(parameter.data().size for parameter in trained))
        runner.sample(WARM_UP)
    return runner


def _chosen(backend: str | None) -> contextlib.AbstractContextManager[None]:
    return scratchbn.use_backend(backend) if backend else contextlib.nullcontext()


def _within(backend: str | None, call: Callable[[], Any]) -> Any:
    """Call what chooses its backend anew in each call: eager code."""
    with _chosen(backend):
        return call()


def copy_runner(data: Data) -> Runner:
    """Return what copies the batch."""
    target = mx.nd.empty(data.x.shape)
    source = data.x.detach()
    return Runner(lambda: mx.nd.identity(source, out=target), lambda: target, 0)


def _build(net: Net, norm: NormLayer) -> Any:
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


def _give_values(block: Any, values: Mapping[str, np.ndarray]) -> None:
    """Initialize a block that was never called: MXNet cannot write to a Conv1D's used weight."""
    for name, parameter in block.collect_params().items():
        parameter.shape = values[name].shape
        parameter.initialize()
        parameter.set_data(mx.nd.array(values[name]))


def _imported(block: Any, x: Any, kind: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        symbol = f"{folder}/net-symbol.json"
        if kind == "folded":
            export_inference(block, f"{folder}/net", x)
        else:
            block.hybridize()
            block(x)
            block.export(f"{folder}/net")
            shapes = {"data": x.shape}  # a norm that comes first has no other rank
            symbol = write_inference_symbol(symbol, shapes=shapes, verify=False)
        return SymbolBlock.imports(symbol, ["data"], f"{folder}/net-0000.params")


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
        return lambda: train_output().backward(data.target), train_output

    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    if not net.eager:
        loss.hybridize(**_STATIC)
    # Without learning, every step is the same work on the same numbers, with any norm layer.
    trainer = gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.0})

    def step() -> None:
        with autograd.record():
            losses = loss(block(data.x), data.target)
        losses.backward()
        trainer.step(data.x.shape[0])

    return step, train_output
