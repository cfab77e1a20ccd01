"""A defect: a few lines that run with either layer, eagerly or in a graph, and what they show."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, nn

from ..layer import ScratchBatchNorm, ScratchBatchNormReLU

LAYERS = {
    "built-in": (nn.BatchNorm, nn.BatchNormReLU),
    "ours": (ScratchBatchNorm, ScratchBatchNormReLU),
}
MODES = ("eager", "graph")
_TIMEOUT = 20  # seconds for a measurement in a process of its own
_PACKAGES = Path(__file__).resolve().parents[2]

Array = Any


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a measurement saw.

    Attributes
    ----------
    sound : bool
        Whether it agrees with the mathematics.
    broken : bool
        Whether it is the defect as known.
    text : str
        The numbers.
    """

    sound: bool
    broken: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Bench:
    """One of the two layers, in one mode, on one device.

    Attributes
    ----------
    norm : {'built-in', 'ours'}
    mode : {'eager', 'graph'}
    device : mxnet.Context
    """

    norm: str
    mode: str
    device: mx.Context

    def layer(
        self,
        channels: int,
        dtype: str = "float32",
        *,
        relu: bool = False,
        values: Mapping[str, float] | None = None,
        **options: Any,
    ) -> Any:
        """Return an initialized layer; `values` fill its parameters."""
        layer = LAYERS[self.norm][relu](in_channels=channels, **options)
        layer.initialize(ctx=self.device)
        layer.cast(dtype)
        for name, value in (values or {}).items():
            getattr(layer, name).set_data(mx.nd.full((channels,), value, ctx=self.device))
        return layer

    def ready(self, block: Block) -> Block:
        """Return a block, initialized."""
        block.initialize(ctx=self.device)
        return block

    def in_mode(self, net: Any) -> Any:
        """Return a net, hybridized in a graph."""
        if self.mode == "graph":
            net.hybridize()
        return net

    def net(self, *blocks: Block) -> Any:
        """Return initialized blocks in a row; in a graph, inside a hybridized net."""
        net = nn.HybridSequential()
        net.add(*blocks)
        return self.in_mode(net)

    def array(self, values: Any, dtype: str = "float32") -> Array:
        """Return an array of the kind in use."""
        make = mx.np.array if mx.util.is_np_array() else mx.nd.array
        return make(np.asarray(values), dtype=dtype, ctx=self.device)

    def step(
        self,
        net: Any,
        x: Any,
        dy: Any = None,
        *,
        dtype: str = "float32",
        record_train: bool = True,
        backward_train: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take a forward and a backward; return output and input gradient in float64."""
        data = self.array(x, dtype)
        data.attach_grad()
        with autograd.record(train_mode=record_train):
            y = net(data)
        y.backward(None if dy is None else self.array(dy, dtype), train_mode=backward_train)
        mx.nd.waitall()
        return y.asnumpy().astype(np.float64), data.grad.asnumpy().astype(np.float64)


Measurement = Callable[[Bench], Outcome]


@dataclasses.dataclass(frozen=True)
class Defect:
    """A defect of the built-in layer, as one measurement.

    Attributes
    ----------
    key : str
        The name of the measurement's function.
    symptom : str
        What a user sees; code between backticks.
    threads : tuple of int
        The issues of apache/mxnet that report it.
    apart : bool
        Whether the built-in may take the process down.
    measure : callable
        Takes a Bench and returns an Outcome; its docstring says where the defect comes from.
    """

    key: str
    symptom: str
    threads: tuple[int, ...]
    apart: bool
    measure: Measurement

    @property
    def cause(self) -> str:
        """Where it comes from, in a sentence."""
        return " ".join((self.measure.__doc__ or "").split())

    def outcome(self, norm: str, mode: str, device: Any) -> Outcome:
        """Measure; the built-in in a process of its own where it may not survive.

        Parameters
        ----------
        norm : {'built-in', 'ours'}
        mode : {'eager', 'graph'}
        device : mxnet.Context

        Returns
        -------
        Outcome

        Raises
        ------
        RuntimeError
            If the process fails for another reason than a signal.
        """
        if self.apart and norm == "built-in":
            return _measure_apart(self.key, norm, mode, device)
        return self.measure(Bench(norm, mode, device))


def defect(symptom: str, *threads: int, apart: bool = False) -> Callable[[Measurement], Defect]:
    """Make a defect of the function that measures it."""
    return lambda measure: Defect(measure.__name__, symptom, threads, apart, measure)


def _measure_apart(key: str, norm: str, mode: str, device: Any) -> Outcome:
    """Measure in another process: see ``__main__``."""
    arguments = [key, norm, mode, device.device_type, str(device.device_id)]
    try:
        process = subprocess.run(
            [sys.executable, "-m", __package__, *arguments],
            cwd=_PACKAGES,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(False, True, f"the process hangs, killed after {_TIMEOUT} s")
    if process.returncode:
        if process.returncode > 0 and "Segmentation fault" not in process.stderr:
            raise RuntimeError(f"{key}: exit status {process.returncode}\n{process.stderr}")
        return Outcome(False, True, f"the process dies of {_signal_name(process.returncode)}")
    return Outcome(**json.loads(process.stdout.splitlines()[-1]))


def _signal_name(returncode: int) -> str:
    # MXNet's handler of segmentation faults turns the signal into an exit status.
    return signal.Signals(-returncode).name if returncode < 0 else "SIGSEGV"
