"""What `make` does before anything runs: the interpreter, the environment, the locked versions."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, make
from packaging.requirements import Requirement

PYTHONS = ("3.9", "3.10", "3.11")
HERE = "{}.{}".format(*sys.version_info)


def interpreter(path, version):
    """Write a stand-in for a Python: it knows its version and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"sys.version_info = {version!r}\n"
        "if sys.argv[1:2] == ['-c']: exec(sys.argv[2])\n"
        f"elif sys.argv[1:2] == ['-V']: print('Python', {'.'.join(map(str, version))!r})\n"
        "else: sys.exit(9)\n"
    )
    path.chmod(0o755)
    return path


def test_help_has_a_line_for_each_target():
    targets = (
        re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.M).group(1).split()
    )
    lines = make("help").stdout.splitlines()
    told = {line.split()[1]: line.split(maxsplit=2)[2:] for line in lines}
    assert set(told) == set(targets) - {"rebuild"}
    assert all(told.values())


def test_missing_interpreter_is_named(tmp_path):
    done = make("lint", PYTHON="python3.99", VENV=tmp_path / "venv")
    assert done.returncode
    assert "no interpreter 'python3.99' here: name one with 'make PYTHON=...'" in done.stderr


@pytest.mark.parametrize("version", [(3, 8, 1), (3, 12, 0)])
def test_wrong_interpreter_is_named(tmp_path, version):
    python = interpreter(tmp_path / "python", version)
    done = make("lint", PYTHON=python, VENV=tmp_path / "venv")
    assert done.returncode
    told = f"needs Python 3.9 to 3.11, '{python}' is Python {'.'.join(map(str, version))}"
    assert told in done.stderr


@pytest.mark.parametrize(
    ("has", "asked", "rebuilt"),
    [
        ((3, 9, 1), (3, 10, 1), True),
        ((3, 9, 1), (3, 9, 7), False),
        ((3, 9, 1), None, False),
        (None, None, True),
    ],
    ids=["another version", "same version", "nothing asked", "interpreter gone"],
)
def test_environment_of_another_python_is_made_anew(tmp_path, has, asked, rebuilt):
    venv = tmp_path / "venv"
    venv.mkdir()
    if has:
        interpreter(venv / "bin" / "python", has)
    (venv / ".ready").touch()
    variables = {"PYTHON": interpreter(tmp_path / "asked", asked)} if asked else {}
    done = make("-n", "lint", VENV=venv, **variables)
    assert done.returncode == 0, done.stderr
    assert ("-m venv --clear" in done.stdout) == rebuilt


@pytest.mark.skipif(shutil.which(f"python{HERE}") is None, reason="not found under its name")
def test_python_of_a_new_environment_is_one_that_mxnet_can_use(tmp_path):
    interpreter(tmp_path / "python3", (3, 13, 0))
    path = f"{tmp_path}:{Path(shutil.which(f'python{HERE}')).parent}:/usr/bin:/bin"
    done = make("-n", "lint", VENV=tmp_path / "venv", env={"PATH": path})
    assert re.search(r"python3\.(9|10|11) -m venv", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_every_package_once(python):
    marks = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_python_implementation": "CPython",
    }
    lines = (REPOSITORY / "requirements.lock").read_text().split("\n")
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    names = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(marks)]
    assert len(names) == len(set(names))
    project = (REPOSITORY / "pyproject.toml").read_text()
    wanted = set()
    for extra in ("cpu", "gluoncv", "onnx", "demo", "report", "test"):
        block = re.search(rf"^{extra} = \[(.*?)\]", project, re.M | re.S).group(1)
        wanted |= {Requirement(text).name for text in re.findall(r'"([^"]+)"', block)}
    assert wanted <= set(names)
