"""What asks for a GPU where there is none is told so before anything is installed."""

import subprocess

import pytest
import suite_on_cu112
from helpers import make


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], False),
        (["--device", "gpu"], True),
        (["-k", "x", "--device", "gpu:1"], True),
        (["--device=gpu:0,gpu:1"], True),
        (["--device", "cpu"], False),
        (["--device"], False),
        (["-k", "gpu"], False),
        (["--device=cpu", "gpu"], False),
    ],
)
def test_what_asks_for_a_gpu(arguments, wanted):
    assert suite_on_cu112.wants_gpu(arguments) is wanted


@pytest.mark.parametrize("run", [[], ["--run", "scripts/train_lenet.py"]])
def test_without_a_driver_nothing_is_installed_for_a_gpu(run, monkeypatch, capsys):
    def install():
        raise RuntimeError("installing")

    monkeypatch.setattr(suite_on_cu112, "has_driver", lambda: False)
    monkeypatch.setattr(suite_on_cu112, "make_venv", install)
    assert suite_on_cu112.main([*run, "--device", "gpu"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)" in line


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["-k", "x", "--device", "gpu"], ["-m", "pytest", "-n", "2", "-k", "x", "--device", "gpu"]),
        (
            ["--run", "scripts/train_lenet.py", "--device", "gpu", "--epochs", "1"],
            ["scripts/train_lenet.py", "--device", "gpu", "--epochs", "1"],
        ),
    ],
)
def test_what_is_run_with_a_driver(arguments, program, monkeypatch):
    ran = []

    def run(command, **options):
        ran.append(command[1:])
        return subprocess.CompletedProcess(command, 0 if command[1] == "-c" else 7)

    monkeypatch.setattr(suite_on_cu112, "has_driver", lambda: True)
    monkeypatch.setattr(suite_on_cu112, "make_venv", lambda: None)
    monkeypatch.setattr(subprocess, "run", run)
    assert suite_on_cu112.main(arguments) == 7
    assert ran == [["-c", suite_on_cu112.CUDA_CHECK], program]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("", "scripts/train_lenet.py"),
        ("--device gpu", "scripts/suite_on_cu112.py --run scripts/train_lenet.py --device gpu"),
        ("--device=gpu:1", "scripts/suite_on_cu112.py --run scripts/train_lenet.py --device=gpu:1"),
        ("--device cpu", "scripts/train_lenet.py --device cpu"),
        ("--out gpu", "scripts/train_lenet.py --out gpu"),
    ],
)
def test_make_train_takes_the_cuda_wheel_for_a_gpu(arguments, command):
    done = make("-n", "-o", "ready", "train", READY="ready", ARGS=arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == f".venv/bin/python {command}"
