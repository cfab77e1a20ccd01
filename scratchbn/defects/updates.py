"""When the running statistics move."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, nn

from ..parity.oracle import OracleBatchNorm
from .case import Bench, Outcome, defect
from .measuring import batch, moved_mean, off, percent


class Twice(HybridBlock):
    """One layer called on two inputs; only the last result is used if `unused` is set."""

    def __init__(self, norm: Block, unused: bool) -> None:
        super().__init__()
        self.norm = norm
        self.unused = unused

    def hybrid_forward(self, F: Any, first: Any, second: Any) -> Any:
        """Call the layer twice."""
        results = self.norm(first), self.norm(second)
        return results[1] if self.unused else results[0] + results[1]


class Loop(HybridBlock):
    """A layer inside `contrib.foreach`."""

    def __init__(self, norm: Block) -> None:
        super().__init__()
        self.norm = norm

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Call the layer on each part of `x`."""
        return F.contrib.foreach(lambda part, state: (self.norm(part), state), x, F.zeros((1,)))[0]


@defect("`record()` and forward, no `backward()`: the statistics stay", 14357, 21111)
def forward_only(bench: Bench) -> Outcome:
    """The running statistics are updated by the backward operator."""
    layer, x = bench.layer(3), batch()
    with autograd.record():
        bench.net(layer)(bench.array(x))
    return moved_mean(layer, 0.1 * x.mean((0, 2, 3)))


@defect("`train_mode()` without recording, as in recalibration: the statistics stay", 14357)
def train_mode_only(bench: Bench) -> Outcome:
    """The running statistics are updated by the backward operator."""
    layer, x = bench.layer(3), batch()
    with autograd.train_mode():
        bench.net(layer)(bench.array(x))
    return moved_mean(layer, 0.1 * x.mean((0, 2, 3)))


@defect("`scale=False, center=False` as first layer of a net: never updated", 18673, 11774)
def no_affine(bench: Bench) -> Outcome:
    """Nothing needs a gradient of the first layer, so its backward, which updates, never runs."""
    layer, x = bench.layer(3, scale=False, center=False), batch()
    net = bench.net(layer, bench.ready(nn.Dense(2)))
    oracle = OracleBatchNorm.fresh(3, scale=False, center=False)
    for _ in range(3):
        with autograd.record():
            loss = net(bench.array(x)).sum()
        loss.backward()
        oracle.train(x)
    return moved_mean(layer, oracle.running_mean)


@defect("`backward()` twice through one forward: updated twice")
def two_backwards(bench: Bench) -> Outcome:
    """Each backward updates."""
    layer, x = bench.layer(3), batch()
    net = bench.net(layer)
    with autograd.record():
        y = net(bench.array(x))
    y.backward(retain_graph=True)
    y.backward()
    return moved_mean(layer, 0.1 * x.mean((0, 2, 3)))


@defect("`record()`, then `backward(train_mode=False)`: no update, wrong input gradient")
def backward_in_predict_mode(bench: Bench) -> Outcome:
    """The backward asks for the mode again, and by it decides whether to update."""
    layer, x, dy = bench.layer(3), batch(), batch(mean=1, seed=1)
    oracle = OracleBatchNorm.fresh(3)
    exact = oracle.train_step(x, dy)
    dx = bench.step(bench.net(layer), x, dy, backward_train=False)[1]
    updated = moved_mean(layer, oracle.running_mean)
    error = off(dx, exact.dx)
    text = f"gradient {percent(error)} off; {updated.text}"
    return Outcome(updated.sound and error < 1e-5, updated.broken and error > 0.5, text)


def shared(bench: Bench, unused: bool) -> tuple[Any, np.ndarray]:
    """Return a layer that was called twice, and the running mean it should have."""
    layer = bench.layer(3, momentum=0.5)
    net = bench.in_mode(Twice(layer, unused))
    first, second = batch(mean=8), batch(mean=0)
    with autograd.record():
        y = net(bench.array(first), bench.array(second))
    y.backward()
    oracle = OracleBatchNorm.fresh(3, momentum=0.5)
    oracle.train(first)
    oracle.train(second)
    return layer, oracle.running_mean


@defect("One layer called twice in a forward: updated in reverse order")
def shared_layer(bench: Bench) -> Outcome:
    """The backward updates, in its own order."""
    return moved_mean(*shared(bench, unused=False))


@defect("One layer called twice, first result unused: only one update")
def shared_layer_unused(bench: Bench) -> Outcome:
    """A call whose result is not used has no backward, which would update."""
    with warnings.catch_warnings():
        # The built-in leaves an input out of its graph.
        warnings.filterwarnings("ignore", "The 0-th input to HybridBlock is not used")
        return moved_mean(*shared(bench, unused=True))


@defect("A layer in `contrib.foreach`: updated in reverse order, or never without `backward()`")
def foreach(bench: Bench) -> Outcome:
    """The backward updates, in its own order."""
    layer = bench.layer(3, momentum=0.5)
    net = bench.in_mode(Loop(layer))
    x = batch((3, 8, 3)) + np.array([0, 10, 20]).reshape(3, 1, 1)
    if bench.mode == "eager":
        bench.step(net, x)
    else:  # MXNet cannot run the backward of such a loop in a graph, whatever the layer
        with autograd.train_mode():
            net(bench.array(x))
    oracle = OracleBatchNorm.fresh(3, momentum=0.5)
    for part in x:
        oracle.train(part)
    return moved_mean(layer, oracle.running_mean)
