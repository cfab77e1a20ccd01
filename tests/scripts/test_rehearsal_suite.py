"""The rehearsal sorts failures, builds its stand-ins and ends with a verdict."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import rehearse_gpu
from helpers import REPOSITORY
from rehearsal import checks, house, standins, suite
from rehearsal.classify import BROKEN, NUMBERS, classify
from rehearsal.journal import parse
from rehearsal_cases import Recorded


def raised(function):
    try:
        function()
    except BaseException as error:
        return error
    raise ValueError("nothing was raised")


def compare(a, b):
    return raised(lambda: np.testing.assert_allclose(a, b))


class Several(Exception):
    def __init__(self, *exceptions):
        super().__init__("several")
        self.exceptions = exceptions


@pytest.mark.parametrize(
    ("error", "statement", "verdict"),
    [
        (compare([1.0], [2.0]), "", NUMBERS),
        (compare([[1.0]], [2.0, 3.0]), "", BROKEN),
        (AssertionError("assert 0.0 == 1.0"), "assert y.max() == 1", NUMBERS),
        (AssertionError("assert (3,) == (4,)"), "assert y.shape == (4,)", BROKEN),
        (AssertionError(""), "assert layer.gamma.dtype == np.float32", BROKEN),
        (AssertionError(""), "assert type(layer) is ScratchBatchNorm", BROKEN),
        (AssertionError("exit -8\n\nFatal Python error"), "assert p.returncode == 0", BROKEN),
        (AssertionError("exit 1\n\nmxnet.base.MXNetError: no kernel"), "", BROKEN),
        (AssertionError("exit 1\nx\nTraceback\nAssertionError: 0 != 1"), "", NUMBERS),
        (AssertionError("exit 1\nValueError: of\n  f()\nAssertionError: 0"), "", NUMBERS),
        (RuntimeError("not implemented for GPU"), "", BROKEN),
        (ValueError("axis"), "assert y.max() == 1", BROKEN),
        (Several(compare([1.0], [2.0]), AssertionError("0 != 1")), "", NUMBERS),
        (Several(compare([1.0], [2.0]), RuntimeError("no kernel")), "", BROKEN),
    ],
)
def test_only_wrong_values_are_expected(error, statement, verdict):
    assert classify(error, statement) == verdict


TESTS = """
import os, signal
import pytest

def test_right(): pass
def test_number(): assert 1.0 == 2.0, "0.0"
def test_dies(): os.kill(os.getpid(), signal.SIGFPE)
def test_after(): pass
@pytest.mark.skip
def test_skipped(): pass
def test_raises(): raise RuntimeError("no such operator")
@pytest.fixture
def torn():
    yield
    raise RuntimeError("the engine reports an error")
def test_number_then_torn(torn): assert 1.0 == 2.0, "0.0"
@pytest.mark.values
def test_waits_for_a_value():
    with pytest.raises(ValueError): pass
@pytest.mark.values
def test_raises_another():
    with pytest.raises(ValueError): raise RuntimeError("no kernel")
def test_dies_too(): os.abort()
"""


CONFTEST = """
def pytest_configure(config):
    config.addinivalue_line("markers", "values: x")

def pytest_addoption(parser):
    parser.addoption("--device"), parser.addoption("--backend")
