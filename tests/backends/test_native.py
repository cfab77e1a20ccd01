"""The compiled kernel: what it computes, and how it is built and found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import scratchbn
from scratchbn import BackendError, ScratchBatchNorm, native
from scratchbn.native import _build

# isort: split
import kernel_cases
import mxnet as mx
import numpy as np
import pytest
from helpers import load_kernel
from mxnet import autograd

compiles = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kernel():
    load_kernel(mx.cpu())


# What it computes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), kernel_cases.SHAPES)
def test_every_walk_gives_the_formulas(kernel, shape, axis, dtype, relu, training):
    error = kernel_cases.largest_error(shape, axis, dtype, relu, training, hybrid=relu)
    assert error < kernel_cases.CLOSE[dtype]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"), [*kernel_cases.SHAPES, *kernel_cases.ONE_VALUE_PER_CHANNEL]
)
def test_equal_elements_and_equal_gradients_give_zeros(kernel, shape, axis, dtype, relu):
    dx, dgamma = kernel_cases.exact_zeros(shape, axis, dtype, relu, hybrid=relu)
    assert dx.shape == shape
    assert not dx.any()
    assert not dgamma.any()


@pytest.mark.parametrize("axis", [1, -1])
def test_an_empty_batch_gives_gradients_of_zero(kernel, axis):
    layer = ScratchBatchNorm(axis=axis, in_channels=3)
    layer.initialize()
    mean = layer.running_mean.data().asnumpy()
    with mx.util.np_shape(True):
        x = mx.nd.zeros((0, 3, 3))
        x.attach_grad()
        with scratchbn.use_backend("native"), autograd.record():
            y = layer(x)
        y.backward()
        assert x.grad.shape == (0, 3, 3)
    assert not layer.gamma.grad().asnumpy().any()
    assert not layer.beta.grad().asnumpy().any()
    assert (layer.running_mean.data().asnumpy() == mean).all()


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 40, 40), 1), ((5000, 7), 1)])
def test_a_large_mean_costs_nothing(kernel, shape, axis):
    x = np.random.default_rng(0).normal(1e5, 1, shape).astype(np.float32)
    layer = ScratchBatchNorm(axis=axis, in_channels=shape[axis])
    layer.initialize()
    with scratchbn.use_backend("native"), autograd.train_mode():
        y = layer(mx.nd.array(x)).asnumpy()
    wide = x.astype(np.float64)
    over = tuple(i for i in range(x.ndim) if i != axis)
    mean, var = wide.mean(axis=over, keepdims=True), wide.var(axis=over, keepdims=True)
    assert np.abs(y - (wide - mean) / np.sqrt(var + 1e-5)).max() < 5e-6


@pytest.mark.parametrize("shape", [(3_000_000, 2), (3, 2, 1_000_000)])
def test_millions_of_elements_per_channel(kernel, shape):
    x = np.random.default_rng(1).uniform(0, 1, shape).astype(np.float32)
    x[0, 0] = 1e4  # an outlier where the kernel looks first
    layer = ScratchBatchNorm(in_channels=2, momentum=0.0)
    layer.initialize()
    with scratchbn.use_backend("native"), autograd.train_mode():
        layer(mx.nd.array(x)).wait_to_read()
    wide = x.astype(np.float64).reshape(shape[0], 2, -1)
    np.testing.assert_allclose(
        layer.running_mean.data().asnumpy(), wide.mean(axis=(0, 2)), rtol=1e-6
    )
    np.testing.assert_allclose(layer.running_var.data().asnumpy(), wide.var(axis=(0, 2)), rtol=1e-5)


def test_data_of_unknown_shape_is_an_error_and_no_crash(kernel):
    with scratchbn.use_backend("native"):
        symbol = ScratchBatchNorm(in_channels=3)(mx.sym.var("data"))
    with pytest.raises(mx.MXNetError, match="Error in operator"):
        symbol.infer_shape_partial()
    _, (shape,), auxiliary = symbol.infer_shape(data=(2, 3, 4))
    assert (shape, auxiliary) == ((2, 3, 4), [(3,), (3,)])


# Building


@compiles
def test_the_build_for_any_processor_gives_the_formulas_on_three_threads(kernel_cache):
    program = (
        "import scratchbn, runpy, sys\n"
        "from scratchbn.native import _build\n"
        "_build._processor_features = set\n"
        "assert not set(_build._X86_64_V3) & set(_build._flags())\n"
        "sys.exit(runpy.run_module('kernel_cases', run_name='__main__'))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "3"}
    child = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) < 1


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_compilers_have_nothing_to_warn_of(compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    flags = [flag for flag in _build._flags() if flag != "-shared"]
    include = ["-isystem", str(_build._interface()[0].parents[1])]
    source = Path(_build.__file__).with_name("operator.cc")
    asked = ["-fsyntax-only", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    done = subprocess.run(
        [compiler, *flags, *asked, *include, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_library_is_built_once_for_each_source_and_processor(kernel_cache, monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"  # which is done at once
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    first = native.build()
    assert first.parent == kernel_cache
    assert [p.name for p in kernel_cache.iterdir()] == [first.name]  # nothing half-written is left
    written = first.stat().st_mtime_ns
    assert native.build() == first
    assert first.stat().st_mtime_ns == written
    assert native.build(force=True) == first
    assert first.stat().st_mtime_ns > written
    with monkeypatch.context() as another:
        another.setattr(_build, "_FLAGS", (*_build._FLAGS, "-DANOTHER"))
        assert native.library_path() != first
    monkeypatch.setenv("PATH", "")  # what was built serves where nothing can be built
    monkeypatch.delenv("CXX", raising=False)
    assert native.compiler() is None
    assert native.build() == first


def test_without_a_compiler_the_error_says_what_to_install(kernel_cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendError, match=r"no C\+\+ compiler found.*apt-get install g\+\+"):
        native.build()
    assert native.facts()["problem"].startswith("no C++ compiler found")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="CXX='no-such-compiler' is not a program"):
        native.build()
    assert not kernel_cache.exists()


@compiles
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(kernel_cache, monkeypatch):
    monkeypatch.setattr(_build, "_FLAGS", (*_build._FLAGS, "--no-such-flag"))
    with pytest.raises(BackendError, match=r"(?s)could not build the kernel.*no-such-flag"):
        native.build()
    assert list(kernel_cache.iterdir()) == []


def test_an_unwritable_cache_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCRATCHBN_CACHE", str(tmp_path / "file"))
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    with pytest.raises(BackendError, match="could not be written to"):
        native.build()


def test_an_mxnet_without_the_interface_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="lacks its extension interface"):
        native.library_path()
    assert "lacks its extension interface" in native.facts()["problem"]


def test_a_library_that_does_not_load_is_an_error(tmp_path):
    torn = tmp_path / "torn.so"
    torn.write_bytes(b"not a library")
    program = (
        "import scratchbn, pathlib\n"
        "from scratchbn import native, ScratchBatchNorm\n"
        "import mxnet as mx\n"
        f"native.library_path = lambda: pathlib.Path({str(torn)!r})\n"
        "layer = ScratchBatchNorm(in_channels=3)\n"
        "layer.initialize()\n"
        "layer.hybridize()\n"
        "print(layer(mx.nd.ones((2, 3))).shape, native.facts()['problem'])\n"
        "try:\n"
        "    scratchbn.set_backend('native')\n"
        "except scratchbn.BackendError as error:\n"
        "    print(error, scratchbn.get_backend())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "SCRATCHBN_BACKEND"}
    environment["PYTHONPATH"] = str(ROOT)
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("(2, 3) MXNet could not load")
    assert child.stdout.strip().endswith("auto")
