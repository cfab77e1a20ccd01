"""The rehearsal's own code: what it reads out of journals, PTX and failures, on a CPU."""

import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import rehearse_gpu
from helpers import REPOSITORY
from rehearsal import checks, house, standins, suite
from rehearsal.classify import BROKEN, NUMBERS, classify
from rehearsal.journal import Entry, accesses, between, order_problem, parse, work
from rehearsal.ptx import float32_instructions, float64_problems, rounded_constants

SGD = "void mxnet::op::mxnet_op::mxnet_generic_kernel<mxnet::op::SGDMomKernel, float*>(int, float*)"
JOURNAL = textwrap.dedent(
    f"""\
    MARK\tplain: forward
    MODULE\t12-000.ptx\t.target sm_80
    LAUNCH\t_Z7FusedKernel\tgrid=2x1x1 block=512x1x1\t0x10 0x20\tFusedKernel_add_(float*, float*)
    CALL\tcublasSgemm_v2\tm=36 n=3 k=1 mode=3\t0x30 c0x10 c(nil)
    MODE\tcublasSetMathMode\tmode=3
    KERNEL\t_ZSGD\tgrid=1x1x1 block=256x1x1\t0x40 0x10 0x50 0x60\t{SGD}
    COPY\tmemcpy\tbytes=12\t0x70 c0x80
    MARK\tplain: backward
    KERNEL\t_Zlast\tgrid"""
)


# --- journals -----------------------------------------------------------------------------------


def test_a_journal_is_read_and_its_unfinished_line_left_out():
    entries = parse(JOURNAL)
    assert [e.kind for e in entries] == [
        "MARK", "MODULE", "LAUNCH", "CALL", "MODE", "KERNEL", "COPY", "MARK",
    ]  # fmt: skip
    assert [e.kind for e in work(entries)] == ["LAUNCH", "CALL", "KERNEL", "COPY"]
    product = entries[3]
    assert product.touched == ((0x30, False), (0x10, True), (0, True))
    assert (product.detail("mode"), product.detail("m"), product.detail("x")) == (3, 36, None)
    assert parse("") == []


def test_what_lies_between_marks():
    entries = parse(JOURNAL)
    assert between(entries, "plain: forward", "plain: backward") == entries[1:-1]
    with pytest.raises(ValueError, match="no mark 'later' in the journal"):
        between(entries, "plain: forward", "later")


@pytest.mark.parametrize(
    ("address", "letters"), [(0x10, "RRW"), (0x50, "R"), (0x40, "W"), (0x30, "W"), (0x99, "")]
)
def test_accesses_are_told_from_declarations(address, letters):
    assert accesses(parse(JOURNAL), address) == letters


@pytest.mark.parametrize(
    ("signature", "touched", "letters"),
    [
        ("void reduce(float const*, float*)", ((1, True), (2, False)), ("R", "W")),
        ("void generic(int, float*, float*)", ((1, False), (2, False)), ("W", "R")),
        ("void ex<binary_broadcast_kernel<2> >()", ((1, False), (2, False)), ("R", "W")),
    ],
)
def test_the_wheels_kernels_write_to_their_result(signature, touched, letters):
    entry = Entry("KERNEL", "_Z1k", "", touched, signature)
    assert tuple(accesses([entry], where) for where, _ in touched) == letters


def test_a_kernel_of_a_module_may_do_both_unless_it_says_const():
    entry = Entry("LAUNCH", "finish", "", ((1, False), (2, True)), "finish")
    assert (accesses([entry], 1), accesses([entry], 2)) == ("B", "R")


@pytest.mark.parametrize(
    ("letters", "writes", "problem"),
    [
        ("RRRW", 1, None),
        ("W", 1, None),
        ("RWRRW", 2, None),
        ("B", 1, None),
        ("RRWR", 1, "read after it was written: RRWR"),
        ("RWRWR", 2, "read after it was written: RWRWR"),
        ("RWW", 1, "written 2 times, not 1: RWW"),
        ("RR", 1, "written 0 times, not 1: RR"),
        ("", 1, "written 0 times, not 1: never touched"),
    ],
)
def test_order_of_reads_and_writes(letters, writes, problem):
    assert order_problem(letters, writes) == problem


def test_a_layer_called_twice_writes_twice():
    writes = [Entry("KERNEL", "_ZSGD", "", ((9, False), (1, False)), SGD)]
    marks = [Entry("MARK", f"x, twice, step 2: {part}") for part in ("forward", "backward")]
    held = {"running_mean": 1}
    order = [marks[0], *writes, *writes, marks[1]]
    assert checks.order_problems(order, "x, twice", held) == []
    order = [marks[0], *writes, marks[1]]
    assert checks.order_problems(order, "x, twice", held) == [
        "running_mean is written 1 times, not 2: W"
    ]


