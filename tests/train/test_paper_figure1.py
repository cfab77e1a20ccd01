"""The paper's experiment, run for real on a few digits of the sample."""

from __future__ import annotations

import json

from scratchbn.datasets import load

import mxnet as mx
import numpy as np
import paper_figure1
import pytest
from helpers import run_script
from mxnet import autograd

SHORT = ["--data", "sample", "--device", "cpu", "--steps", "300", "--seeds", "1", "2"]
PATHS = [f"runs/{net}-{seed}.json" for net in ("with", "without") for seed in (1, 2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run in a process of its own, started elsewhere than in the repository."""
    directory = tmp_path_factory.mktemp("run")
    process = run_script("paper_figure1.py", [*SHORT, "--out", "a/b"], directory)
    return process, directory / "a" / "b"


@pytest.fixture(scope="module")
def runs(finished):
    """What was measured, by net and seed."""
    found = [json.loads((finished[1] / path).read_text()) for path in PATHS]
    return {(run["options"]["net"], run["options"]["seed"]): run for run in found}


def test_it_writes_its_files_and_nothing_else(finished):
    _, out = finished
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert files == sorted(["curves.json", "figure1.png", "table.md", *PATHS])
    assert (out / "figure1.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured(runs):
    for run in runs.values():
        assert run["step"][0] == 0
        assert run["step"][-1] == 300
        assert {1, 100} < set(run["step"])
        percentiles = np.array(run["percentiles"])
        assert percentiles.shape == (len(run["step"]), 3, 100)
        assert (np.diff(percentiles, axis=1) >= 0).all()
        assert len(run["accuracy"]) == len(run["step"])
        assert all(0 <= accuracy <= 1 for accuracy in run["accuracy"])


def test_normalization_learns_faster_and_its_inputs_are_steadier(runs):
    for seed in (1, 2):
        ours, plain = runs["with", seed], runs["without", seed]
        assert ours["accuracy"][-1] > 0.8
        assert ours["accuracy"][-1] > plain["accuracy"][-1] + 0.1
        for measure, factor in ((paper_figure1.median_range, 2), (paper_figure1.width_ratio, 3)):
            steady, unsteady = np.median(measure(ours)), np.median(measure(plain))
            assert factor * steady < unsteady, (measure.__name__, steady, unsteady)


def test_the_table_is_of_these_runs(finished, runs):
    process, out = finished
    text = (out / "table.md").read_text()
    assert text in process.stdout
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert rows[0] == ["2 seeds", "with BN", "without BN"]
    last = next(row for row in rows if row[0] == "test accuracy after 300 steps")
    for net, cell in zip(("with", "without"), last[1:]):
        ends = [runs[net, seed]["accuracy"][-1] for seed in (1, 2)]
        shown = [f"{v:.4f}"[1:] for v in (np.mean(ends), min(ends), max(ends))]
        assert cell == "{} ({} to {})".format(*shown)


def test_the_curves_are_those_of_a_typical_sigmoid(finished, runs):
    curves = json.loads((finished[1] / "curves.json").read_text())
    assert len(curves) == 4
    for curve in curves:
        run = runs[curve["options"]["net"], curve["options"]["seed"]]
        all_units = np.array(run["percentiles"])
        np.testing.assert_array_equal(curve["percentiles"], all_units[:, :, curve["unit"]])
        ranges = all_units[:, 1].max(axis=0) - all_units[:, 1].min(axis=0)
        assert (ranges < ranges[curve["unit"]]).sum() == 50
        assert curve["accuracy"] == run["accuracy"]


def test_finished_runs_are_kept_and_damaged_ones_made_again(finished, capsys):
    _, out = finished
    files = {path: out / path for path in PATHS}
    before = {path: file.read_text() for path, file in files.items()}
    files["runs/with-1.json"].write_text(before["runs/with-1.json"][:1000])
    other = json.loads(before["runs/without-2.json"])
    other["options"]["lr"] = 0.25
    files["runs/without-2.json"].write_text(json.dumps(other))

    assert paper_figure1.main([*SHORT, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for path, made_again in zip(PATHS, (True, False, False, True)):
        assert ("read from " + str(out / path) in printed) != made_again, path
        now, then = json.loads(files[path].read_text()), json.loads(before[path])
        assert now["options"] == then["options"]
        np.testing.assert_allclose(now["accuracy"][:10], then["accuracy"][:10], atol=0.02)


@pytest.fixture(scope="module")
def sample():
    return paper_figure1.Digits(load("sample"), mx.cpu())


def test_the_input_of_the_net_is_binary(sample):
    for images, count in ((sample.train_images, 4000), (sample.test_images, 1000)):
        pixels = images.asnumpy()
        assert pixels.shape == (count, 784)
        assert set(np.unique(pixels)) == {0, 1}


def test_the_probe_shows_the_input_of_the_last_sigmoids(sample):
    net, probe = paper_figure1.build_pair(paper_figure1.NETS["with"], 0.1, 1, mx.cpu())
    with autograd.train_mode():
        net(sample.train_images[:60])
    mx.nd.waitall()
    before = {name: p.data().asnumpy() for name, p in net.collect_params().items()}
    with autograd.train_mode():
        inputs = probe(sample.test_images).asnumpy()
    mx.nd.waitall()
    # gamma is 1 and beta 0: normalized by the test images themselves, not by the running statistics
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std(axis=0), 1, atol=1e-2)
    for name, parameter in net.collect_params().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name], err_msg=name)

    net, probe = paper_figure1.build_pair(None, 0.1, 1, mx.cpu())
    x = sample.test_images
    for layer in list(net)[:-2]:
        x = layer(x)
    np.testing.assert_allclose(probe(sample.test_images).asnumpy(), x.asnumpy(), atol=1e-5)


def test_every_image_comes_once_per_epoch():
    order = paper_figure1.batches(images=100, size=30, steps=10, seed=3)
    assert order.shape == (10, 30)
    for epoch in order.reshape(3, 100):
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(order, paper_figure1.batches(100, 30, 10, seed=4))


@pytest.mark.parametrize("steps", [1, 2, 60, 50_000])
def test_evaluations_begin_and_end_with_the_training(steps):
    found = paper_figure1.evaluation_steps(steps)
    assert (found[0], found[-1]) == (0, steps)
    assert found == sorted(set(found))
    if steps == 50_000:
        assert set(paper_figure1.MILESTONES) < set(found)
        assert len(found) < 120


def test_a_net_that_diverges_is_an_error(tmp_path, capsys):
    options = ["--data", "sample", "--device", "cpu", "--steps", "20", "--lr", "1e38"]
    assert paper_figure1.main([*options, "--seeds", "1", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "are not finite at step" in error
    assert "try a lower --lr" in error
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, got '0'"),
        (["--seeds", "-1"], "argument --seeds: must be between 0 and 2147483647, got '-1'"),
        (["--lr", "nan"], "argument --lr: must be positive and finite, got 'nan'"),
        (["--sigma", "small"], "argument --sigma: must be a number, got 'small'"),
    ],
)
def test_bad_options(options, text, capsys):
    with pytest.raises(SystemExit) as exit_:
        paper_figure1.main(options)
    assert exit_.value.code == 2
    assert text in capsys.readouterr().err


def test_bad_data_and_batch_size(tmp_path, capsys):
    assert paper_figure1.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "none" in capsys.readouterr().err
    options = ["--data", "sample", "--device", "cpu", "--batch-size", "4001"]
    assert paper_figure1.main([*options, "--out", str(tmp_path)]) == 2
    assert "argument --batch-size: 4001 is more than the 4,000" in capsys.readouterr().err