"""


def test_a_file_runs_to_its_end_though_its_process_dies(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    monkeypatch.setattr(suite, "PYTHON", sys.executable)
    monkeypatch.setattr(suite, "REPOSITORY", tmp_path)
    paths = f"{REPOSITORY}:{REPOSITORY / 'scripts'}"
    outcome = suite.run_file("test_it.py", "portable", {"PYTHONPATH": paths})
    assert outcome.counts == {"passed": 2, "numbers": 2, "died": 2, "skipped": 1, "broken": 3}
    assert len(outcome.broken) == 5
    died, raises, torn, another, too = outcome.broken
    assert died.startswith("test_it.py::test_dies: the process died (-8)")
    assert raises == "test_it.py::test_raises: RuntimeError no such operator"
    assert torn == "test_it.py::test_number_then_torn: RuntimeError the engine reports an error"
    assert another == "test_it.py::test_raises_another: RuntimeError no kernel"
    assert too.startswith("test_it.py::test_dies_too: the process died (-6)")


def test_a_file_that_cannot_be_collected_is_broken(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    monkeypatch.setattr(suite, "PYTHON", sys.executable)
    monkeypatch.setattr(suite, "REPOSITORY", tmp_path)
    paths = f"{REPOSITORY}:{REPOSITORY / 'scripts'}"
    outcome = suite.run_file("test_it.py", "portable", {"PYTHONPATH": paths})
    (broken,) = outcome.broken
    assert broken.startswith("test_it.py: pytest ended with status 2")


PTX = """
.version 7.8
.target sm_80
.visible .entry plain(.param .u64 a, .param .f32 b, .param .u64 c)
{ ret; }
.visible .entry _Z5typedPKfPfi(.param .u64 a, .param .u64 b, .param .u32 c)
{ ret; }
"""


DRIVE = """
import ctypes, sys
cuda = ctypes.CDLL(sys.argv[1])
module, function = ctypes.c_void_p(), ctypes.c_void_p()
assert cuda.cuModuleLoadData(ctypes.byref(module), sys.argv[2].encode()) == 0
a, b = ctypes.c_void_p(0x10), ctypes.c_void_p(0x20)
for name, values in (
    (b"plain", (a, ctypes.c_float(1), b)), (b"_Z5typedPKfPfi", (a, b, ctypes.c_int(3)))
):
    assert cuda.cuModuleGetFunction(ctypes.byref(function), module, name) == 0
    pointers = (ctypes.c_void_p * 3)(*map(ctypes.addressof, values))
    for blocks in (2, 0):
        print(cuda.cuLaunchKernel(function, blocks, 1, 1, 32, 1, 1, 0, None, pointers, None))
