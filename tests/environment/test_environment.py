import builtins
import ctypes
import json
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

from scratchbn.environment import device, doctor, driver, help, prepare, probe
from scratchbn.environment.device import DeviceError, resolve_device
from scratchbn.environment.driver import GPU, Driver, query_driver

import mxnet as mx
import pytest

T4 = GPU(0, "Tesla T4", (7, 5))
H100 = GPU(1, "H100 PCIe", (9, 0))
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def run_python(code, *options, path=()):
    """Run code in a fresh interpreter that sees `path` before this one's import path."""
    entries = [*map(str, path), *sys.path]
    program = f"import sys; sys.path[:] = {entries!r}\n{code}"
    command = [sys.executable, *options, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def pretend_installed(monkeypatch, **versions):
    installed = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(prepare, "version", installed.get)


def compile_library(folder, name, source, *options):
    folder.mkdir(parents=True, exist_ok=True)
    code = folder / f"{name}.c"
    code.write_text(source)
    output = folder / name
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", str(code), "-o", str(output)]
    subprocess.run([*command, *map(str, options)], check=True)
    return output


# --- prepare: numpy aliases


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


# --- prepare: CUDA libraries


def install_cuda_files(root, *libraries):
    components = dict(prepare.CUDA_LIBRARIES)
    for library in libraries:
        folder = root / "nvidia" / components[library].replace("-", "_") / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / library).touch()


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


def no_such_library(name):
    return OSError(f"{name}: cannot open shared object file: No such file or directory")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("x", name="mxnet"), ["scratchbn[cpu]", "scratchbn[cu112]"]),
        (ModuleNotFoundError("x", name="distutils"), ["distutils", "Python 3.9, 3.10 or 3.11"]),
        (no_such_library("libcuda.so.1"), ["NVIDIA driver (libcuda.so.1)", "mxnet-cu112"]),
        (no_such_library("libcudnn.so.8"), ["libcudnn.so.8", "'nvidia-cudnn-cu11<9'"]),
        (no_such_library("libnvrtc.so.11.2"), ["'nvidia-cuda-nvrtc-cu11'", "scratchbn[cu112]"]),
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


# --- the driver


class FakeCuda:
    """libcuda.so.1 as ctypes shows it: functions that fill in references and return a status."""

    def __init__(self, gpus=(), failing=None, status=0):
        self.gpus = gpus
        self.failing = failing
        self.status = status

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.failing:
                return self.status
            return getattr(self, f"_{name}")(*arguments) or 0

        return call

    def _cuInit(self, flags):
        assert flags == 0

    def _cuDriverGetVersion(self, version):
        version._obj.value = 12020

    def _cuDeviceGetCount(self, count):
        count._obj.value = len(self.gpus)

    def _cuDeviceGet(self, device, index):
        device._obj.value = 40 + index

    def _cuDeviceGetName(self, name, length, device):
        name.value = self.gpus[device - 40].name.encode()[: length - 1]

    def _cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.gpus[device - 40].capability[{75: 0, 76: 1}[attribute]]

    def _cuGetErrorString(self, status, text):
        text._obj.value = {100: b"no CUDA-capable device is detected"}.get(status)
        return 0 if text._obj.value else 1


def plug_in(monkeypatch, cuda):
    def load(name, mode=ctypes.DEFAULT_MODE):
        assert name == "libcuda.so.1"
        return cuda

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_driver_lists_its_gpus(monkeypatch):
    plug_in(monkeypatch, FakeCuda([T4, H100]))
    assert query_driver() == Driver("12.2", (T4, H100), None)


