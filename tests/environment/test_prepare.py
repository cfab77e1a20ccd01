"""What mxnet needs before it is imported, and what is said where its import fails."""

import builtins
import ctypes
import subprocess
import sys
import types
from pathlib import Path

from scratchbn.environment import help, prepare
from scratchbn.environment.install import install_command

import pytest
from pretended_machine import (
    compile_library,
    install_cuda_files,
    needs_compiler,
    no_such_library,
    pretend_installed,
)


def run_python(code, *options, path=()):
    """Run code in a fresh interpreter that sees `path` before this one's import path."""
    entries = [*map(str, path), *sys.path]
    program = f"import sys; sys.path[:] = {entries!r}\n{code}"
    command = [sys.executable, *options, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


# --- numpy aliases


class FakeNumpy(types.ModuleType):
    """Fails on removed names as numpy does, so that even a look-up is noticed."""

    def __init__(self, version):
        super().__init__("numpy")
        self.__version__ = version

    def __getattr__(self, name):
        raise AssertionError(f"numpy.{name} was looked up")


@pytest.mark.parametrize("version", ["1.24.0", "1.26.4", "1.25.0rc1"])
def test_prepare_supplies_the_aliases_numpy_removed(monkeypatch, version):
    fake = FakeNumpy(version)
    monkeypatch.setattr(prepare, "np", fake)
    prepare.prepare()
    assert vars(fake)["bool"] is builtins.bool
    assert vars(fake)["int"] is builtins.int


@pytest.mark.parametrize("version", ["1.20.0", "1.23.5"])
def test_prepare_leaves_numpy_alone_where_it_has_the_aliases(monkeypatch, version):
    fake = FakeNumpy(version)
    before = dict(vars(fake))
    monkeypatch.setattr(prepare, "np", fake)
    prepare.prepare()
    assert vars(fake) == before


def test_prepare_keeps_an_alias_someone_else_supplied(monkeypatch):
    fake = FakeNumpy("1.26.4")
    fake.bool = marker = object()
    monkeypatch.setattr(prepare, "np", fake)
    prepare.prepare()
    assert fake.bool is marker


def test_prepare_says_which_numpy_to_install_instead_of_numpy_2(monkeypatch):
    monkeypatch.setattr(prepare, "np", FakeNumpy("2.1.3"))
    with pytest.raises(ImportError, match=r"numpy 2\.1\.3.*pip install 'numpy>=1\.21,<2'"):
        prepare.prepare()


def test_prepare_is_silent_repeatable_and_does_not_import_mxnet():
    code = """
from scratchbn.environment.prepare import prepare
prepare()
prepare()
print('mxnet' in sys.modules)
"""
    child = run_python(code, "-W", "error")
    assert (child.returncode, child.stdout, child.stderr) == (0, "False\n", "")


def test_mxnet_computes_after_prepare():
    code = """
from scratchbn.environment.prepare import prepare
prepare()
import mxnet as mx
print((mx.nd.array([1, 2, 3]) * 2 + 1).asnumpy().tolist(), mx.np.ones(2, dtype=bool).sum())
"""
    child = run_python(code)
    assert child.stdout == "[3.0, 5.0, 7.0] 2\n", child.stderr


# --- CUDA libraries


def record_loads(monkeypatch, failing=()):
    loads = []

    def load(name, mode=ctypes.DEFAULT_MODE):
        loads.append((Path(name).name, mode))
        if Path(name).name in failing:
            raise OSError(f"{name}: file too short")

    monkeypatch.setattr(ctypes, "CDLL", load)
    return loads


def test_cuda_libraries_are_found_in_loading_order_and_first_on_the_path(monkeypatch, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    install_cuda_files(first, "libcudnn.so.8", "libcublas.so.11")
    install_cuda_files(second, "libcudnn.so.8", "libcudart.so.11.0")
    (second / "nvidia/cublas/lib").mkdir(parents=True)
    (second / "nvidia/cublas/lib/libcublas.so.12").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "absent"), str(first), str(second)])
    found = prepare.find_cuda_libraries()
    assert list(found.items()) == [
        ("libcudart.so.11.0", second / "nvidia/cuda_runtime/lib/libcudart.so.11.0"),
        ("libcublas.so.11", first / "nvidia/cublas/lib/libcublas.so.11"),
        ("libcudnn.so.8", first / "nvidia/cudnn/lib/libcudnn.so.8"),
    ]


def test_prepare_loads_the_cuda_libraries_for_a_cuda_wheel(monkeypatch, tmp_path):
    install_cuda_files(tmp_path, "libcudnn.so.8", "libcublas.so.11", "libcublasLt.so.11")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mxnet")
    pretend_installed(monkeypatch, mxnet_cu112="1.9.1")
    loads = record_loads(monkeypatch, failing=["libcublas.so.11"])
    prepare.prepare()
    assert loads == [
        (name, ctypes.RTLD_GLOBAL)
        for name in ("libcublasLt.so.11", "libcublas.so.11", "libcudnn.so.8")
    ]


