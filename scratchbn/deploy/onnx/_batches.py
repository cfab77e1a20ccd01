"""What a model is compared on: the example inputs, and other batches made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block

from ..._net import blocks_of, devices_of, flatten, regroup, without_hooks
from ..check import varied

Arrays = list[np.ndarray]


class Reference:
    """The net, as a function of NumPy arrays in inference; hooks stay quiet."""

    def __init__(self, net: Block, example_inputs: tuple[Any, ...]) -> None:
        self._net = net
        self._devices = devices_of(net)
        self._flat, self._structure = flatten(list(example_inputs))
        self.example: Arrays = [a.asnumpy() for a in self._flat if a is not None]

    def run(self, arrays: Arrays) -> Arrays:
        """Return the outputs in order."""
        new = iter(arrays)
        flat = [None if like is None else self._array(next(new), like) for like in self._flat]
        with autograd.pause(), without_hooks(blocks_of(self._net)):
            outputs, _ = flatten(self._net(*regroup(flat, self._structure)))
        return [output.asnumpy() for output in outputs if output is not None]

    def _array(self, values: np.ndarray, like: Any) -> Any:
        make = mx.np.array if isinstance(like, mx.np.ndarray) else mx.nd.array
        elsewhere = self._devices and like.ctx not in self._devices
        return make(values, dtype=like.dtype, ctx=self._devices[0] if elsewhere else like.ctx)


def probes(example: Arrays) -> list[Arrays]:
    """Return random numbers in place of a placeholder: zeros or ones would not show much."""
    other = [varied(a) for a in example]
    return [other] if any(new is not old for new, old in zip(other, example)) else []


def other_batches(example: Arrays) -> Iterator[Arrays]:
    """Yield a batch of 1, then larger ones than the example's."""
    lengths = [len(a) if a.ndim else 0 for a in example]
    if all(lengths):
        if set(lengths) != {1}:
            yield [_resized(a, 1) for a in example]
        yield [_resized(a, len(a) + 1) for a in example]
        yield [_resized(a, 2 * len(a)) for a in example]


def _resized(array: np.ndarray, length: int) -> np.ndarray:
    if length == 1:
        return array[:1]
    more = varied(array)[::-1][: length - len(array)]
    return np.concatenate([array, more])
