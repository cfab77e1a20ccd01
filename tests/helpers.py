"""Build a layer or net in any of the modes MXNet can run it in, and take steps with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import scratchbn
from scratchbn import native
from scratchbn.environment.prepare import find_cuda_libraries
from scratchbn.native import cuda
from scratchbn.parity.oracle import OracleBatchNorm, Step

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn

REPOSITORY = Path(__file__).resolve().parent.parent
MODES = ("eager", "hybrid", "static_alloc", "static_shape", "nested", "exported")
BLOCK_MODES = MODES[:-1]
GRAPH_MODES = MODES[1:]
STATE = ("gamma", "beta", "running_mean", "running_var")
# How far a result may be from the float64 oracle, by the dtype of the data.
CLOSE = {
    "float64": {"rtol": 1e-10, "atol": 1e-10},
    "float32": {"rtol": 1e-4, "atol": 2e-5},
    "float16": {"rtol": 5e-3, "atol": 5e-3},
}

BFLOAT16 = np.dtype([("bfloat16", np.uint16)])  # as MXNet has it
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # `make sanitize`


def make(*arguments, env=None, **variables):
    """Run `make` in the repository."""
    given = [f"{name}={value}" for name, value in variables.items()]
    command = ["make", "--no-print-directory", "-C", str(REPOSITORY), *arguments, *given]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def run_script(name, options, directory):
    """Run a script of the repository in a process of its own, elsewhere; it has to end with 0."""
    process = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / name), *options],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process


def load_kernel(device):
    """Load the compiled kernel for a device; skip the test where it cannot be had."""
    try:
        native.load()
        if device.device_type == "gpu":
            cuda.load({device.device_id})
    except scratchbn.BackendError as error:
        pytest.skip(str(error))


def array(values, device, dtype="float64"):
    """A device array of the kind in use: `mx.np` under `npx.set_np`, `mx.nd` otherwise."""
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    return make(np.asarray(values), dtype=dtype, ctx=device)


def in_mode(net, mode, sample=None, directory=None):
    """Return `net` prepared to run in `mode`; `exported` needs a sample input and a directory."""
    if mode == "eager":
        return net
    if mode == "nested":
        outer, inner = nn.HybridSequential(), nn.HybridSequential()
        inner.add(net)
        outer.add(inner)
        outer.hybridize()
        return outer
    if mode == "exported":
        net.hybridize()
        net(sample)
        net.export(str(directory / "net"))
        return SymbolBlock.imports(
            str(directory / "net-symbol.json"),
            ["data"],
            str(directory / "net-0000.params"),
            ctx=sample.ctx,
        )
    net.hybridize(
        static_alloc=mode in ("static_alloc", "static_shape"), static_shape=mode == "static_shape"
    )
    return net


@dataclass
class Subject:
    """A layer under test: `net` runs it in `mode`, `oracle` holds what it should compute."""

    mode: str
    layer: object
    net: object
    oracle: OracleBatchNorm
    device: mx.Context
    dtype: str

    def __call__(self, x):
        return self.net(x)

    def array(self, values):
        return array(values, self.device, self.dtype)

    def parameter(self, name):
        found = [p for key, p in self.net.collect_params().items() if key.endswith("_" + name)]
        assert len(found) == 1, f"{name}: {[p.name for p in found]}"
        return found[0]

    def value(self, name):
        mx.nd.waitall()
        return self.parameter(name).data(self.device).asnumpy()

    def statistics(self):
        """The running mean and variance, as NumPy arrays of their own."""
        return self.value("running_mean"), self.value("running_var")

    def gradient(self, name):
        parameter = self.parameter(name)
        if parameter.grad_req == "null":
            return np.zeros(parameter.shape)
        return parameter.grad(self.device).asnumpy().astype(np.float64)

    def check_statistics(self, rtol=None):
        """Compare the running statistics with the oracle's."""
        close = CLOSE["float64" if self.dtype == "float64" else "float32"]
        if rtol is not None:
            close = {"rtol": rtol, "atol": 0}
        mean, var = self.statistics()
        np.testing.assert_allclose(mean, self.oracle.running_mean, err_msg="running_mean", **close)
        np.testing.assert_allclose(var, self.oracle.running_var, err_msg="running_var", **close)


def random_values(rng, channels):
    """Values for the four parameters that no default could be mistaken for."""
    return {
        "gamma": rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels),
        "beta": rng.normal(size=channels),
        "running_mean": rng.normal(size=channels),
        "running_var": rng.uniform(0.5, 2, channels),
    }


