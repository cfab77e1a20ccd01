"""Fixtures every test shares: the device, the seeds, and layers built in any mode."""

from __future__ import annotations

import os
import random
import signal
import zlib

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
# ScratchSyncBatchNorm asks for 4096: gigabytes, in a process that runs all tests.
os.environ.setdefault("MXNET_CPU_TEMP_COPY", "4")

import scratchbn  # prepares the runtime, so it comes before mxnet
import scratchbn.backends
from scratchbn import native, use_backend
from scratchbn.backends.inference import switch

# isort: split
import helpers
import hypothesis
import mxnet as mx
import numpy as np
import pytest
from pythons import OUTER

# Where `make` runs the tests, a `make` in a test is no part of it.
for name in (*OUTER, "PYTHON", "VENV"):
    os.environ.pop(name, None)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="device the tests run on: cpu, cpu:1, gpu, gpu:1 (default: cpu)",
    )
    parser.addoption(
        "--backend",
        default="all",
        choices=("all", *scratchbn.backends.BACKENDS),
        help="backend of the layers; all: each in turn where the contract is tested, else auto",
    )


def pytest_generate_tests(metafunc):
    contract = metafunc.module.__name__.startswith(("test_contract", "test_conformance"))
    if contract and metafunc.config.getoption("--backend") == "all":
        metafunc.parametrize("backend", ["portable", "native"], indirect=True)


def _parse_device(spec):
    kind, _, index = spec.partition(":")
    if kind not in ("cpu", "gpu") or not (index.isdigit() or index == ""):
        raise pytest.UsageError(f"--device {spec!r}: expected cpu, gpu, cpu:N or gpu:N")
    return mx.Context(kind, int(index or 0))


@pytest.fixture(scope="session")
def device(request):
    """The device under test, from `--device`."""
    context = _parse_device(request.config.getoption("--device"))
    if context.device_type == "gpu" and context.device_id >= mx.context.num_gpus():
        pytest.exit(f"--device {context}: only {mx.context.num_gpus()} GPUs found", returncode=4)
    return context


@pytest.fixture(scope="session")
def second_device(device):
    """Another device of the same kind, for nets on several devices."""
    other = mx.Context(device.device_type, 0 if device.device_id else 1)
    if other.device_type == "gpu" and other.device_id >= mx.context.num_gpus():
        pytest.skip("needs two GPUs")
    return other


@pytest.fixture(autouse=True)
def _reproducible(request):
    """Seed every generator from the test's name; leave NumPy semantics as they were found."""
    seed = zlib.crc32(request.node.nodeid.encode()) % 2**31
    mx.random.seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    shape, array = mx.util.is_np_shape(), mx.util.is_np_array()
    yield
    mx.nd.waitall()
    mx.npx.set_np(shape=shape, array=array) if shape else mx.npx.reset_np()


@pytest.fixture(autouse=True)
def backend(request, device):
    """The backend under test, from `--backend`."""
    chosen = request.config.getoption("--backend")
    name = getattr(request, "param", "auto" if chosen == "all" else chosen)
    if name == "native":
        helpers.load_kernel(device)
    before = scratchbn.get_backend()
    try:
        scratchbn.set_backend(name)
    except scratchbn.BackendError as error:
        pytest.skip(str(error))
    yield name
    scratchbn.set_backend(before)


@pytest.fixture
def rng(request):
    """A NumPy generator whose stream depends on the test's name alone."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def build(device, rng, tmp_path):
    """Build a layer in a mode, beside its oracle: see `helpers.build_subject`."""
    count = iter(range(1_000_000))

    def build_one(mode, shape, **options):
        directory = tmp_path / f"subject{next(count)}"
        directory.mkdir()
        return helpers.build_subject(
            mode, shape, rng=rng, device=device, directory=directory, **options
        )

    return build_one


@pytest.fixture
def two_graphs(device, monkeypatch):
    """The backend 'auto', where nets have a second graph for inference."""
    if device.device_type != "cpu":
        pytest.skip("the second graph is for CPUs")
    monkeypatch.setattr(switch.CHOSEN, "_everywhere", None)
    monkeypatch.delenv("SCRATCHBN_INFERENCE_GRAPH", raising=False)
    with use_backend("auto"):
        yield


@pytest.fixture(params=["kernel", "no kernel"])
def with_kernel(request, monkeypatch):
    """With the compiled operator in the block's own graph, and without."""
    if request.param == "no kernel":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("the kernel has not been built")
    return request.param


@pytest.fixture
def kernel_cache(tmp_path, monkeypatch):
    """An empty folder of compiled kernels, which is not there yet."""
    monkeypatch.setenv("SCRATCHBN_CACHE", str(tmp_path))
    return tmp_path / "native"
