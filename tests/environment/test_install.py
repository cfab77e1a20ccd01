"""Commands that messages name: for this Python, and for a clone or an installed package."""

import ast
import re
import sys

from scratchbn.environment import install
from scratchbn.environment.install import install_command, python_command

import pytest
from helpers import REPOSITORY

INSTALLS = re.compile(r"pip3? (un)?install |\bmake [a-z]|python3? -m ")


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A Python that is called python, in a folder that is not on the path."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    return python


def test_a_python_that_is_found_by_name(python, monkeypatch):
    monkeypatch.setenv("PATH", str(python.parent))
    assert python_command("-m", "scratchbn", "doctor") == "python -m scratchbn doctor"


def test_a_python_that_another_hides_is_named_by_path(python, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "python").symlink_to(sys.executable)  # the same file behind it, as in an environment
    monkeypatch.setenv("PATH", f"{other}:{python.parent}")
    monkeypatch.chdir(other)
    assert python_command("x") == f"{python} x"
    monkeypatch.chdir(tmp_path)
    assert python_command("x") == "venv/bin/python x"
    monkeypatch.chdir(python.parent)
    assert python_command("x") == "./python x"


def test_in_a_clone_the_clone_is_installed(python, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(python.parent))
    monkeypatch.chdir(tmp_path)
    assert install_command("demo") == f"python -m pip install -e '{REPOSITORY}[demo]'"
    monkeypatch.chdir(REPOSITORY)
    assert install_command("cpu", "demo") == "python -m pip install -e '.[cpu,demo]'"


def test_installed_from_a_wheel_its_name_is(python, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(python.parent))
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert install_command("demo") == "python -m pip install 'scratchbn[demo]'"


def test_no_message_names_an_install_command_of_its_own():
    """But those of `environment/install.py`; docstrings and comments are for readers of code."""
    found = []
    for path in sorted((REPOSITORY / "scratchbn").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        documentation = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
            if isinstance(node.body[0], ast.Expr)
        }
        found += [
            (path.name, node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node not in documentation
            if isinstance(node.value, str) and INSTALLS.search(node.value)
        ]
    files = [name for name, _ in found]
    assert files == ["help.py", "launch.py"], found  # make in a clone, and an example of --help
