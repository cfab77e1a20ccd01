"""The defects of `gluon.nn.BatchNorm` in MXNet 1.9.1 on a CPU, each as one measurement.

A case runs the same few lines with the built-in layer or with ours, eagerly or in a graph, and
compares what it sees with the float64 oracle. `test_defects.py` asserts the outcomes;
`scripts/defects_table.py` prints them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import signal
import subprocess
from contextlib import contextmanager
from typing import Callable

import scratchbn

# isort: split
import mxnet as mx
import numpy as np
from helpers import run_python
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn
from oracle import OracleBatchNorm

LAYERS = {
    "built-in": (nn.BatchNorm, nn.BatchNormReLU),
    "ours": (scratchbn.ScratchBatchNorm, scratchbn.ScratchBatchNormReLU),
}
MODES = ("eager", "graph")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a case saw: `sound` agrees with the mathematics, `broken` is the defect as known."""

    sound: bool
    broken: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Bench:
    """One of the two layers, in one mode, on one device."""

    norm: str
    mode: str
    device: mx.Context

    def layer(self, channels, dtype="float32", *, relu=False, values=None, **options):
        layer = LAYERS[self.norm][relu](in_channels=channels, **options)
        layer.initialize(ctx=self.device)
        layer.cast(dtype)
        for name, value in (values or {}).items():
            getattr(layer, name).set_data(mx.nd.full((channels,), value, ctx=self.device))
        return layer

    def ready(self, block):
        block.initialize(ctx=self.device)
        return block

    def net(self, *blocks):
        """Initialized blocks in a row; in a graph, inside a hybridized net."""
        net = nn.HybridSequential()
        net.add(*blocks)
        if self.mode == "graph":
            net.hybridize()
        return net

    def array(self, values, dtype="float32"):
        make = mx.np.array if mx.util.is_np_array() else mx.nd.array
        return make(np.asarray(values), dtype=dtype, ctx=self.device)

    def step(self, net, x, dy=None, *, dtype="float32", record_train=True, backward_train=True):
        """One forward and backward: the output and the input's gradient in float64."""
        data = self.array(x, dtype)
        data.attach_grad()
        with autograd.record(train_mode=record_train):
            y = net(data)
        y.backward(None if dy is None else self.array(dy, dtype), train_mode=backward_train)
        mx.nd.waitall()
        return y.asnumpy().astype(np.float64), data.grad.asnumpy().astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Defect:
    """A case; `apart` where the built-in may take the process down."""

    key: str
    symptom: str
    threads: tuple[int, ...]
    apart: bool
    measure: Callable[[Bench], Outcome]

    def outcome(self, norm, mode, device):
        """Measure; the built-in in a process of its own where it may not survive."""
        if self.apart and norm == "built-in":
            return _apart(self, norm, mode, device)
        return self.measure(Bench(norm, mode, device))


DEFECTS: dict[str, Defect] = {}


def defect(symptom, *threads, apart=False):
    """Enter a measurement into `DEFECTS` under its function's name."""

    def enter(measure):
        key = measure.__name__
        DEFECTS[key] = Defect(key, symptom, threads, apart, measure)
        return measure

    return enter


_ONE_CASE = """
import dataclasses, json, sys
import defect_cases, mxnet as mx
key, norm, mode, kind, index = sys.argv[1:]
bench = defect_cases.Bench(norm, mode, mx.Context(kind, int(index)))
print(json.dumps(dataclasses.asdict(defect_cases.DEFECTS[key].measure(bench))), flush=True)
mx.nd.waitall()
"""


