"""`make` on several Pythons: which are found, what is said of each. Programs are stand-ins."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY
from test_makefile import HERE, PYTHONS, interpreter

OTHERS = [version for version in PYTHONS if version != HERE]


def numbers(version, patch=9):
    return (*map(int, version.split(".")), patch)


@pytest.fixture
def run(tmp_path):
    """Run the script alone in a clone; `make` prints its arguments, then fails or not."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(REPOSITORY / "scripts" / "pythons.py", tmp_path / "scripts")
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()

    def run_it(*arguments, fails="nothing"):
        make.write_text(
            f"#!{sys.executable}\nimport os, sys\nprint(os.environ.get('MAKEFLAGS'), *sys.argv)\n"
            f"print('the last line')\nsys.exit({fails!r} in sys.argv[-1])\n"
        )
        make.chmod(0o755)
        environment = {
            "PATH": str(make.parent),
            "PYENV_ROOT": str(tmp_path / "pyenv"),
            "MAKEFLAGS": "n",
        }
        command = [sys.executable, script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run_it


def pyenv(tmp_path, version, patch=9):
    path = tmp_path / "pyenv" / "versions" / f"{version}.{patch}" / "bin" / "python"
    return interpreter(path, numbers(version, patch))


def log(tmp_path, version):
    return (tmp_path / "build" / f"python-{version}.log").read_text("utf-8")


def test_found_on_path_and_among_pyenvs(run, tmp_path):
    on_path, in_pyenv = OTHERS
    interpreter(tmp_path / "bin" / f"python{on_path}", numbers(on_path))
    named = pyenv(tmp_path, in_pyenv)
    done = run("lint", "check", "--others", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    for version, python in ((on_path, f"python{on_path}"), (in_pyenv, named)):
        assert f"python {version}: passed in 0 s: the last line" in done.stdout
        assert f"lint check PYTHON={python} VENV=.venv-{version}" in log(tmp_path, version)
        assert log(tmp_path, version).startswith("None ")  # no flag of an outer make
    assert f"python {HERE}" not in done.stdout


def test_what_is_not_found_is_named(run, tmp_path):
    shim = tmp_path / "bin" / f"python{OTHERS[0]}"
    shim.write_text("#!/bin/sh\nexit 127\n")  # pyenv's, of a version that is not chosen
    shim.chmod(0o755)
    interpreter(
        tmp_path / "bin" / f"python{OTHERS[1]}", numbers(HERE)
    )  # another than its name says
    done = run("essentials", "--others")
    assert done.returncode == 0
    for version in OTHERS:
        assert f"python {version}: not found, left out" in done.stdout
    assert not (tmp_path / "build").exists()


def test_one_that_fails_shows_its_log_and_the_rest_run(run, tmp_path):
    for version in PYTHONS:
        pyenv(tmp_path, version)
    done = run("check", fails=OTHERS[0])
    assert done.returncode == 1
    assert f"python {OTHERS[0]}: FAILED" in done.stdout
    assert f"VENV=.venv-{OTHERS[0]}" in done.stdout
    for version in set(PYTHONS) - {OTHERS[0]}:
        assert f"python {version}: passed" in done.stdout


def test_the_newest_of_pyenvs_is_taken(run, tmp_path):
    for patch in (2, 9):
        pyenv(tmp_path, OTHERS[0], patch)
    run("check", "--others")
    assert f"{OTHERS[0]}.9" in log(tmp_path, OTHERS[0])


def test_only_ci_tries_the_others():
    for ci, wanted in (("", False), ("true", True)):
        done = subprocess.run(
            ["make", "-n", "test", f"CI={ci}", f"VENV={Path(sys.prefix)}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert ("scripts/pythons.py --others" in done.stdout) is wanted
