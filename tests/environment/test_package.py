"""The wheel and the source distribution: complete, well described, and of use on their own."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string

import scratchbn
from scratchbn.datasets import load

import pytest
from dataset_files import NAMES, idx
from helpers import REPOSITORY
from packaging.specifiers import SpecifierSet
from terminal import in_terminal

EXAMPLE = ["models/__init__.py", "models/_norm.py", "models/lenet.py", "scripts/train_lenet.py"]
VERDICT = "float64 is that of nn.BatchNorm, the exported symbols agree with the net"
MADE = {"PKG-INFO", "setup.cfg"}  # what building adds to a source distribution
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # building has arguments of its own
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


def tracked():
    """The files that git knows or would take; None outside its work tree."""
    git = ["git", "-C", str(REPOSITORY), "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        return None
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of both, built from a copy of the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = tracked() or [
        str(path.relative_to(REPOSITORY))
        for path in REPOSITORY.rglob("*")
        if path.is_file() and not {".venv", "build", "runs", "__pycache__"} & set(path.parts)
    ]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's package in it, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The four files of MNIST with 300 and 100 digits of the sample."""
    sample, folder = load("sample"), tmp_path_factory.mktemp("digits")
    arrays = {
        "train-images": sample.train_images[:300],
        "train-labels": sample.train_labels[:300],
        "t10k-images": sample.test_images[:100],
        "t10k-labels": sample.test_labels[:100],
    }
    for key, name in NAMES.items():
        (folder / name).write_bytes(idx(arrays[key]))
    return folder


def test_the_source_distribution_is_the_repository(built):
    names = tracked()
    if names is None:
        pytest.skip("not a work tree of git")
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    inside = {name for name in inside if not name.startswith("scratchbn.egg-info/")}
    assert inside - MADE == set(names)


def test_a_package_index_would_take_both(built):
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_is_the_package_and_its_example(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        metadata = message_from_string(
            archive.read(f"scratchbn-{scratchbn.__version__}.dist-info/METADATA").decode()
        )
        example = {n: archive.read(f"scratchbn/example/{n}") for n in EXAMPLE}
    package = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "scratchbn").rglob("*")
        if path.suffix in (".py", ".typed", ".cc", ".h", ".cu", ".html")
    }
    assert names == package | {f"scratchbn/example/{name}" for name in EXAMPLE}
    assert "scratchbn/py.typed" in names
    assert example == {name: (REPOSITORY / name).read_bytes() for name in EXAMPLE}
    assert metadata["Version"] == scratchbn.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    python = SpecifierSet(metadata["Requires-Python"])
    told = [v for v in ("3.8", "3.9", "3.10", "3.11", "3.12") if python.contains(v)]
    assert told == ["3.9", "3.10", "3.11"]


def test_the_demo_trains_from_an_installed_wheel(installed, digits, tmp_path):
    """In a narrow terminal, with a bar, and without a word of MXNet's."""
    home = tmp_path / "home"
    home.mkdir()
    options = ["--data", digits, "--epochs", "1", "--device", "cpu"]
    seen = in_terminal(
        [sys.executable, "-m", "scratchbn", "demo", *options],
        60,
        cwd=home,
        env={"HOME": str(home), "PYTHONPATH": str(installed), "SCRATCHBN_CACHE": str(home)},
    )
    assert seen.status == 0, seen.text
    assert "epoch 1 builtin" in seen.text and "batch/s" in seen.text, "a progress bar"
    assert any(line.startswith("│ test accuracy") for line in seen.lines)
    assert "written to scratchbn-demo" in seen.lines
    files = os.listdir(home / "scratchbn-demo")
    assert {"curves.png", "metrics.json", "lenet.params"} <= set(files)
    assert "Cannot decide type" not in seen.text and "Traceback" not in seen.text
    at = seen.lines.index("next:")
    assert max(len(part) for part in re.split(r"[\r\n]", seen.text.split("next:")[0])) <= 60
    assert re.sub(r"\s+", " ", "\n".join(seen.lines[at - 2 : at])).endswith(VERDICT)
    last = seen.lines[at + 1 :]
    assert f"  read      {installed}/scratchbn/example/models/lenet.py" in last
    assert "to_scratch(net)" in last[-1]


def test_an_installed_wheel_names_commands_that_work(installed, tmp_path):
    code = (
        "from scratchbn.environment.install import install_command as i, ROOT; print(i('demo')); "
        "print(ROOT)"
    )
    env = {**os.environ, "PYTHONPATH": str(installed), "PATH": os.path.dirname(sys.executable)}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    ).stdout.splitlines()
    assert said == ["python -m pip install 'scratchbn[demo]'", str(installed)]
    # It finds what is installed: nothing is left to do for an extra without packages.
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "scratchbn[demo]"],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert "already satisfied: scratchbn[demo]" in done.stdout, done.stdout + done.stderr