def test_launches_are_counted_by_step():
    entries = [
        *(Entry("MARK", "ours 2: forward"), Entry("KERNEL", "a"), Entry("MODE", "b")),
        *(Entry("MARK", "ours 2: backward"), Entry("CALL", "c"), Entry("SET", "d")),
        *(Entry("MARK", "ours 2: end"), Entry("KERNEL", "e")),
    ]
    assert checks.launches_of_step(entries, "ours 2") == (1, 2)


def test_launches_that_a_card_refuses_are_errors():
    entries = [Entry("REFUSED", "k"), Entry("REFUSED", "k"), Entry("MISSING", "cudaGraphLaunch")]
    assert checks.errors_of(checks.Scene("empty", None, {}, entries)) == [
        "empty: k launched with no blocks, 2 times",
        "empty: cudaGraphLaunch has no stand-in, 1 times",
    ]
    assert checks.errors_of(checks.Scene("empty", "died of signal 8")) == ["empty died of signal 8"]


class Recorded(checks.Stage):
    """A stage whose scenes have run: (name, mode): what came of them."""

    def __init__(self, backend, **scene):
        super().__init__({}, backend)
        object.__setattr__(self, "scene", checks.Scene("recorded", None, **scene))

    def play(self, *args, **options):
        return self.scene


def test_tf32_products_are_problems():
    def product(mode):
        return Entry("CALL", "cublasSgemm_v2", f"m=1 mode={mode}")

    (finding,) = checks.tf32(Recorded("portable", entries=[product(0), product(2)]))
    assert finding.problems == [] and finding.remark == "6 products"
    (finding,) = checks.tf32(Recorded("portable", entries=[product(3), product(3), product(0)]))
    assert finding.problems == ["recorded: 2 x cublasSgemm_v2 with TF32"] * 3


def test_float32_in_a_float64_module_is_a_problem():
    ptx = f".visible .entry fused(\n.param .u64 x)\n{DOUBLE}\trsqrt.approx.f32 %f1, %f2;\n"
    (finding,) = checks.float64(Recorded("portable", modules={"1.ptx": ptx}))
    assert finding.problems == ["fused: instruction rsqrt.approx.f32"]


def test_launches_have_a_bound():
    entries = []
    for name in ("ours", "built-in"):
        for part, launched in (("forward", 8), ("backward", 1), ("end", 0)):
            entries += [Entry("MARK", f"{name} 2: {part}"), *[Entry("KERNEL", "k")] * launched]
    (finding,) = checks.launches(Recorded("native", entries=entries))
    assert finding.problems == ["8 + 1 launches, the bound is 8"]
    (finding,) = checks.launches(Recorded("portable", entries=entries))
    assert finding.problems == []
    assert finding.remark == "ours 8 forward, 1 backward; built-in 8 forward, 1 backward"


# --- PTX ----------------------------------------------------------------------------------------

DOUBLE = "\tld.global.f64 \t%fd1, [%rd4];\n"


@pytest.mark.parametrize(
    "line",
    [
        "\tcvt.rn.f32.f64 \t%f1, %fd1;",
        "\tcvt.f64.f32 \t%fd2, %f1;",
        "\t@%p1 rsqrt.approx.ftz.f32 %f2, %f1;",
        "\tsqrt.rn.f32 %f3, %f2;",
        "\tmov.f32 %f4, 0f3F800000;",
    ],
)
def test_float32_instructions_are_found(line):
    name = line.split()[1] if "@" in line else line.split()[0]
    assert float64_problems(DOUBLE + line + "\n") == [f"instruction {name}"]
    assert float64_problems(line.replace("f64", "s32") + "\n") == []  # no float64 in it


def test_what_is_no_instruction_is_not_found():
    text = (
        DOUBLE + "\t.reg .f32 \t%f<3>;\n\t.param .f32 x,\n// add.f32\n\tadd.f64 %fd1, %fd2, %fd3;\n"
    )
    assert float32_instructions(text) == []


def test_constants_that_were_rounded_to_float32_are_found():
    def constant(value):
        return f"\tmul.f64 %fd1, %fd2, 0d{np.float64(value).view(np.uint64):016X};\n"

    for value in (0.9, 1e-5, 0.1, 1 / 3):
        rounded = float(np.float32(value))
        assert rounded_constants(constant(rounded)) == [rounded]
        assert rounded_constants(constant(value)) == []
    for exact in (0, 1, -1, 0.5, 2, 0.75, 1024, 65504, 1e5, np.inf):
        assert rounded_constants(constant(exact)) == []


# --- failures -----------------------------------------------------------------------------------


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


# --- stand-ins, environment, command ------------------------------------------------------------

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
    assert "tests/contract/test_contract_training.py" in suite.TESTS
    assert "tests/contract/test_conformance_steps.py" in suite.TESTS


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
