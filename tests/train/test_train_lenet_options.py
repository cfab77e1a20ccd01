"""The training script's cross-check, options and errors."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace

from scratchbn import ScratchBatchNorm
from scratchbn.environment.install import install_command
from scratchbn.parity import Report, Row
from scratchbn.train import read_values

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from lenet_runs import FEW, FILES, KINDS, build, run_main, start, train, twenty_images
from mxnet.gluon import nn

from scripts import train_lenet


def wrong(**options):
    return lambda **_: ScratchBatchNorm(**options)


@pytest.mark.parametrize(
    ("broken", "kinds", "tensor"),
    [
        ({"epsilon": 1e-4}, KINDS, "output"),
        ({"momentum": 0.8}, {"statistic"}, "1.running_mean"),
        ({"unbiased_variance": True}, {"statistic"}, "10.running_var"),
        ({"scale": False}, {"parameter gradient"}, "1.gamma"),
    ],
    ids=["epsilon", "momentum", "variance", "gamma"],
)
def test_a_broken_layer_fails_the_cross_check(broken, kinds, tensor, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train_lenet.NORMS, "scratch", wrong(**broken))
    status, metrics = run_main(tmp_path)
    assert status == 1
    assert metrics["crosscheck"]["ok"] is False
    failed = [row for row in metrics["crosscheck"]["rows"] if not row["ok"]]
    assert {row["kind"] for row in failed} == kinds
    printed = capsys.readouterr()
    assert f"the cross-check failed: {len(failed)} of " in printed.err
    assert {row["mode"] for row in failed if row["tensor"] == tensor} == {"eager", "hybrid"}
    assert any(tensor in line and "FAIL" in line for line in printed.out.splitlines())
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES


def test_a_difference_that_is_not_a_number_fails():
    fine = Row("output", "output", "eager", "train", 1, 0.0, 0.0, 1e-10)
    difference = replace(fine, absolute=math.nan)
    check = Report((fine, difference, fine))
    assert not check
    assert check.failures == [difference]
    metrics = train_lenet.check_metrics(check)
    assert metrics["ok"] is False
    assert metrics["max_abs_diff"]["output"] is None
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "norms", "note"),
    [
        (["--no-compare"], ["scratch"], ""),
        (["--norm", "builtin"], ["builtin"], ""),
        (["--norm", "none", "--compare"], ["none"], "note: --compare does nothing"),
    ],
)
def test_without_a_twin_there_is_no_cross_check(options, norms, note, tmp_path, capsys):
    status, metrics = run_main(tmp_path, "--init", "xavier", "--debug", *options)
    assert status == 0
    assert metrics["crosscheck"] == {"ok": None, "max_abs_diff": {}}
    assert [e["norm"] for e in metrics["epochs"]] == norms
    printed = capsys.readouterr().out
    assert ("note:" in printed) == bool(note)
    assert note in printed


def test_a_diverging_run_ends_with_one_line_and_changes_no_file(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text("of an earlier run")
    options = ["--lr", "1e30", "--norm", "none", "--init", "xavier"]
    status = train_lenet.main([*FEW, *options, "--out", str(tmp_path)])
    assert status == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "the loss of the none net is nan at step 2: try a lower --lr" in error
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "of an earlier run"


def test_a_failure_while_writing_changes_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk full")

    (tmp_path / "metrics.json").write_text("of an earlier run")
    monkeypatch.setattr(train_lenet, "plot", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        train_lenet.main([*FEW, "--no-compare", "--out", str(tmp_path)])
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "of an earlier run"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--norm", "layer"], "--norm"),
        (["--init", "ones"], "--init"),
        (["--epochs", "0"], "--epochs: must be at least 1, got '0'"),
        (["--epochs", "one"], "--epochs: must be an integer, got 'one'"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
        (["--limit", "0"], "--limit: must be at least 1"),
        (["--lr", "-1"], "--lr: must be positive and finite, got '-1'"),
        (["--lr", "nan"], "--lr: must be positive and finite, got 'nan'"),
        (["--lr", "x"], "--lr: must be a number, got 'x'"),
        (["--seed", "-1"], "--seed: must be between 0 and 2147483647"),
        (["--seed", "2147483648"], "--seed: must be between 0 and 2147483647"),
        (["--device", "tpu"], "'tpu'"),
        (["--device", "gpu:99"], "gpu:99"),
        (["--data", "nowhere"], "argument --data: 'nowhere' is neither one of auto, mnist"),
        (["--data", "{directory}"], "train-images-idx3-ubyte"),
        (["--out", "{file}"], "--out"),
        (["--out", "{file}/below"], "--out"),
        (["--surprise"], "--surprise"),
        (["--device", "cpu:0,cpu:0"], "'cpu:0,cpu:0' has a device twice"),
        (["--device", "cpu,auto"], "auto is one device, it cannot be in 'cpu,auto'"),
        (["--checkpoint-every", "0"], "--checkpoint-every: must be at least 1, got '0'"),
        (["--monitor", "records.txt"], "must end in .csv or .jsonl, got 'records.txt'"),
        (["--kvstore", "dist_async"], "--kvstore"),
        (["--kvstore", "dist_sync"], "needs the environment variables DMLC_ROLE"),
        (["--timeout", "1"], "--timeout: must be at least 2, got '1'"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_used_is_one_line_and_status_2(options, text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    options = [o.format(file=tmp_path / "file", directory=tmp_path / "directory") for o in options]
    try:
        status = train_lenet.main([*FEW, "--out", str(tmp_path / "out"), *options])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert text in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["tqdm", "matplotlib.figure", "rich.console"])
def test_a_missing_package_is_one_line(module, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "scripts.train_lenet")
    monkeypatch.delitem(sys.modules, "scratchbn.train.plot")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("scripts.train_lenet")
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert module in error
    assert install_command("cpu", "demo") in error


def test_a_process_of_a_job_must_be_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DMLC_ROLE", "worker")
    assert train_lenet.main([*FEW, "--out", str(tmp_path / "out")]) == 2
    assert "DMLC_ROLE is set: add --kvstore dist_sync, or unset it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_monitor_records_every_step_and_changes_nothing(tmp_path):
    values = []
    for name, options in (("plain", []), ("watched", ["--monitor", str(tmp_path / "all.jsonl")])):
        run_main(tmp_path / name, "--no-compare", *options)
        values.append(mx.nd.load(str(tmp_path / name / "lenet.params")))
    for name, value in values[0].items():
        np.testing.assert_array_equal(value.asnumpy(), values[1][name].asnumpy(), err_msg=name)
    records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [step for step in (1, 2, 3, 4, 5) for _ in range(3)]


def test_recalibrated_statistics_are_those_of_the_training_set(tmp_path, device, rng):
    pixels, labels = images = twenty_images(rng)
    net = build("scratch", "xavier", device)
    net.hybridize()
    run = start("scratch", net, 0.001)
    train(run, images, [np.arange(20)], 20, tmp_path)
    first = net[0](array(pixels, device, "float32")).asnumpy().astype("f8")
    batches = [(array(pixels, device, "float32"), array(labels, device, "float32"))]
    measured = read_values(run.evaluated(lambda: build("scratch", "xavier", device), batches))
    name = net[1].running_mean.name
    np.testing.assert_allclose(measured[name], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    name = net[1].running_var.name
    np.testing.assert_allclose(measured[name], first.var((0, 2, 3)), rtol=1e-4)
    moving = read_values(net)[name]
    assert np.abs(moving - measured[name]).max() > 0.1, "training keeps its own statistics"

    _, metrics = run_main(tmp_path, "--no-compare", "--recalibrate")
    assert metrics["options"]["recalibrate"] is True
    assert metrics["epochs"][0]["test_acc"] > 0.2


def test_help_says_what_the_learning_rate_equals(capsys):
    with pytest.raises(SystemExit) as ended:
        train_lenet.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0.001, equals 0.064 on the mean loss of 64 images" in text


def test_the_defaults_are_the_tutorials():
    options = train_lenet.build_parser().parse_args([])
    assert (options.batch_size, options.lr, options.epochs) == (64, 0.001, 1)
    assert (options.norm, options.init, options.hybridize) == ("scratch", "tutorial", True)
    assert train_lenet.NORMS["scratch"] is ScratchBatchNorm
    assert train_lenet.NORMS["builtin"] is nn.BatchNorm
