"""A net on loan that takes steps and hands out every tensor it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block

from .._net import parameters_of
from .nets import Values, load, on_device
from .row import INPUT_GRADIENT, OUTPUT, PARAMETER_GRADIENT, STATISTIC
from .settings import MODES, Settings

Array = Any
Key = tuple[str, str]  # kind, tensor
Tensors = dict[Key, np.ndarray]
Batches = list[list[np.ndarray]]


class Subject:
    """A net with the values it is to start from, in one mode."""

    def __init__(
        self,
        net: Block,
        values: Values,
        mode: str,
        batches: Batches,
        device: Any,
        settings: Settings,
    ) -> None:
        self.net, self.settings = net, settings
        self._batches, self._device = batches, device
        self._parameters = parameters_of(net)
        self._trained = {n: p for n, p in self._parameters.items() if p.grad_req != "null"}
        load(self._parameters, values, device)
        net.hybridize(**MODES[mode])

    def forward(self, step: int) -> Tensors:
        """Run in inference; return outputs and statistics."""
        outputs = _flat(self.net(*self._inputs(step)))
        mx.nd.waitall()
        return _numpy({**_keyed(OUTPUT, "output", outputs), **self._statistics()})

    def forward_backward(self, step: int, training: bool = True) -> Tensors:
        """Run and differentiate; return outputs, gradients and statistics."""
        inputs = self._inputs(step)
        sources = {
            key: x for key, x in _keyed(INPUT_GRADIENT, "input", inputs).items() if _is_float(x)
        }
        for x in sources.values():
            x.attach_grad()
        for p in self._trained.values():
            if p.grad_req == "add":
                p.grad(self._device)[:] = 0
        with autograd.record(train_mode=training):
            outputs = _flat(self.net(*inputs))
            loss = self._loss(outputs)
        if loss is not None:
            autograd.backward([loss], train_mode=training)
        else:
            heads = [y for y in outputs if _is_float(y)]
            autograd.backward(heads, self._head_gradients(heads, step), train_mode=training)
        mx.nd.waitall()
        return _numpy(
            {
                **_keyed(OUTPUT, "output", outputs),
                **{key: x.grad for key, x in sources.items()},
                **{
                    (PARAMETER_GRADIENT, name): p.grad(self._device)
                    for name, p in self._trained.items()
                },
                **self._statistics(),
            }
        )

    def descend(self) -> None:
        """Take a step of gradient descent, along a gradient whose norm is at most 1."""
        parameters = list({id(p): p for p in self._trained.values()}.values())
        gradients = [p.grad(self._device) for p in parameters]
        squares = [float(np.square(g.asnumpy(), dtype=np.float64).sum()) for g in gradients]
        rate = self.settings.learning_rate / max(1.0, math.sqrt(sum(squares)))
        for p, gradient in zip(parameters, gradients):
            p.set_data(p.data(self._device) - rate * gradient)

    def values(self) -> Values:
        """Return the values of all parameters."""
        return {name: p.data(self._device).asnumpy() for name, p in self._parameters.items()}

    def _inputs(self, step: int) -> list[Array]:
        return [on_device(x, self._device) for x in self._batches[step % len(self._batches)]]

    def _head_gradients(self, heads: Sequence[Array], step: int) -> list[Array]:
        rng = self.settings.head_stream(step)
        drawn = [rng.normal(size=y.shape).astype(y.dtype) for y in heads]
        return [on_device(gradient, self._device) for gradient in drawn]

    def _loss(self, outputs: list[Array]) -> Array | None:
        if self.settings.loss is None:
            return None
        loss = self.settings.loss(outputs[0] if len(outputs) == 1 else outputs)
        if not isinstance(loss, mx.nd.NDArray):
            raise TypeError(f"loss must return an NDArray, got {loss!r}")
        return loss

    def _statistics(self) -> dict[Key, Array]:
        # An unused gamma or beta is left out: the built-in overwrites such a gamma with ones.
        return {
            (STATISTIC, name): p.data(self._device)
            for name, p in self._parameters.items()
            if name not in self._trained and name.rsplit(".", 1)[-1] not in ("gamma", "beta")
        }


def _is_float(x: Array) -> bool:
    return np.dtype(x.dtype).kind == "f"


def _flat(outputs: Any) -> list[Array]:
    """Return the arrays in nested lists and tuples."""
    if not isinstance(outputs, (list, tuple)):
        return [outputs]
    return [y for output in outputs for y in _flat(output)]


def _keyed(kind: str, name: str, arrays: Sequence[Array]) -> dict[Key, Array]:
    """Name arrays, and number them if there are several."""
    if len(arrays) == 1:
        return {(kind, name): arrays[0]}
    return {(kind, f"{name}[{i}]"): x for i, x in enumerate(arrays)}


def _numpy(tensors: dict[Key, Array]) -> Tensors:
    return {key: x.asnumpy() for key, x in tensors.items()}