def set_values(layer, values):
    """Write arrays into the layer's parameters by their structural names."""
    for name, value in values.items():
        parameter = getattr(layer, name)
        parameter.set_data(array(value, parameter.list_ctx()[0], parameter.dtype))


def build_subject(
    mode,
    shape,
    *,
    rng,
    device,
    directory,
    layer_class=None,
    dtype="float64",
    values=None,
    **options,
):
    """Build a layer for data of `shape` with non-trivial parameters, in `mode`, and its oracle."""
    layer_class = layer_class or scratchbn.ScratchBatchNorm
    channels = shape[options.get("axis", 1)]
    state_dtype = "float32" if dtype == "float16" else dtype
    state = {**random_values(rng, channels), **(values or {})}
    state = {name: np.asarray(value).astype(state_dtype) for name, value in state.items()}
    layer = layer_class(in_channels=channels, **options)
    layer.initialize(ctx=device)
    layer.cast(dtype)
    set_values(layer, state)
    relu = issubclass(layer_class, scratchbn.ScratchBatchNormReLU)
    oracle = OracleBatchNorm(**state, relu=relu, **options)
    sample = array(np.zeros(shape), device, dtype) if mode == "exported" else None
    return Subject(mode, layer, in_mode(layer, mode, sample, directory), oracle, device, dtype)


def take_step(subject, x, dy, *, record_train=True, backward_train=True, backwards=1):
    """Forward under `record(train_mode=record_train)` and backward, as float64 NumPy arrays."""
    data, head = subject.array(x), subject.array(dy)
    data.attach_grad()
    with autograd.record(train_mode=record_train):
        y = subject(data)
    for i in range(backwards):
        y.backward(head, retain_graph=i < backwards - 1, train_mode=backward_train)
    mx.nd.waitall()
    return Step(
        y=y.asnumpy().astype(np.float64),
        dx=data.grad.asnumpy().astype(np.float64),
        dgamma=subject.gradient("gamma"),
        dbeta=subject.gradient("beta"),
    )


def untrained():
    """Expect the warning of `freeze`, of statistics that are those of a new layer: of values."""
    return pytest.warns(UserWarning, match="these layers do not normalize")


def forward_backward(net, data, head):
    """Take data that gets a gradient through a net in training and back; return the output."""
    data.attach_grad()
    with autograd.record():
        y = net(data)
    y.backward(head)
    mx.nd.waitall()
    return y


def check_step(actual, expected, dtype="float64"):
    """Compare output and gradients; gradients relative to their largest value."""
    for name in ("y", "dx", "dgamma", "dbeta"):
        a, e = getattr(actual, name), getattr(expected, name)
        size = max(1.0, np.abs(e).max()) if e.size else 1.0
        np.testing.assert_allclose(a / size, e / size, err_msg=name, **CLOSE[dtype])


def train_forward(subject, x):
    """A training forward without any recording: returns the output as NumPy array."""
    with autograd.train_mode():
        y = subject(subject.array(x))
    mx.nd.waitall()
    return y.asnumpy()


def infer(subject, x):
    """An inference forward: returns the output as NumPy array."""
    return subject(subject.array(x)).asnumpy()


def numeric_gradient(loss, array, step=1e-6):
    """The gradient of `loss()` by central differences, element by element of `array`."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = loss()
        array[index] = kept - step
        below = loss()
        array[index] = kept
        gradient[index] = (above - below) / (2 * step)
    return gradient


def run_python(
    source: str, *args: str, env: dict | None = None, timeout: float = 120
) -> subprocess.CompletedProcess:
    """Run Python source in a process of its own; the caller judges the result."""
    return subprocess.run(
        [sys.executable, "-c", source, *map(str, args)],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
            **(env or {}),
        },
        capture_output=True,
        text=True,
        timeout=timeout * float(os.environ.get("SCRATCHBN_TEST_PATIENCE", 1)),
        check=False,
    )


def without_scratchbn() -> dict:
    """The environment in which mxnet finds pip's CUDA libraries without `scratchbn` before it."""
    folders = dict.fromkeys(str(path.parent) for path in find_cuda_libraries().values())
    if not folders:
        return {}
    present = filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    return {"LD_LIBRARY_PATH": os.pathsep.join([*present, *folders])}


def last_json(process: subprocess.CompletedProcess):
    """The JSON document on the last line of a process that must have succeeded."""
    assert process.returncode == 0, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
    return json.loads(process.stdout.strip().splitlines()[-1])