print(cuda.cuModuleGetFunction(ctypes.byref(function), module, b"other"), cuda.cuGraphNodeGetType())
"""


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
def test_the_stand_in_of_the_driver_notes_down_launches(tmp_path, monkeypatch):
    caller = tmp_path / "caller.c"
    caller.write_text("int cuGraphNodeGetType(); int f() { return cuGraphNodeGetType(); }\n")
    library = tmp_path / "libcaller.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c", caller, "-o", library], check=True)
    assert "cuGraphNodeGetType" in standins.imported_symbols(library)
    driver = "libcuda.so.1"
    monkeypatch.setattr(standins, "LIBRARIES", {driver: standins.LIBRARIES[driver]})
    folder = standins.build("g++", library, tmp_path / "standins")
    built = (folder / driver).stat().st_mtime_ns
    assert standins.build("g++", library, folder) == folder
    assert (folder / driver).stat().st_mtime_ns == built

    kept = tmp_path / "kept"
    kept.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", DRIVE, folder / driver, PTX],
        env={
            "SCRATCHBN_REHEARSAL_JOURNAL": str(tmp_path / "journal"),
            "SCRATCHBN_REHEARSAL_MODULES": str(kept),
        },
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.split() == ["0", "1", "0", "1", "500", "801"]
    (module,) = kept.iterdir()
    assert module.suffix == ".ptx" and module.read_text() == PTX
    entries = parse((tmp_path / "journal").read_text())
    kinds = ["MODULE", "LAUNCH", "REFUSED", "LAUNCH", "REFUSED", "MISSING"]
    assert [e.kind for e in entries] == kinds
    loaded, plain, _, typed, _, missing = entries
    assert loaded.details == ".target sm_80"
    assert plain.touched == ((0x10, False), (0x20, False))
    assert typed.touched == ((0x10, True), (0x20, False))
    assert typed.signature == "typed(float const*, float*, int)"
    assert missing.name == "cuGraphNodeGetType"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cusolverDnSgetrf_bufferSize", "NOT_SUPPORTED"),
        ("cudaGraphLaunch", "NOT_SUPPORTED"),
        ("cudnnGetRNNWorkspaceSize", "NOT_SUPPORTED"),
        ("cudnnCreateTensorDescriptor", "handle()"),
        ("cudnnSetTensor4dDescriptor", "{ return 0; }"),
        ("cudnnPoolingForward", 'note_call("cudnnPoolingForward")'),
    ],
)
def test_functions_without_a_stand_in_of_their_own(name, said):
    assert said in standins.default_function(name)


def test_requirements_are_the_locked_ones_with_the_cuda_wheel():
    lock = (REPOSITORY / "requirements.lock").read_text("utf-8")
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    lines = house.requirements(lock, project).splitlines()
    names = [line.partition("==")[0] for line in lines]
    assert {"numpy", "pytest", "hypothesis", "gluoncv", "mxnet-cu112"} <= set(names)
    assert "mxnet" not in names
    assert [n for n in names if n.startswith("nvidia-")] == ["nvidia-cuda-nvrtc-cu11"]
    assert all("==" in line for line in lines)
    with pytest.raises(ValueError, match="must pin mxnet-cu112 and nvidia-cuda-nvrtc-cu11"):
        house.requirements(lock, "")


def test_the_list_of_tests_is_there():
    assert [file for file in suite.TESTS if not (REPOSITORY / file).is_file()] == []
    assert len(set(suite.TESTS)) == len(suite.TESTS)
    contract = (REPOSITORY / "tests/contract").glob("test_*.py")
    others = [
        *("nets/test_convert_nets", "nets/test_recalibrate_inputs", "deploy/test_convert_training"),
        *("deploy/test_convert_refusals", "zoo/test_zoo_files", "zoo/test_lenet"),
    ]
    wanted = {f"tests/contract/{file.name}" for file in contract}
    assert wanted | {f"tests/{name}.py" for name in others} <= set(suite.TESTS)
    assert "tests/contract/test_amp.py" in wanted


def test_it_ends_with_1_if_something_broke(monkeypatch, tmp_path, capsys):
    def question(stage):
        problems = {"portable": [], "native": ["no | kernel"]}[stage.backend]
        return [checks.Finding("a question", problems, "a remark")]

    def run_file(file, backend, environment):
        return suite.Outcome(file, backend, suite.Counter(passed=2, numbers=3))

    monkeypatch.setattr(house, "stage", lambda compiler: {})
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(checks, "CHECKS", (question,))
    monkeypatch.setattr(suite, "run_file", run_file)
    report = tmp_path / "report.md"
    test = "tests/zoo/test_mlp.py"
    assert rehearse_gpu.main(["--backend", "portable", "--report", str(report), test]) == 0
    assert report.read_text().splitlines()[2:] == [
        "| a question | portable | ok | a remark |",
        f"| {test} | portable | ok | 3 numbers, 2 passed |",
    ]
    assert rehearse_gpu.main(["--backend", "native", "--skip-tests"]) == 1
    said = capsys.readouterr().out
    assert "| a question | native | 1 problems | a remark |" in said
    assert "- a question (native): no | kernel" in said


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["tests/no_such.py"], 2, "no such test file: tests/no_such.py"),
        (["--report", "/no/such/folder/report.md"], 1, "does not exist"),
    ],
)
def test_errors_are_one_line(arguments, status, said, monkeypatch, capsys):
    monkeypatch.setattr(house, "stage", lambda compiler: {})
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert rehearse_gpu.main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rehearse_gpu: error: ") and said in line


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert rehearse_gpu.main([]) == 1
    assert "apt-get install g++ binutils" in capsys.readouterr().err


def test_scenes_are_named_as_the_checks_ask_for_them():
    """Read, not imported: a scene needs a GPU."""
    source = (REPOSITORY / "scripts/rehearsal/scenes.py").read_text("utf-8")
    asked = []

    class Asked(Recorded):
        def play(self, name, *args, **options):
            asked.append(name)
            return self.scene

    for check in checks.CHECKS:
        try:
            check(Asked("portable"))
        except ValueError as error:
            assert "no mark" in str(error)
    assert {"variants", "shared", "products", "empty", "lenet", "launches"} == set(asked)
    assert all(f"def {name}(dtype: str, mode: str)" in source for name in asked)
