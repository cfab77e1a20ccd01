"""Several seeds: each its own run, and what they have in common."""

import json
from argparse import Namespace

from scratchbn.train.repeat import finished
from scratchbn.train.results import earlier_results
from scratchbn.train.seeds import MEASURES, paired, summarize

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from scripts import train_lenet

FEW = ["--data", "sample", "--limit", "100", "--batch-size", "50", "--device", "cpu"]


def metrics(first, second):
    rows = [("scratch", 1, 0.1), ("builtin", 1, 0.2), ("scratch", 2, first), ("builtin", 2, second)]
    return {
        "epochs": [
            {"norm": norm, "epoch": epoch, **dict.fromkeys(MEASURES, value)}
            for norm, epoch, value in rows
        ]
    }


def test_the_interval_is_that_of_a_paired_t_test(rng):
    first, second = rng.normal(size=(2, 7))
    found = paired(first, second)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    np.testing.assert_allclose(found, (np.mean(first - second), *expected), rtol=1e-12)


@pytest.mark.parametrize("pairs", [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_too_few_pairs(pairs):
    with pytest.raises(ValueError, match="pairs of at least two seeds are needed, got"):
        paired(*pairs)


def test_the_last_epoch_is_summarized():
    summary = summarize({3: metrics(0.9, 0.8), 4: metrics(0.7, 0.8)})
    assert (summary.seeds, summary.epochs) == ([3, 4], 2)
    assert summary.results["scratch"]["test_acc"] == [0.9, 0.7]
    assert summary.differences()["test_acc"].mean == pytest.approx(0)


def test_each_seed_is_the_run_that_it_is_alone(tmp_path, capsys):
    out = tmp_path / "seeds"
    command = [*FEW, "--seeds", "2", "--seed", "5", "--out", str(out)]
    assert train_lenet.main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "seed 6 (2 of 2)" in said and "2 seeds after 1 epoch" in said and "difference ± 95%" in said
    )

    assert train_lenet.main([*FEW, "--seed", "6", "--out", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    among = json.loads((out / "seed-6" / "metrics.json").read_text())
    keys = ("norm", "loss", "train_acc", "test_acc")
    assert [[e[k] for k in keys] for e in alone["epochs"]] == [
        [e[k] for k in keys] for e in among["epochs"]
    ]

    summary = json.loads((out / "seeds.json").read_text())
    assert summary["seeds"] == [5, 6]
    assert summary["results"]["builtin"]["loss"][1] == among["epochs"][1]["loss"]
    assert imread(out / "seeds.png").std() > 0

    capsys.readouterr()
    assert train_lenet.main([*command, "--resume"]) == 0
    assert capsys.readouterr().out.count("was finished before") == 2
    assert json.loads((out / "seeds.json").read_text()) == summary


@pytest.mark.parametrize("option", [["--monitor", "a.csv"]])
def test_what_is_for_a_single_training(option, tmp_path, capsys):
    assert train_lenet.main([*FEW, "--seeds", "2", *option, "--out", str(tmp_path)]) == 2
    assert "argument --seeds: not with --monitor" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_results_that_are_replaced_are_named(tmp_path, monkeypatch, capsys):
    options = {"norm": "scratch", "lr": 0.1, "batch_size": 64, "data": "auto", "out": "x"}
    wanted = Namespace(**options, seeds=None)
    assert earlier_results(tmp_path, wanted, "sample") is None
    (tmp_path / "metrics.json").write_text("{}")
    assert earlier_results(tmp_path, wanted, "sample") == "results"
    metrics = {"options": options, "data": {"name": "sample"}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    said = earlier_results(tmp_path, wanted, "sample")
    assert said == "the results of a run with the same options"
    wanted.batch_size = 32
    said = earlier_results(tmp_path, wanted, "mnist")
    assert said == "the results of a run with --batch-size 64 --data sample"

    def stop(*_):
        raise FloatingPointError("stop")

    monkeypatch.setattr(train_lenet, "build", stop)
    assert train_lenet.main([*FEW, "--out", str(tmp_path)]) == 1
    note = f"note: {tmp_path} holds the results of a run with "
    assert note in capsys.readouterr().out, "said at once"
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics, "kept until the end"


def test_only_the_same_options_are_finished(tmp_path):
    options = {"norm": "scratch", "compare": True, "lr": 0.1, "seed": 1, "data": "auto"}
    metrics = {"options": {**options, "out": "x"}, "data": {"name": "sample"}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert finished(Namespace(**options, out=tmp_path), "sample") == metrics
    assert finished(Namespace(**options, out=tmp_path), "mnist") is None
    for other in ({"lr": 0.2}, {"compare": False}):
        assert finished(Namespace(**{**options, **other}, out=tmp_path), "sample") is None
    assert finished(Namespace(**options, out=tmp_path / "none"), "sample") is None
