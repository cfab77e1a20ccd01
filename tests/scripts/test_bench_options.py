"""The options of the benchmark, and PyTorch beside it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import benchmark
import pytest
from bench import plan
from bench.memory import measure_memory
from bench.nets import NETS
from bench.torch_client import TorchError, TorchWorker


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--nets", "lennet"], "argument --nets: invalid choice: 'lennet'"),
        (["--entries", "fast"], "argument --entries: invalid choice: 'fast'"),
        (["--work", "sleep"], "argument --work: invalid choice: 'sleep'"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got '0'"),
        (["--seconds", "-1"], "argument --seconds: must be positive and finite, got '-1'"),
        (["--seconds", "nan"], "argument --seconds: must be positive and finite, got 'nan'"),
        (["--seconds", "1", "--rounds", "1"], "not allowed with argument"),
        (["--threads", "two"], "argument --threads: must be an integer"),
        (["--against", "jax"], "argument --against: invalid choice: 'jax'"),
        (["--torch-python", "python"], "argument --torch-python: needs --against torch"),
        (["--profile", "lennet", "auto"], "argument --profile: 'lennet' is none of lenet, mlp"),
        (["--profile", "lenet", "fast"], "argument --profile: 'fast' is none of builtin"),
    ],
)
def test_bad_options(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_profile_of_an_entry_that_takes_no_part(capsys):
    assert benchmark.main(["--profile", "lenet", "folded"]) == 2
    assert "'folded' takes no part in --work train" in capsys.readouterr().err


def test_nothing_to_measure(tmp_path, capsys):
    arguments = ["--nets", "layer_2d", "--work", "folded", "--entries", "control"]
    assert benchmark.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "nothing to measure: single layers have no folded work" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_one(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--nets", "mlp", "--entries", "control"]
    assert benchmark.main([*arguments, "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_backend_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "missing_backend", {"native": "it is not built"}.get)
    arguments = ["--quick", "--nets", "mlp", "--rounds", "1", "--work", "folded"]
    out = ["--out", str(tmp_path / "out")]
    assert benchmark.main([*arguments, "--entries", "native", *out]) == 2
    assert "native cannot run here: it is not built" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert benchmark.main([*arguments, *out]) == 0
    assert "- native left out: it is not built" in (tmp_path / "out/benchmark.md").read_text()


def test_a_package_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["--nets", "resnet18_v1", "--entries", "control"]) == 2
    assert "resnet18_v1 cannot run here: needs gluoncv" in capsys.readouterr().err


def test_small_memory_leaves_large_layers_out(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 2**20)
    arguments = ["--quick", "--nets", "mlp", "layer_2d", "--rounds", "1", "--work", "inference"]
    assert benchmark.main([*arguments, "--entries", "control", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "benchmark.md").read_text()
    assert re.search(r"layer_2d, [\d.]+ MiB left out: needs 40 tensors of memory", text)
    assert "Single layer" not in text


def test_without_torch_the_error_says_so(tmp_path, capsys):
    broken = tmp_path / "python"
    broken.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1\n"
    )
    broken.chmod(0o755)
    for python, said in ((broken, "No module named 'torch'"), ("nowhere", "cannot be started")):
        arguments = ["--entries", "control", "--against", "torch", "--torch-python", str(python)]
        assert benchmark.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "name a Python that has it with --torch-python" in error


_STAND_IN = """\
#!{python}
import json, sys
print(json.dumps(dict(version="9.9", threads=2)), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "run":
        answer = dict(seconds=0.25 * asked["steps"], process=0.5 * asked["steps"])
    elif asked["net"] == "mlp":
        answer = dict(parameters=671754)
    elif asked["net"] == "lenet":
        answer = dict(error="RuntimeError: no")
    else:
        sys.exit("died")
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    """A program that speaks the protocol of the worker."""
    path = tmp_path / "python"
    path.write_text(_STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_the_worker_is_asked_for_samples(stand_in):
    with TorchWorker(stand_in) as worker:
        assert (worker.version, worker.threads) == ("9.9", 2)
        worker.build("mlp", "train", (2, 784), 671754)
        assert worker.sample(4) == (1.0, 2.0)
        with pytest.raises(TorchError, match="mlp trains 671754 numbers in PyTorch, 5 in"):
            worker.build("mlp", "train", (2, 784), 5)
        with pytest.raises(TorchError, match="RuntimeError: no"):
            worker.build("lenet", "train", (2, 1, 28, 28), 5)
        with pytest.raises(TorchError, match="died"):
            worker.build("other", "train", (2,), 5)


def test_memory_of_the_worker_is_seen_from_outside(stand_in):
    found, notes = measure_memory([NETS["mlp"], NETS["lenet"]], [], stand_in)
    assert found.keys() == {"mlp"}
    assert 0 <= found["mlp"]["torch"] < 2**25
    assert notes == ["lenet, memory: torch: RuntimeError: no"]


def test_torch_takes_part_in_the_rounds(stand_in, tmp_path):
    arguments = ["--quick", "--nets", "mlp", "lenet", "--rounds", "1", "--work", "train"]
    against = ["--against", "torch", "--torch-python", stand_in]
    out = tmp_path / "out"
    assert benchmark.main([*arguments, *against, "--entries", "control", "--out", str(out)]) == 0
    report = json.loads((out / "benchmark.json").read_text())
    mlp, lenet = report["groups"]
    assert (mlp["samples"]["torch"], mlp["process"]["torch"]) == ([0.25], [0.5])
    assert report["versions"]["torch"] == "9.9"
    assert lenet["problems"] == {"torch": "RuntimeError: no"}
    assert "lenet, train: torch fails: RuntimeError: no" in report["notes"]