def test_prepare_loads_nothing_for_a_cpu_wheel_or_after_the_import(monkeypatch, tmp_path):
    install_cuda_files(tmp_path, "libcudnn.so.8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    loads = record_loads(monkeypatch)
    pretend_installed(monkeypatch, mxnet_cu112="1.9.1")
    prepare.prepare()
    monkeypatch.delitem(sys.modules, "mxnet")
    pretend_installed(monkeypatch, mxnet="1.9.1")
    prepare.prepare()
    assert loads == []


@needs_compiler
def test_a_library_that_needs_cuda_loads_after_prepare_only(tmp_path):
    lib = tmp_path / "nvidia/cublas/lib"
    light = compile_library(lib, "libcublasLt.so.11", "int light(void) { return 7; }")
    blas = compile_library(
        lib, "libcublas.so.11", "int light(void); int blas(void) { return light(); }", light
    )
    compile_library(
        tmp_path / "mxnet",
        "libmxnet.so",
        "int blas(void); int answer(void) { return blas(); }",
        blas,
        f"-Wl,-rpath-link,{lib}",
    )
    (tmp_path / "mxnet/__init__.py").write_text(
        "import ctypes, pathlib\n"
        "path = pathlib.Path(__file__).parent / 'libmxnet.so'\n"
        "answer = ctypes.CDLL(str(path), ctypes.RTLD_LOCAL).answer()\n"
    )
    metadata = tmp_path / "mxnet_cu112-1.9.1.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: mxnet-cu112\nVersion: 1.9.1\n")

    without = run_python("import mxnet", path=[tmp_path])
    assert "libcublas.so.11: cannot open shared object file" in without.stderr
    code = "import scratchbn, mxnet; print(mxnet.answer)"
    prepared = run_python(code, path=[tmp_path])
    assert prepared.stdout == "7\n", prepared.stderr


# --- import_error_help


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ModuleNotFoundError("x", name="mxnet"),
            [install_command("cpu"), install_command("cu112")],
        ),
        (ModuleNotFoundError("x", name="distutils"), ["distutils", "Python 3.9, 3.10 or 3.11"]),
        (no_such_library("libcuda.so.1"), ["NVIDIA driver (libcuda.so.1)", "mxnet-cu112"]),
        (
            no_such_library("libcudnn.so.8"),
            ["libcudnn.so.8", "-m pip install 'nvidia-cudnn-cu11<9'"],
        ),
        (
            no_such_library("libnvrtc.so.11.2"),
            ["nvidia-cuda-nvrtc-cu11,", install_command("cu112")],
        ),
        (no_such_library("libgomp.so.1"), ["libgomp.so.1", "apt-get install libgomp1"]),
        (no_such_library("libquadmath.so.0"), ["apt-get install libquadmath0"]),
    ],
)
def test_a_known_import_failure_is_explained(monkeypatch, error, expected):
    monkeypatch.setattr(help, "find_cuda_libraries", dict)
    text = help.import_error_help(error)
    assert [part for part in expected if part not in text] == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("unrelated"),
        ModuleNotFoundError("x", name="requests"),
        no_such_library("libother.so.3"),
        RuntimeError("libcuda.so.1: cannot open shared object file"),
    ],
)
def test_an_unknown_import_failure_is_not_explained_away(monkeypatch, error):
    pretend_installed(monkeypatch, mxnet="1.9.1")
    assert help.import_error_help(error) is None


def test_import_help_names_a_cuda_library_that_is_installed_and_broken(monkeypatch, tmp_path):
    install_cuda_files(tmp_path, "libcufft.so.10")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    text = help.import_error_help(no_such_library("libcufft.so.10"))
    assert "it is installed and cannot be loaded" in text
    assert "libcufft.so.10: file too short" in text


def test_import_help_says_to_import_scratchbn_first(monkeypatch, tmp_path):
    install_cuda_files(tmp_path, "libcufft.so.10")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    record_loads(monkeypatch)
    text = help.import_error_help(no_such_library("libcufft.so.10"))
    assert "import scratchbn before mxnet" in text


def test_import_help_blames_two_distributions_in_one_place(monkeypatch):
    pretend_installed(monkeypatch, mxnet="1.9.1", mxnet_cu112="1.9.1")
    text = help.import_error_help(AttributeError("module 'mxnet' has no attribute 'nd'"))
    assert "mxnet and mxnet-cu112 are both installed" in text
    assert "pip uninstall -y mxnet mxnet-cu112" in text


def test_the_help_names_a_driver_that_knows_fused_kernels(monkeypatch):
    pretend_installed(monkeypatch, mxnet_cu112="1.9.1")
    assert "520.61.05 or newer" in help.import_error_help(no_such_library("libcuda.so.1"))
