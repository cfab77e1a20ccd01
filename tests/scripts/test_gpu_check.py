"""The check of a machine with a card, run to its end without one: kernels and clock are stand-ins.

Where PyTorch is at hand its own program runs; else arrays of NumPy take the place of PyTorch's.
"""

import argparse
import os
import subprocess
import sys
import time

from scratchbn import native
from scratchbn.parity.oracle import OracleBatchNorm

# isort: split
import cuda_on_cpu
import mxnet as mx
import numpy as np
import pytest
from gpu_kit.numbers import OPTIONS, check_numbers, errors
from gpu_kit.report import report
from gpu_kit.speed import EventClock, Measured, seconds, verdict
from helpers import REPOSITORY

pytestmark = [
    pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        mx.runtime.Features().is_enabled("CUDA"), reason="a driver of its own is in the process"
    ),
]
FEW = [((4, 3), 1), ((3, 8, 5, 8), 1), ((40, 6, 3), 1)]


@pytest.fixture(scope="module")
def operator():
    return cuda_on_cpu.operator_on(cuda_on_cpu.Driver())


class Arrays(cuda_on_cpu.HostMemory):
    """Arrays of NumPy."""

    def put(self, values):
        return values.copy()

    def take(self, array):
        return array

    def draw(self, shape, dtype):
        return np.random.default_rng(0).normal(size=shape).astype(dtype)


def reference(x, dy, state, options):
    names = ("gamma", "beta", "running_mean", "running_var")
    some = {k: options[k] for k in ("axis", "epsilon", "momentum", "relu")}
    oracle = OracleBatchNorm(**{name: state[name].copy() for name in names}, **some)
    linear = OracleBatchNorm(**{name: state[name].copy() for name in names}, **{**some, "relu": 0})
    training = state["flag"][0] != 1
    z = linear.train(x) if training else linear.infer(x)
    step = (oracle.train_step if training else oracle.infer_step)(x, dy)
    moved = {name: getattr(oracle, name) for name in names[2:]}
    return {"y": step.y, "dx": step.dx, "dgamma": step.dgamma, "dbeta": step.dbeta, "z": z, **moved}


class Peer:
    """Another library: does nothing, in as many calls as are made."""

    name = "peer"

    def copy(self, to, source):
        to[:] = source

    def batch_norm(self, x, dy, state, axis):
        return (lambda: None), (lambda: None)


class Once:
    """Makes a call once, and remembers how long it took."""

    def __init__(self):
        self.took = {}

    def seconds(self, calls):
        call = calls[0]
        if call not in self.took:
            before = time.perf_counter()
            call()
            self.took[call] = time.perf_counter() - before
        return self.took[call] * len(calls)


def test_the_report_is_whole(operator, capsys):
    parts = (operator, Arrays(), reference, Peer(), Once())
    text, wrong = report("a stand-in", *parts, [0.8], ["float32"], shapes=FEW)
    assert wrong == 0
    assert capsys.readouterr().out.strip() == text
    lines = text.splitlines()
    assert lines[0] == "# scratchbn on a stand-in"
    assert "No result is wrong." in lines
    numbers = [line for line in lines if line.startswith(("| float16 |", "| float32 |"))]
    assert len(numbers) == 2 * len(OPTIONS) - 1
    assert all(0 < float(line.split("|")[3]) <= 1 for line in numbers)
    for layout in ("NCHW", "NHWC"):
        (row,) = [line for line in lines if line.startswith(f"| float32, {layout} | 0.8 |")]
        assert row.count("|") == 12
    assert "No array of 32 MiB was measured." in lines


def fails_with(message):
    class Failing(Arrays):
        def draw(self, shape, dtype):
            if np.prod(shape) > 1e6:
                raise RuntimeError(message)
            return super().draw(shape, dtype)

    return Failing()


def test_a_size_that_does_not_fit_is_named_and_the_others_are_measured(operator):
    arrays = fails_with("CUDA out of memory. Tried to allocate 512.00 MiB")
    parts = (operator, arrays, reference, Peer(), Once())
    text, wrong = report("a stand-in", *parts, [512, 0.8], ["float32"], shapes=FEW[:1])
    assert wrong == 0
    assert text.count("| 0.8 |") == 2
    for layout in ("NCHW", "NHWC"):
        assert f"- float32, {layout}, 512 MiB: the card has no memory for it." in text


