"""The benchmark, run for real."""

from __future__ import annotations

import json
import subprocess
import sys

import benchmark
import matplotlib.image
import mxnet as mx
import numpy as np
import pytest
from bench import stats
from bench.entries import WORKS
from bench.report import Report
from benchmark_cases import FEW
from helpers import REPOSITORY, last_json

SCRIPT = REPOSITORY / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    arguments = ["--quick", "--nets", "lenet", "layer_2d", "--rounds", "2"]
    arguments += ["--work", *WORKS, "--entries", *FEW]
    assert benchmark.main([*arguments, "--out", str(out)]) == 0
    return out


def test_it_writes_its_files_and_nothing_else(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted(benchmark.FILES)
    picture = matplotlib.image.imread(finished / "benchmark.png")
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


def test_the_samples_are_all_there(finished):
    report = json.loads((finished / "benchmark.json").read_text())
    assert report["command"].startswith("python scripts/benchmark.py --quick --nets lenet")
    assert report["versions"]["mxnet"] == mx.__version__
    assert report["machine"]["cores"] >= 1
    groups = {(group["net"], group["work"]): group for group in report["groups"]}
    layer = {"builtin", "control", "textbook", "portable", "copy"}
    inference = {"builtin", "control", "none", "textbook", "portable", "file"}
    live = {"builtin", "control", "none", "textbook", "portable"}
    assert {key: set(group["samples"]) for key, group in groups.items()} == {
        ("lenet", "train"): live,
        ("lenet", "inference"): inference,
        ("lenet", "folded"): {"builtin", "control", "none", "builtin-folded", "folded"},
        ("layer_2d", "train"): layer,
        ("layer_2d", "inference"): layer | {"file"},
    }
    for group in groups.values():
        assert group["problems"] == {}
        for name, times in group["samples"].items():
            assert len(times) == 2
            process = group["process"][name]
            assert len(process) == 2
            assert min(times) > 0 < min(process)
            row, reference = group["rows"][name], group["samples"]["builtin"]
            assert row["process_ms"] == pytest.approx(1000 * np.median(process))
            of_process = np.median(process) / np.median(group["process"]["builtin"])
            assert row["process_ratio"][0] == pytest.approx(of_process)
            assert row["ms"] == pytest.approx(1000 * np.median(times))
            assert row["ratio"][0] == pytest.approx(np.median(times) / np.median(reference))
            assert row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]
            assert (row["floor"] is None) == (not group["layer"] or name == "copy")
        assert group["rows"]["builtin"]["ratio"] == [1, 1, 1]


def test_the_tables_say_what_the_samples_do(finished):
    report = json.loads((finished / "benchmark.json").read_text())
    text = (finished / "benchmark.md").read_text()
    for title in ("Training step", "Inference", "Inference, norms folded"):
        assert f"\n## {title}\n" in text
    for title in ("training step", "inference"):
        assert f"\n## Single layer: {title}\n" in text
    for group in report["groups"]:
        for name, row in group["rows"].items():
            if name not in ("builtin", "copy"):
                assert str(stats.Interval(*row["ratio"])) in text
                assert str(stats.Interval(*row["process_ratio"])) in text
    assert "8 passes of the tensor" in text
    widths = {
        line.count("|") for line in text.split("## Inference\n")[1].split("##")[0].split("\n")
    }
    assert widths == {0, 10}


def test_memory_of_a_process():
    command = [sys.executable, str(SCRIPT), "--memory-of", "mlp"]
    found = {}
    for entry in ("none", "textbook"):
        process = subprocess.run(
            [*command, entry], capture_output=True, text=True, timeout=120, check=False
        )
        found[entry] = last_json(process)["bytes"]
    parameters = 4 * 2 * (784 * 512 + 512 * 512)  # values and gradients
    assert parameters < found["none"] < found["textbook"] < 100 * parameters


def test_memory_table():
    report = Report("", {}, {}, [], {"mlp": {"builtin": 2**21, "portable": 3 * 2**20}})
    assert "| net | builtin | portable |" in report.to_markdown()
    assert "| mlp | 2 MiB | 1.50 |" in report.to_markdown()


def test_profile_lists_the_operators():
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--profile", "mlp", "builtin", "--work", "inference"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows = {line.split()[0]: line.split()[1:] for line in process.stdout.splitlines() if line}
    assert rows["BatchNorm"][0] == "2"
    assert rows["FullyConnected"][0] == "3"
    assert rows["all"][-1] == "100.0%"