def _apart(case, norm, mode, device, seconds=20):
    arguments = (case.key, norm, mode, device.device_type, device.device_id)
    try:
        process = run_python(_ONE_CASE, *arguments, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Outcome(False, True, f"the process hangs, killed after {seconds} s")
    if process.returncode:
        if process.returncode > 0 and "Segmentation fault" not in process.stderr:
            raise RuntimeError(f"{case.key}: exit status {process.returncode}\n{process.stderr}")
        return Outcome(False, True, f"the process dies of {_signal_name(process.returncode)}")
    return Outcome(**json.loads(process.stdout.splitlines()[-1]))


def _signal_name(returncode):
    # MXNet's handler of segmentation faults turns the signal into an exit status.
    return signal.Signals(-returncode).name if returncode < 0 else "SIGSEGV"


# What the cases have in common


def _shortened(text, most=120):
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def complaint(action):
    """Run `action`; return the essential line of the exception it raised, or None."""
    try:
        action()
        mx.nd.waitall()
    except (mx.MXNetError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = lines[-1].replace("MXNetError: ", "")
        last = last[last.index("Check failed") :] if "Check failed" in last else last
        last = re.sub(r" in node \S+", "", last).rstrip(": ")
        return f"{type(error).__name__}: {_shortened(last)}"
    return None


def statistics(layer):
    mx.nd.waitall()
    return [p.data().asnumpy().astype(np.float64) for p in (layer.running_mean, layer.running_var)]


def off(actual, exact):
    """The largest difference relative to the largest exact value; infinite where one is NaN."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.asarray(actual, np.float64) - exact)
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max() / np.abs(exact).max())


def percent(fraction):
    rounded = float(f"{100 * fraction:.2g}")
    return f"{rounded:,.0f}%" if rounded >= 10 else f"{rounded:.2g}%"


def numbers(values):
    return "[" + ", ".join(f"{value:.4g}" for value in np.ravel(values)) + "]"


def moved_mean(layer, exact):
    """The outcome of a case in which the running mean should be `exact`; fresh layers have 0."""
    mean = statistics(layer)[0]
    text = f"running mean {mean[0]:.3f}, exact {exact[0]:.3f}"
    return Outcome(off(mean, exact) < 1e-6, off(mean, exact) > 0.05, text)


def unpoisoned(layer, before=(0.0, 1.0), also=""):
    """The outcome of a case in which a bad batch should leave the statistics as they were."""
    mean, var = statistics(layer)
    same = bool((mean == before[0]).all() and (var == before[1]).all())
    poisoned = not (np.isfinite(mean).all() and np.isfinite(var).all())
    text = f"running mean {numbers(mean)}, variance {numbers(var)}{also}"
    return Outcome(same, poisoned, text)


@contextmanager
def numpy_semantics(*, shape=True, array=True):
    before = {"shape": mx.util.is_np_shape(), "array": mx.util.is_np_array()}
    mx.npx.set_np(shape=shape, array=array)
    try:
        yield
    finally:
        mx.npx.set_np(**before) if before["shape"] else mx.npx.reset_np()


class Twice(HybridBlock):
    """One layer called on two inputs; only the last result is used if `unused` is set."""

    def __init__(self, norm, unused):
        super().__init__()
        self.norm = norm
        self.unused = unused

    def hybrid_forward(self, F, first, second):
        results = self.norm(first), self.norm(second)
        return results[1] if self.unused else results[0] + results[1]


class Loop(HybridBlock):
    """A layer inside `contrib.foreach`."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def hybrid_forward(self, F, x):
        return F.contrib.foreach(lambda part, state: (self.norm(part), state), x, F.zeros((1,)))[0]


@functools.lru_cache(maxsize=4)
def batch(shape=(8, 3, 4, 4), mean=3.0, std=2.0, seed=0):
    values = np.random.default_rng(seed).normal(mean, std, shape)
    values.flags.writeable = False
    return values


# When the statistics move


@defect("`record()` and forward, no `backward()`: the statistics stay", 14357, 21111)
def forward_only(bench):
    layer, x = bench.layer(3), batch()
    with autograd.record():
        bench.net(layer)(bench.array(x))
    return moved_mean(layer, 0.1 * x.mean((0, 2, 3)))


@defect("`train_mode()` without recording, as in recalibration: the statistics stay", 14357)
def train_mode_only(bench):
    layer, x = bench.layer(3), batch()
    with autograd.train_mode():
        bench.net(layer)(bench.array(x))
    return moved_mean(layer, 0.1 * x.mean((0, 2, 3)))


@defect("`scale=False, center=False` as first layer of a net: never updated", 18673, 11774)
def no_affine(bench):
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
def two_backwards(bench):
    layer, x = bench.layer(3), batch()
    net = bench.net(layer)
    with autograd.record():
        y = net(bench.array(x))
    y.backward(retain_graph=True)
    y.backward()
    return moved_mean(layer, 0.1 * x.mean((0, 2, 3)))


@defect("`record()`, then `backward(train_mode=False)`: no update, wrong input gradient")
def backward_in_predict_mode(bench):
    layer, x, dy = bench.layer(3), batch(), batch(mean=1, seed=1)
    oracle = OracleBatchNorm.fresh(3)
    exact = oracle.train_step(x, dy)
    dx = bench.step(bench.net(layer), x, dy, backward_train=False)[1]
    updated = moved_mean(layer, oracle.running_mean)
    error = off(dx, exact.dx)
    text = f"gradient {percent(error)} off; {updated.text}"
    return Outcome(updated.sound and error < 1e-5, updated.broken and error > 0.5, text)


def shared(bench, unused):
    layer = bench.layer(3, momentum=0.5)
    net = Twice(layer, unused)
    if bench.mode == "graph":
        net.hybridize()
    first, second = batch(mean=8), batch(mean=0)
    with autograd.record():
        y = net(bench.array(first), bench.array(second))
    y.backward()
    oracle = OracleBatchNorm.fresh(3, momentum=0.5)
    oracle.train(first)
    oracle.train(second)
    return layer, oracle.running_mean


@defect("One layer called twice in a forward: updated in reverse order")
def shared_layer(bench):
    return moved_mean(*shared(bench, unused=False))


@defect("One layer called twice, first result unused: only one update")
def shared_layer_unused(bench):
    return moved_mean(*shared(bench, unused=True))


@defect("A layer in `contrib.foreach`: updated in reverse order, or never without `backward()`")
def foreach(bench):
    layer = bench.layer(3, momentum=0.5)
    net = Loop(layer)
    if bench.mode == "graph":
        net.hybridize()
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


# Gradients


@defect("`record(train_mode=False)`, then a plain `backward()`: wrong input gradient", 9580)
def predict_mode_gradient(bench):
    x, errors = batch(), []
    for dy in (batch(mean=0, std=1, seed=1), np.ones(x.shape)):
        dx = bench.step(bench.net(bench.layer(3)), x, dy, record_train=False)[1]
        exact = OracleBatchNorm.fresh(3).infer_step(x, dy).dx
        errors.append(float(np.linalg.norm(dx - exact) / np.linalg.norm(exact)))
    text = "gradient {} off for a random dy, {} for ones".format(*map(percent, errors))
    return Outcome(max(errors) < 1e-6, min(errors) > 0.1, text)


RANKS = {nn.Conv1D: 1, nn.Conv2D: 2, nn.Conv3D: 3}


def after_convolution(bench, convolution, axis=1):
    errors = {}
    for channels in (7, 8, 16, 64):
        blocks = convolution(channels, 3, padding=1), LAYERS[bench.norm][0](axis=axis)
        net = bench.net(*map(bench.ready, blocks))
        x = batch((2, 3) + (8,) * RANKS[convolution])
        errors[channels] = complaint(lambda net=net, x=x: bench.step(net, x, None))
    failed = [channels for channels, error in errors.items() if error]
    text = f"{errors[8]} with {failed} channels" if failed else "runs with 7, 8, 16, 64 channels"
    return Outcome(not failed, failed == [8, 16, 64], text)


@defect("Conv1D, then batch norm: `backward()` fails with 8, 16, 64 channels", 20858, 19150)
def after_conv1d(bench):
    return after_convolution(bench, nn.Conv1D)


@defect("Conv2D, then batch norm of another axis than 1: the same", 20858, 19150)
def after_conv2d_other_axis(bench):
    return after_convolution(bench, nn.Conv2D, axis=-1)


@defect("Conv3D, then batch norm: the same", 20858, 19150)
def after_conv3d(bench):
    return after_convolution(bench, nn.Conv3D)


# Numbers


def numerics(bench, x, dy, dtype="float32", **options):
    """Errors of a training step: output (absolute), input gradient, batch variance."""
    x, dy = x.astype(dtype), dy.astype(dtype)
    layer = bench.layer(x.shape[1], dtype, momentum=0.0, **options)
    y, dx = bench.step(bench.net(layer), x, dy, dtype=dtype)
    oracle = OracleBatchNorm.fresh(x.shape[1], momentum=0.0, **options)
    exact = oracle.train_step(x, dy)
    return (
        np.abs(y - exact.y).max(),
        off(dx, exact.dx),
        off(statistics(layer)[1], oracle.running_var),
    )


@defect("float32, mean 1e5, standard deviation 1: output, gradient and variance")
def large_mean(bench):
    shape = (16, 3, 64, 64)
    x, dy = batch(shape, 1e5, 1), batch(shape, 0, 1, seed=1)
    y, dx, var = numerics(bench, x, dy)
    text = f"output off by {y:.2g}, gradient {percent(dx)}, variance {percent(var)}"
    # float32 rounds a mean of 1e5 to 1/128, and the output with it.
    return Outcome(y < 0.01 and dx < 1e-3 and var < 1e-3, y > 1 and var > 1, text)


@defect("float32, 4 million elements per channel, mean 3, standard deviation 2")
def large_reduction(bench):
    shape = (4, 1, 1024, 1024)
    y, dx, var = numerics(bench, batch(shape), batch(shape, 0, 1, seed=1))
    text = f"output off by {y:.2g}, gradient {percent(dx)}, variance {percent(var)}"
    return Outcome(y < 2e-5 and dx < 2e-5 and var < 1e-5, y > 1e-3 and var > 1e-3, text)


@defect("Running variance rebuilt from 1/std: standard deviation 1e-5, epsilon 1e-3")
def small_variance(bench):
    x = batch((64, 4, 8, 8), 0, 1e-5)
    var = numerics(bench, x, x, epsilon=1e-3)[2]
    return Outcome(var < 1e-5, var > 0.2, f"variance {percent(var)} off")


@defect("Running variance of a constant channel, momentum 0: negative")
def negative_variance(bench):
    layer = bench.layer(2, momentum=0.0)
    bench.step(bench.net(layer), np.full((8, 2), 0.5))
    var = statistics(layer)[1]
    text = f"running variance {numbers(var)}"
    return Outcome(bool((var == 0).all()), bool((var < 0).all()), text)


@defect("float16: the input gradient where most of it cancels (loss = y * y)", 8509, 9916)
def float16_gradient(bench):
    x = batch((64, 4, 16, 16), 0, 1)
    dy = OracleBatchNorm.fresh(4).train(x.astype("float16")).astype("float16")
    dx = numerics(bench, x, dy, "float16")[1]
    return Outcome(dx < 0.01, dx > 0.5, f"gradient {percent(dx)} off")


@defect("float16: epsilon is rounded to float16, 1e-8 to 0; a constant channel")
def float16_epsilon(bench):
    layer = bench.layer(2, "float16", epsilon=1e-8)
    y, dx = bench.step(bench.net(layer), [[1, 1], [1, 2], [1, 3]], dtype="float16")
    text = f"output {numbers(y[:, 0])}, gradient {numbers(dx[:, 0])}"
    exact = not y[:, 0].any() and not dx[:, 0].any()
    return Outcome(exact, bool(np.isnan(y[:, 0]).all()), text)


@defect("float64: the statistics are averaged with a float32 momentum")
def float64_statistics(bench):
    layer, x = bench.layer(3, "float64"), batch()
    bench.step(bench.net(layer), x, dtype="float64")
    oracle = OracleBatchNorm.fresh(3)
    oracle.train(x)
    error = off(statistics(layer)[0], oracle.running_mean)
    return Outcome(error < 1e-14, error > 1e-8, f"running mean {error:.1g} off, relative")


# Options that do not do what they say


@defect("`scale=False` overwrites gamma with 1, eagerly in inference too", 9624)
def scale_false(bench):
    layer, gammas = bench.layer(3, scale=False, values={"gamma": 5}), []
    net = bench.net(layer)
    for mode in (autograd.predict_mode, autograd.record):
        with mode():
            net(bench.array(batch()))
        mx.nd.waitall()
        gammas.append(layer.gamma.data().asnumpy()[0])
    text = "gamma of 5 is {:g} after inference, {:g} after training".format(*gammas)
    return Outcome(gammas == [5, 5], gammas == [5 if bench.mode == "graph" else 1, 1], text)


@defect("`center=False` still adds beta", 11774, 10401)
def center_false(bench):
    layer = bench.layer(3, center=False, values={"beta": 5})
    x = batch()
    y = bench.net(layer)(bench.array(x)).asnumpy()
    shift = float((y - OracleBatchNorm.fresh(3).infer(x)).mean())
    return Outcome(abs(shift) < 1e-5, abs(shift - 5) < 1e-3, f"beta of 5 adds {abs(shift):.2g}")


@defect("momentum=5 and epsilon=-1 are accepted")
def invalid_options(bench):
    options = {"momentum": 5.0}, {"epsilon": -1.0}
    errors = [complaint(lambda o=o: bench.layer(3, **o)) for o in options]
    text = "; ".join(error or "accepted" for error in errors)
    sound = all(error and error.startswith("ValueError") for error in errors)
    return Outcome(sound, not any(errors), text)


@defect("5 channels declared, 3 given: accepted, part of the statistics move")
def too_few_channels(bench):
    layer = bench.layer(5)
    error = complaint(lambda: bench.step(bench.net(layer), batch()))
    mean = statistics(layer)[0]
    text = f"{error or 'accepted'}; running mean {numbers(mean)}"
    moved = list(mean != 0)
    return Outcome(bool(error) and not any(moved), not error and moved == [1, 1, 1, 0, 0], text)


@defect("3 channels declared, 100000 given: memory beyond the parameters", 20128, apart=True)
def too_many_channels(bench):
    layer = bench.layer(3)
    error = complaint(lambda: bench.step(bench.net(layer), np.ones((2, 100000, 4, 4))))
    mean = statistics(layer)[0]
    text = f"{error or 'accepted'}; running mean {numbers(mean)}"
    return Outcome(bool(error) and not mean.any(), not error, text)


# Batches that poison the statistics


def spoiled(value):
    x = batch((4, 3)).copy()
    x[0, 1] = value
    return x


@defect("An infinite value in one batch: running statistics inf and NaN for good")
def infinite_batch(bench):
    layer = bench.layer(3)
    bench.step(bench.net(layer), spoiled(np.inf))
    return unpoisoned(layer)


@defect("A NaN in one batch: the same")
def nan_batch(bench):
    layer = bench.layer(3)
    bench.step(bench.net(layer), spoiled(np.nan))
    return unpoisoned(layer)


@defect("A finite batch whose variance overflows float32 (one value of 1e30)")
def overflowing_batch(bench):
    layer = bench.layer(3)
    bench.step(bench.net(layer), spoiled(1e30))
    return unpoisoned(layer)


@defect("momentum=1, which should never move them, and an infinite value")
def momentum_one(bench):
    layer = bench.layer(3, momentum=1.0)
    bench.step(bench.net(layer), spoiled(np.inf))
    return unpoisoned(layer)


def empty(bench, dtype):
    with numpy_semantics(array=False):
        layer = bench.layer(3, dtype)
        net = bench.net(layer)
        error = complaint(lambda: bench.step(net, np.zeros((0, 3)), dtype=dtype))
        return unpoisoned(layer, also=f"; {error}" if error else "")


@defect("An empty batch, float32")
def empty_batch(bench):
    return empty(bench, "float32")


@defect("An empty batch, float64")
def empty_batch_float64(bench):
    return empty(bench, "float64")


def constant(bench, dtype):
    layer, x = bench.layer(2, dtype, epsilon=0.0), batch((4, 2)).copy()
    x[:, 1] = 2
    y, dx = bench.step(bench.net(layer), x, dtype=dtype)
    seen = np.array([y[0, 1], dx[0, 1], statistics(layer)[1][1]])
    text = "output {:.3g}, gradient {:.3g}, running variance {:.3g}".format(*seen)
    return Outcome(off(seen, [0, 0, 0.9]) < 1e-6, not np.isfinite(seen).all(), text)


@defect("epsilon=0 and a constant channel, float32")
def zero_epsilon(bench):
    return constant(bench, "float32")


@defect("epsilon=0 and a constant channel, float64")
def zero_epsilon_float64(bench):
    return constant(bench, "float64")


# BatchNormReLU


def relu_step(bench, shape, axis=1, dtype="float32"):
    x, dy = (batch(shape, 0, 1, seed).astype(dtype) for seed in (0, 1))
    layer = bench.layer(shape[axis], dtype, relu=True, axis=axis)
    y, dx = bench.step(bench.net(layer), x, dy, dtype=dtype)
    exact = OracleBatchNorm.fresh(shape[axis], axis=axis, relu=True).train_step(x, dy)
    return y, max(off(y, exact.y), off(dx, exact.dx))


@defect("`BatchNormReLU` with `npx.set_np()`: no relu", 17679)
def relu_in_numpy_mode(bench):
    with numpy_semantics():
        y, error = relu_step(bench, (4, 3, 5, 5))
    text = f"smallest output {y.min():.3g}"
    return Outcome(bool(y.min() == 0 and error < 1e-5), bool(y.min() < -1), text)


@defect("`BatchNormReLU` of float64, float16, 2-D, 3-D, or axis -1: fails", 17679)
def relu_formats(bench):
    formats = {
        "float64": {"shape": (4, 3, 5, 5), "dtype": "float64"},
        "float16": {"shape": (4, 3, 5, 5), "dtype": "float16"},
        "2-D": {"shape": (8, 3)},
        "3-D": {"shape": (4, 3, 5)},
        "axis -1": {"shape": (4, 5, 5, 3), "axis": -1},
    }
    worst, errors = {}, {}
    for name, arguments in formats.items():

        def run(name=name, arguments=arguments):
            worst[name] = relu_step(bench, **arguments)[1]

        errors[name] = complaint(run)
    failed = [name for name, error in errors.items() if error]
    if failed:
        text = f"{errors[failed[0]]} ({', '.join(failed)})"
    else:
        text = f"runs; output and gradient at most {max(worst.values()):.1g} off, in float16"
    close = not failed and all(w < (2e-3 if n == "float16" else 1e-5) for n, w in worst.items())
    return Outcome(close, len(failed) == len(formats), text)