def test_an_error_of_the_card_ends_it_and_what_was_known_is_there(operator):
    arrays = fails_with("CUDA error: an illegal memory access was encountered")
    parts = (operator, arrays, reference, Peer(), Once())
    text, wrong = report("a stand-in", *parts, [32], ["float32"], shapes=FEW[:1])
    assert wrong == 1
    assert "No result is wrong." in text
    assert "It stopped: CUDA error: an illegal memory access was encountered" in text


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_what_is_missing_is_named(tmp_path, name):
    for module in ("torch", "numpy"):
        (tmp_path / f"{module}.py").write_text("def __getattr__(name): return name")
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name={name!r})")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(REPOSITORY / "scripts" / "gpu_check.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"gpu_check: needs {name}: ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["y", "dx", "dgamma", "dbeta", "running_mean", "running_var"])
def test_a_wrong_number_is_counted(operator, name):
    def planted(*arguments):
        want = reference(*arguments)
        want[name] = want[name] * (1 + 1e-5)
        return want

    found = errors(operator, Arrays(), planted, (3, 8, 5, 8), 1, "float32")
    assert [n for n, error in found.items() if error > 1] == [name]


def test_what_is_no_number_is_wrong(operator):
    def planted(*arguments):
        return {name: value * np.nan for name, value in reference(*arguments).items()}

    rows, wrong = check_numbers(operator, Arrays(), planted, FEW[:1])
    assert wrong == 6 * len(rows[2:])
    assert all(" nan | y of (4, 3), axis 1 |" in row for row in rows[2:])


class Cuda:
    """What ``torch.cuda`` does for a clock: a device that works faster or slower than the host."""

    def __init__(self, host, device):
        self.now = self.free = 0.0
        self.host, self.device = host, device

    def call(self):
        self.now += self.host
        self.free = max(self.free, self.now) + self.device

    def synchronize(self):
        self.now = self.free = max(self.now, self.free)

    def _sleep(self, cycles):
        self.free = max(self.free, self.now) + cycles / 1.4e9

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = max(cuda.free, cuda.now)

            def synchronize(self):
                cuda.synchronize()

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        return Event()


@pytest.mark.parametrize(("host", "device"), [(9e-5, 5e-6), (9e-5, 2e-3), (1e-6, 4e-4)])
def test_the_device_is_timed_and_not_the_host(host, device):
    """At 1 MiB a call takes the host longer than the card."""
    cuda = Cuda(host, device)
    clock = EventClock(cuda, lambda: cuda.now)
    assert seconds(cuda.call, clock) == pytest.approx(device, rel=0.01)


def test_the_verdict_is_of_large_arrays():
    small = Measured("NCHW", 1.0, 100.0, (10.0, 10.0), (99.0, 99.0))
    large = Measured("NCHW", 31.8, 1000.0, (900.0, 790.0), (880.0, 800.0))
    other = Measured("NHWC", 128.0, 1000.0, (810.0, 850.0), (800.0, 700.0))
    _, _, forward, backward = verdict([small, large, other], "torch")
    assert forward.startswith("- forward: at least 0.81 of the copy's bandwidth, reached")
    assert "at least 1.01 of torch's speed, reached" in forward
    assert backward.startswith("- backward: at least 0.79 of the copy's bandwidth, NOT reached")
    assert "at least 0.99 of torch's speed, NOT reached" in backward


# With PyTorch


@pytest.fixture
def program(monkeypatch, operator):
    torch = pytest.importorskip("torch")
    import gpu_check
    from gpu_kit import numbers

    monkeypatch.setattr(numbers.check_numbers, "__defaults__", (FEW,))
    monkeypatch.setattr(gpu_check, "load", lambda kit, capability, device: operator)

    def run(tmp_path):
        options = argparse.Namespace(
            kit=None, mebibytes=[0.8], types=["float32"], out=tmp_path / "table.md"
        )
        return gpu_check.check(options, torch.device("cpu"), (8, 0), "a stand-in", Once())

    return run


def test_the_program_ends_with_0(program, tmp_path):
    assert program(tmp_path) == 0
    assert "| float32, NHWC | 0.8 |" in (tmp_path / "table.md").read_text()


def test_the_program_ends_with_1_if_a_number_is_wrong(program, monkeypatch, tmp_path):
    from gpu_kit.on_torch import TorchArrays

    right = TorchArrays.reference

    def planted(self, *arguments):
        want = right(self, *arguments)
        want["dx"][(0,) * want["dx"].ndim] += 1e-4
        return want

    monkeypatch.setattr(TorchArrays, "reference", planted)
    assert program(tmp_path) == 1
    assert "results are wrong." in (tmp_path / "table.md").read_text()