def test_no_driver_library(monkeypatch):
    def load(name, mode=ctypes.DEFAULT_MODE):
        raise no_such_library(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    driver = query_driver()
    assert (driver.cuda_version, driver.gpus) == (None, ())
    assert driver.problem.startswith("no NVIDIA driver (libcuda.so.1: cannot open")


@pytest.mark.parametrize(
    ("function", "status", "meaning"),
    [
        ("cuInit", 100, "no CUDA-capable device is detected"),
        ("cuDeviceGetCount", 3, "unknown error"),
        ("cuDeviceGetName", 101, "unknown error"),
    ],
)
def test_a_failing_driver_says_what_failed(monkeypatch, function, status, meaning):
    plug_in(monkeypatch, FakeCuda([T4], function, status))
    driver = query_driver()
    assert (driver.cuda_version, driver.gpus) == ("12.2", ())
    assert f"{function} returned {status} ({meaning})" in driver.problem


def test_hidden_gpus_are_reported_with_the_variable_that_hides_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    plug_in(monkeypatch, FakeCuda([]))
    problem = query_driver().problem
    assert problem == "the NVIDIA driver lists no GPU (CUDA_VISIBLE_DEVICES is '5')"


DRIVER_SOURCE = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *version) { *version = 11080; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device ? "H100 PCIe" : "Tesla T4", length);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int table[2][2] = {{7, 5}, {9, 0}};
    *value = table[device][attribute - 75];
    return 0;
}
"""


@needs_compiler
def test_driver_calls_fit_the_c_interface(monkeypatch, tmp_path):
    library = compile_library(tmp_path, "libcuda.so.1", DRIVER_SOURCE)
    monkeypatch.setattr(driver, "DRIVER_LIBRARY", str(library))
    assert query_driver() == Driver("11.8", (T4, H100), None)


# --- resolve_device


def machine(monkeypatch, *, driver, cuda=True, kernels=None, wheel="mxnet_cu112"):
    """Pretend to be a machine; `kernels` maps a GPU index to how its first kernel fails."""
    pretend_installed(monkeypatch, **{wheel: "1.9.1"})
    monkeypatch.setattr(device, "_built_with_cuda", lambda: cuda)
    monkeypatch.setattr(device, "query_driver", lambda: driver)
    monkeypatch.setattr(doctor, "query_driver", lambda: driver)
    monkeypatch.setattr(device, "_kernel_failure", (kernels or {}).get)


@pytest.mark.parametrize(
    "spec", ["", "cuda", "GPU", "gpu:", "gpu:-1", "gpu:x", "auto:1", "cpu:0:1", " cpu", "gpu:1\n"]
)
def test_an_unknown_device_is_refused_by_name(spec):
    with pytest.raises(ValueError, match="'auto', 'cpu', 'cpu:N', 'gpu' or 'gpu:N'") as caught:
        resolve_device(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("spec", [None, 0, mx.cpu()])
def test_a_device_that_is_no_string_is_refused(spec):
    with pytest.raises(TypeError, match="device must be a string") as caught:
        resolve_device(spec)
    assert repr(spec) in str(caught.value)


def test_cpu_specs():
    assert resolve_device("cpu") == mx.cpu(0)
    assert resolve_device("cpu:1") == mx.cpu(1)


def test_gpu_specs_after_a_kernel_ran(monkeypatch):
    second = GPU(1, "RTX 4090", (8, 9))
    machine(monkeypatch, driver=Driver("12.2", (T4, second), None))
    assert resolve_device("gpu") == mx.gpu(0)
    assert resolve_device("gpu:1") == mx.gpu(1)


NO_DRIVER = Driver(None, (), "no NVIDIA driver (libcuda.so.1: cannot open)")


@pytest.mark.parametrize(
    ("spec", "pretended", "expected"),
    [
        (
            "gpu",
            {"driver": NO_DRIVER, "cuda": False, "wheel": "mxnet"},
            [
                "mxnet is built without CUDA (installed: mxnet 1.9.1)",
                "pip uninstall -y mxnet, then pip install 'scratchbn[cu112]'",
            ],
        ),
        ("gpu", {"driver": NO_DRIVER}, ["no NVIDIA driver (libcuda.so.1: cannot open)"]),
        (
            "gpu:1",
            {"driver": Driver("12.2", (T4,), None)},
            ["index 1 is out of range", "GPU 0 (Tesla T4, compute capability 7.5)"],
        ),
        (
            "gpu:1",
            {"driver": Driver("12.2", (T4, H100), None)},
            [
                "no code for GPU 1 (H100 PCIe, compute capability 9.0)",
                "5.0, 6.0, 7.0, 8.0, 8.6",
                "no PTX",
            ],
        ),
        (
            "gpu",
            {"driver": Driver("12.2", (T4,), None), "kernels": {0: "CUDA: out of memory"}},
            ["a first kernel on GPU 0 (Tesla T4, compute capability 7.5) failed", "out of memory"],
        ),
    ],
)
def test_an_unusable_gpu_is_an_error_that_says_why(monkeypatch, spec, pretended, expected):
    machine(monkeypatch, **pretended)
    with pytest.raises(DeviceError) as caught:
        resolve_device(spec)
    text = str(caught.value)
    assert text.startswith(f"device '{spec}' cannot be used: ")
    assert [part for part in expected if part not in text] == []


def test_a_build_of_unknown_contents_is_judged_by_its_first_kernel(monkeypatch):
    driver = Driver("12.2", (GPU(0, "H100 PCIe", (9, 0)),), None)
    machine(monkeypatch, driver=driver, wheel="mxnet")
    assert resolve_device("gpu") == mx.gpu(0)


def test_auto_takes_the_first_gpu_that_works(monkeypatch):
    cards = (GPU(0, "H100 PCIe", (9, 0)), GPU(1, "A100", (8, 0)), GPU(2, "A100", (8, 0)))
    machine(monkeypatch, driver=Driver("12.2", cards, None), kernels={1: "CUDA: busy"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device("auto") == mx.gpu(2)


def test_auto_falls_back_to_the_cpu_and_says_why_a_gpu_is_left_idle(monkeypatch):
    driver = Driver("12.2", (T4, H100), None)
    machine(monkeypatch, driver=driver, kernels={0: "CUDA: busy"})
    with pytest.warns(RuntimeWarning, match=r"is the CPU: .*CUDA: busy; .*no code for GPU 1"):
        assert resolve_device() == mx.cpu(0)


@pytest.mark.parametrize("cuda", [True, False])
def test_auto_is_quietly_the_cpu_where_there_is_no_gpu(monkeypatch, cuda):
    machine(monkeypatch, driver=NO_DRIVER, cuda=cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device("auto") == mx.cpu(0)


@pytest.mark.skipif(device._built_with_cuda(), reason="needs an mxnet without CUDA")
def test_first_kernel_fails_for_real_without_cuda(monkeypatch):
    assert "the CUDA runtime sees 0 GPUs" in device._kernel_failure(0)
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 1)
    assert "is not implemented for GPU" in device._kernel_failure(0)


def test_first_kernel_is_checked_by_value(monkeypatch):
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 1)
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    assert device._kernel_failure(0) is None
    monkeypatch.setattr(mx.nd, "ones", lambda shape, ctx: mx.nd.zeros(shape, ctx=ctx))
    assert device._kernel_failure(0) == "1 + 1 gave [1.0, 1.0]"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((3, 5), False),
        ((5, 0), True),
        ((5, 2), True),
        ((6, 1), True),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), False),
        ((12, 0), False),
    ],
)
def test_wheel_code_runs_within_a_major_version(capability, runs):
    assert device.wheel_runs(capability) is runs


# --- doctor facts


def write_mxnet(folder, source):
    (folder / "mxnet").mkdir()
    (folder / "mxnet/__init__.py").write_text(source)


def test_facts_describe_this_machine(monkeypatch):
    monkeypatch.setenv("MXNET_ENGINE_TYPE", "ThreadedEngine")
    monkeypatch.setenv("UNRELATED", "1")
    facts = doctor.doctor_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["mxnet"]["version"] == mx.__version__
    assert facts["mxnet"]["error"] is None
    assert facts["mxnet"]["features"]["MKLDNN"] is mx.runtime.Features().is_enabled("MKLDNN")
    assert facts["environment"]["MXNET_ENGINE_TYPE"] == "ThreadedEngine"
    assert "UNRELATED" not in facts["environment"]
    assert facts["device"]["auto"] == str(resolve_device("auto"))
    assert facts["packages"]["hypothesis"] == prepare.metadata.version("hypothesis")
    assert set(facts["data"]) >= {"mnist", "sample"}


def test_facts_survive_an_mxnet_that_kills_its_process(monkeypatch, tmp_path):
    write_mxnet(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    mxnet = doctor.doctor_facts()["mxnet"]
    assert "died of SIGILL: this CPU lacks instructions" in mxnet["error"]
    assert (mxnet["version"], mxnet["features"]) == (None, {})


def test_facts_explain_an_mxnet_that_cannot_be_imported(monkeypatch, tmp_path):
    write_mxnet(tmp_path, "raise OSError('libgomp.so.1: cannot open shared object file: none')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    facts = doctor.doctor_facts()
    assert facts["mxnet"]["error"].startswith("OSError: libgomp.so.1: cannot open")
    assert "apt-get install libgomp1" in facts["advice"][0]
    assert facts["device"] is None


def test_facts_report_an_mxnet_that_hangs(monkeypatch, tmp_path):
    write_mxnet(tmp_path, "import time\ntime.sleep(60)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(probe, "_SECONDS", 1)
    assert doctor.doctor_facts()["mxnet"]["error"] == "import mxnet did not finish within 1 s"


def pretend_probe(monkeypatch, **changes):
    facts = {
        "version": "1.9.1",
        "path": "/somewhere/mxnet",
        "features": {"CUDA": True},
        "device": {"auto": "cpu(0)", "because": "the card is busy"},
        "backend": {"chosen": "auto", "problem": None, "inference_graph": "on"},
        "error": None,
        "help": None,
    }
    monkeypatch.setattr(doctor, "probe_mxnet", lambda: facts | changes)


@pytest.mark.parametrize("switched, said", [("on", "graph of its own"), ("off", "switched off")])
@pytest.mark.parametrize("problem", [None, "not built"])
def test_facts_tell_what_auto_means(monkeypatch, switched, said, problem):
    machine(monkeypatch, driver=Driver(None, (), "no driver"))
    backend = {"chosen": "auto", "problem": problem, "inference_graph": switched}
    pretend_probe(monkeypatch, backend=backend)
    kernel = {"library": None, "compiler": None, "problem": None}
    monkeypatch.setattr(doctor.native, "facts", lambda: kernel)
    means = doctor.doctor_facts()["backend"]["auto_means"]
    assert said in means["inference"]
    assert ["kernel" in means[where] for where in ("training", "eager")] == [problem is None] * 2


def test_facts_tell_which_gpus_the_wheel_can_run(monkeypatch):
    machine(monkeypatch, driver=Driver("12.2", (T4, H100), None))
    pretend_probe(monkeypatch)
    facts = doctor.doctor_facts()
    verdicts = [(gpu["name"], gpu["wheel_runs"]) for gpu in facts["cuda"]["gpus"]]
    assert verdicts == [("Tesla T4", True), ("H100 PCIe", False)]
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cuda"]["driver_supports"] == "12.2"
    assert facts["advice"] == ["2 GPU(s) present and none used: the card is busy"]


def test_facts_advise_the_cuda_wheel_where_there_is_a_gpu(monkeypatch):
    machine(monkeypatch, driver=Driver("12.2", (T4,), None), wheel="mxnet")
    pretend_probe(monkeypatch, features={"CUDA": False})
    (advice,) = doctor.doctor_facts()["advice"]
    assert "mxnet is built without CUDA (installed: mxnet 1.9.1)" in advice
    assert "pip install 'scratchbn[cu112]'" in advice


@pytest.mark.parametrize(
    ("supports", "fusion", "advised"),
    [
        ("11.7", None, True),
        ("11.0", "1", True),
        ("11.7", "0", False),
        ("11.8", None, False),
        ("12.2", None, False),
        ("13.0", None, False),
    ],
)
def test_facts_advise_a_driver_that_knows_fused_kernels(monkeypatch, supports, fusion, advised):
    machine(monkeypatch, driver=Driver(supports, (T4,), None))
    pretend_probe(monkeypatch, device={"auto": "gpu(0)", "because": "it ran a kernel"})
    monkeypatch.delenv("MXNET_USE_FUSION", raising=False)
    if fusion is not None:
        monkeypatch.setenv("MXNET_USE_FUSION", fusion)
    advice = doctor.doctor_facts()["advice"]
    if not advised:
        assert advice == []
        return
    (line,) = advice
    assert f"the driver supports CUDA {supports}" in line
    assert "install driver 520.61.05 or newer, or set MXNET_USE_FUSION=0" in line


@pytest.mark.parametrize("driver", [NO_DRIVER, Driver("11.2", (), "lists no GPU")])
def test_without_a_card_no_driver_is_advised(monkeypatch, driver):
    machine(monkeypatch, driver=driver)
    pretend_probe(monkeypatch)
    assert doctor.doctor_facts()["advice"] == []


def test_the_help_names_a_driver_that_knows_fused_kernels(monkeypatch):
    pretend_installed(monkeypatch, mxnet_cu112="1.9.1")
    assert "520.61.05 or newer" in help.import_error_help(no_such_library("libcuda.so.1"))


def test_facts_report_two_distributions_in_one_place(monkeypatch):
    pretend_installed(monkeypatch, mxnet="1.9.1", mxnet_cu112="1.9.1")
    monkeypatch.setattr(doctor, "query_driver", lambda: NO_DRIVER)
    pretend_probe(monkeypatch)
    facts = doctor.doctor_facts()
    assert facts["mxnet"]["distributions"] == {"mxnet": "1.9.1", "mxnet-cu112": "1.9.1"}
    (advice,) = facts["advice"]
    assert "mxnet and mxnet-cu112 are both installed" in advice


def test_facts_give_cuda_libraries_with_their_versions(monkeypatch, tmp_path):
    install_cuda_files(tmp_path, "libcudnn.so.8")
    metadata = tmp_path / "nvidia_cudnn_cu11-8.9.6.50.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: nvidia-cudnn-cu11\nVersion: 8.9.6.50\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    pretend_probe(monkeypatch)
    library = doctor.doctor_facts()["cuda"]["libraries"]["libcudnn.so.8"]
    assert library["version"] == "8.9.6.50"
    assert Path(library["path"]) == tmp_path / "nvidia/cudnn/lib/libcudnn.so.8"


def test_facts_survive_data_that_cannot_be_listed(monkeypatch):
    monkeypatch.setattr(doctor, "datasets", types.ModuleType("scratchbn.datasets"))
    pretend_probe(monkeypatch)
    assert "has no attribute 'available'" in doctor.doctor_facts()["data"]["error"]
