"""Ctrl-C at any moment, and a reader that has read enough: no traceback."""

import os
import signal
import subprocess
import sys
import time

from scratchbn import _interrupt

import pytest
from helpers import REPOSITORY, run_python

# A stand-in for MXNet whose import takes long and, as libraries do, loses exceptions.
SLOW = """
import os, sys, time
os.write(2, b"importing\\n")
while True:
    try:
        time.sleep(0.01)
    except BaseException:
        pass
"""
COMMANDS = {
    "parity": ["-m", "scratchbn", "parity"],
    "fold": ["-m", "scratchbn", "fold", "a", "b", "--out", "c"],
    "convert": ["-m", "scratchbn", "convert", "a", "b", "--out", "c", "--to", "builtin"],
    "infer-symbol": ["-m", "scratchbn", "infer-symbol", "a"],
    "demo": ["-m", "scratchbn", "demo"],
    "train_lenet": ["scripts/train_lenet.py"],
    "export_model": ["scripts/export_model.py"],
    "paper_figure1": ["scripts/paper_figure1.py"],
    "benchmark": ["scripts/benchmark.py"],
    "parity_report": ["scripts/parity_report.py"],
}


def start(arguments, path):
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{REPOSITORY}"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("module", ["mxnet", "numpy"])
def test_ctrl_c_during_an_import_ends_every_command_in_silence(module, tmp_path):
    (tmp_path / f"{module}.py").write_text(SLOW)
    named = {**COMMANDS, "doctor": ["-m", "scratchbn", "doctor"]} if module == "numpy" else COMMANDS
    children = {name: start(arguments, tmp_path) for name, arguments in named.items()}
    for name, child in children.items():
        assert child.stderr.readline() == b"importing\n", name
        child.send_signal(signal.SIGINT)
    for name, child in children.items():
        out, err = child.communicate(timeout=60)
        assert (name, child.returncode, out, err) == (name, -signal.SIGINT, b"", b"")


def test_ctrl_c_while_a_command_works_is_one_line():
    child = start(["-m", "scratchbn", "doctor"], "")
    while child.poll() is None and not started_children(child.pid):  # the probe of MXNet
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"scratchbn doctor: interrupted\n")


def started_children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return file.read().split()
    except OSError:
        return []


def test_who_imports_the_package_keeps_ctrl_c():
    code = """
import signal, sys
import scratchbn
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    assert run_python(code).stdout == "True\n"
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {CHOSEN}"
    assert run_python(code).stdout == "True\n"


CHOSEN = """
from scratchbn import _interrupt
_interrupt.end_in_silence(); _interrupt.raise_again()
print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
"""


@pytest.mark.parametrize(
    ("given", "argv", "is_one"),
    [
        (["python", "-m", "scratchbn", "doctor"], ["-m", "doctor"], True),
        (["python", "/venv/bin/scratchbn"], ["/venv/bin/scratchbn"], True),
        (["python", "-m", "pytest", "scratchbn"], ["-m", "scratchbn"], False),
        (["python"], [""], False),
        (["python", "-m"], [], False),
    ],
)
def test_commands_are_told_from_programs(given, argv, is_one, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", given, raising=False)
    monkeypatch.setattr(sys, "argv", argv)
    assert _interrupt.is_command() == is_one


def test_a_python_without_orig_argv_is_asked_for_its_command_line(monkeypatch):
    told = _interrupt._command_line()
    monkeypatch.delattr(sys, "orig_argv", raising=False)
    assert _interrupt._command_line() == told
    assert len(told) > 1
