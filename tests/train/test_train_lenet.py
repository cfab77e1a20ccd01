"""The training script, run for real on a few digits of the sample."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace

from scratchbn import ScratchBatchNorm
from scratchbn.parity import Report, Row
from scratchbn.train import Run, Session, read_values, write_values

import mxnet as mx
import numpy as np
import pytest
from helpers import REPOSITORY, array, last_json, run_python, without_scratchbn
from mxnet import autograd, gluon
from mxnet.gluon import nn

from models.lenet import initialize, lenet
from scripts import train_lenet

SYMBOLS = ["lenet-infer-symbol.json", "lenet-symbol.json"]
FILES = sorted(["curves.png", "lenet-0000.params", *SYMBOLS, "lenet.params", "metrics.json"])
FEW = ["--data", "sample", "--limit", "200", "--batch-size", "48", "--device", "cpu"]
KINDS = {"output", "input gradient", "parameter gradient", "statistic"}


def run_main(out, *options):
    """Run on 200 digits; return the exit status and the metrics."""
    status = train_lenet.main([*FEW, "--out", str(out), *options])
    return status, json.loads((out / "metrics.json").read_text())


def twenty_images(rng):
    """Noise, two images for each label: pixels and labels."""
    return rng.uniform(size=(20, 1, 28, 28)).astype("f4"), np.arange(20, dtype="f4") % 10


def build(norm, init, device):
    net = lenet(train_lenet.NORMS[norm], prefix="lenet_")
    initialize(net, init, device)
    net(mx.nd.zeros((1, 1, 28, 28), ctx=device))
    return net


def start(norm, net, lr):
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    return Run(norm, net, loss, optimizer_params={"learning_rate": lr})


def train(run, images, orders, batch_size, folder):
    """Train as the script does; return what each epoch gave."""
    with Session([run], orders, batch_size, folder, {}, progress=False) as session:
        for _, _, batches in session.epochs():
            for batch in batches:
                run.step(images[0][batch], images[1][batch])
            run.end_epoch()
    return run.epochs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run in a process of its own, started elsewhere than in the repository."""
    directory = tmp_path_factory.mktemp("run")
    command = [sys.executable, str(REPOSITORY / "scripts" / "train_lenet.py")]
    process = subprocess.run(
        [*command, *FEW, "--epochs", "2", "--debug", "--out", "a/b"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process, directory / "a" / "b"


def test_it_writes_its_files_and_nothing_else(finished):
    _, out = finished
    assert sorted(file.name for file in out.iterdir()) == FILES
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics(finished):
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    assert metrics["data"]["name"] == "sample"
    assert (metrics["data"]["train"], metrics["data"]["test"]) == (200, 200)
    assert metrics["device"] == "cpu(0)"
    assert [(e["epoch"], e["norm"]) for e in metrics["epochs"]] == [
        (1, "scratch"),
        (1, "builtin"),
        (2, "scratch"),
        (2, "builtin"),
    ]
    for epoch in metrics["epochs"]:
        assert set(epoch) == {"epoch", "norm", "loss", "train_acc", "test_acc", "seconds"}
        assert 0 < epoch["loss"] < 2.5
        assert 0 <= epoch["train_acc"] <= 1
        assert 0 <= epoch["test_acc"] <= 1
        assert epoch["seconds"] > 0
    check = metrics["crosscheck"]
    assert check["ok"] is True
    assert all(row["ok"] for row in check["rows"])
    assert set(check["max_abs_diff"]) == {row["kind"] for row in check["rows"]} == KINDS
    for kind, largest in check["max_abs_diff"].items():
        assert largest == max(row["absolute"] for row in check["rows"] if row["kind"] == kind)
    # The two layers are different code: agreement to the last bit would mean nothing was compared.
    assert 0 < check["max_abs_diff"]["parameter gradient"] < 1e-9
    assert 0 < check["max_abs_diff"]["statistic"] < 1e-5


def test_every_tensor_is_cross_checked(finished):
    rows = json.loads((finished[1] / "metrics.json").read_text())["crosscheck"]["rows"]
    parameters = lenet()._collect_params_with_prefix()
    statistics = {name for name in parameters if "running" in name}
    expected = {
        "output": {"output"},
        "input gradient": {"input"},
        "parameter gradient": set(parameters) - statistics,
        "statistic": statistics,
    }
    for mode in ("eager", "hybrid"):
        for phase in ("train", "inference", "frozen"):
            compared = [row for row in rows if (row["mode"], row["phase"]) == (mode, phase)]
            for kind, names in expected.items():
                assert {row["tensor"] for row in compared if row["kind"] == kind} == names, kind


def test_what_it_prints(finished):
    process, _ = finished
    lines = process.stdout.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 4
    assert all(
        word in line for line in epochs for word in ("loss", "train accuracy", "test accuracy")
    )
    for shape in ("(48, 20, 13, 13)", "(48, 50, 4, 4)", "(48, 800)", "(48, 128)", "(48, 10)"):
        assert any(line.endswith(f"-> {shape}") for line in lines), shape
    for quantity in ("batch mean", "batch var", "running mean", "running var", "gamma"):
        assert any(quantity in line for line in lines), quantity
    table = process.stdout[process.stdout.index("LeNet after 2 epochs") :]
    for row in ("scratch", "builtin", "seconds", *KINDS):
        assert row in table, row
    assert "Traceback" not in process.stderr
    assert "batch/s" not in process.stderr, "a progress bar in a log"


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_the_exported_symbols_need_only_mxnet(symbol, finished, tmp_path, device, rng):
    _, out = finished
    images = rng.uniform(size=(5, 1, 28, 28)).astype("f4")
    np.save(tmp_path / "images.npy", images)
    process = run_python(
        """
import json, sys
import mxnet as mx, numpy as np
symbol, params, images = sys.argv[1:]
net = mx.gluon.SymbolBlock.imports(symbol, ["data"], params)
scores = net(mx.nd.array(np.load(images)))
scratchbn = [name for name in sys.modules if name.startswith(("scratchbn", "models"))]
print(json.dumps({"scores": scores.asnumpy().tolist(), "scratchbn": scratchbn}))
""",
        out / symbol,
        out / "lenet-0000.params",
        tmp_path / "images.npy",
        env=without_scratchbn(),
    )
    answer = last_json(process)
    assert answer["scratchbn"] == []
    net = lenet()
    net.load_parameters(str(out / "lenet.params"), ctx=device)
    expected = net(array(images, device, "float32")).asnumpy()
    np.testing.assert_allclose(answer["scores"], expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_debug_changes_no_result(tmp_path):
    values = []
    for name, options in (("plain", []), ("debug", ["--debug"])):
        run_main(tmp_path / name, "--no-compare", *options)
        values.append(mx.nd.load(str(tmp_path / name / "lenet.params")))
    assert "1.running_mean" in values[0]
    for name, value in values[0].items():
        np.testing.assert_allclose(
            value.asnumpy(), values[1][name].asnumpy(), rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_eager_and_hybridized_training_agree(finished, tmp_path):
    _, metrics = run_main(tmp_path, "--epochs", "2", "--no-hybridize")
    hybridized = json.loads((finished[1] / "metrics.json").read_text())
    for one, other in zip(hybridized["epochs"], metrics["epochs"]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_the_twin_starts_alike_and_sees_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setitem(train_lenet.NORMS, "builtin", ScratchBatchNorm)
    status, metrics = run_main(tmp_path, "--epochs", "2")
    assert status == 0
    for one, other in zip(metrics["epochs"][::2], metrics["epochs"][1::2]):
        assert (one["norm"], other["norm"]) == ("scratch", "builtin")
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["test_acc"] == pytest.approx(other["test_acc"], abs=0.01)


def test_the_seed_decides(tmp_path):
    losses = []
    for i, seed in enumerate((1, 1, 2)):
        _, metrics = run_main(tmp_path / str(i), "--no-compare", "--seed", str(seed))
        losses.append(metrics["epochs"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-6)


def test_an_epoch_is_plain_sgd_on_the_summed_loss(device, rng, tmp_path):
    pixels, labels = images = twenty_images(rng)
    order = rng.permutation(20)
    net = build("builtin", "xavier", device)
    other = build("builtin", "tutorial", device)
    write_values(other, read_values(net))
    net.hybridize()
    run = start("builtin", net, 0.01)
    (epoch,) = train(run, images, [order], 8, tmp_path)

    means = []
    for chosen in (order[:8], order[8:16], order[16:]):
        x = array(pixels[chosen], device, "float32")
        y = array(labels[chosen], device, "float32")
        with autograd.record():
            losses = gluon.loss.SoftmaxCrossEntropyLoss()(other(x), y)
            total = losses.sum()
        total.backward()
        means.append(losses.asnumpy().mean())
        for parameter in other.collect_params().values():
            if parameter.grad_req != "null":
                parameter.set_data(parameter.data() - 0.01 * parameter.grad())
    averages = [means[0]]
    for mean in means[1:]:
        averages.append(0.99 * averages[-1] + 0.01 * mean)

    np.testing.assert_allclose(run.losses, averages, rtol=1e-4)
    assert epoch["loss"] == run.losses[-1]
    expected = read_values(other)
    for name, value in read_values(net).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_accuracy_is_that_of_the_saved_net(finished, device):
    out = finished[1]
    dataset = train_lenet.load("sample")
    net = lenet()
    net.load_parameters(str(out / "lenet.params"), ctx=device)
    *_, last, _ = json.loads((out / "metrics.json").read_text())["epochs"]
    assert last["norm"] == "scratch"
    for part in ("train", "test"):
        images, labels = (getattr(dataset, f"{part}_{name}")[:200] for name in ("images", "labels"))
        scores = net(array(images[:, np.newaxis] / 255, device, "float32")).asnumpy()
        assert last[f"{part}_acc"] == pytest.approx((scores.argmax(1) == labels).mean(), abs=0.011)


def test_the_moving_average_goes_on_in_the_next_epoch(device, rng, tmp_path):
    images = twenty_images(rng)
    run = start("scratch", build("scratch", "tutorial", device), 0.001)
    train(run, images, [np.arange(20)] * 2, 10, tmp_path)
    assert len(run.losses) == 4
    assert [e["epoch"] for e in run.epochs] == [1, 2]
    assert np.abs(np.diff(run.losses)).max() < 0.05, "the average was seeded again"


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
        (["--data", "nowhere"], "'nowhere'"),
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
    assert "pip install 'scratchbn[cpu,demo]'" in error


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
