"""The training script, run for real on a few digits of the sample."""

from __future__ import annotations

import json
import math
import subprocess
import sys

from scratchbn import ScratchBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import REPOSITORY, array, last_json, run_python, without_scratchbn
from mxnet import autograd, gluon
from mxnet.gluon import nn

from models.lenet import lenet

sys.path.insert(0, str(REPOSITORY / "scripts"))
import _training
import train_lenet

FILES = ["curves.png", "lenet-0000.params", "lenet-symbol.json", "lenet.params", "metrics.json"]
FEW = ["--data", "sample", "--limit", "200", "--batch-size", "48", "--device", "cpu"]
GROUPS = {
    "outputs",
    "gradients",
    "parameters",
    "running_statistics",
    "running_statistics_formula",
}


def run_main(out, *options):
    """Run on 200 digits; return the exit status and the metrics."""
    status = train_lenet.main([*FEW, "--out", str(out), *options])
    return status, json.loads((out / "metrics.json").read_text())


def twenty_images(rng):
    """Noise, two images for each label."""
    return _training.Images(rng.uniform(size=(20, 1, 28, 28)).astype("f4"), np.arange(20) % 10)


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
    assert check["failed"] == []
    assert set(check["max_abs_diff"]) == set(check["tensors"]) == GROUPS
    for group, largest in check["max_abs_diff"].items():
        assert largest == max(check["tensors"][group].values())
    # The two layers are different code: agreement to the last bit would mean nothing was compared.
    assert 0 < check["max_abs_diff"]["gradients"] < 1e-9
    assert 0 < check["max_abs_diff"]["running_statistics"] < 1e-5


def test_every_tensor_is_cross_checked(finished):
    tensors = json.loads((finished[1] / "metrics.json").read_text())["crosscheck"]["tensors"]
    parameters = lenet(prefix="lenet_").collect_params()
    statistics = {name for name in parameters if "running" in name}
    trained = set(parameters) - statistics
    expected = {
        "outputs": {"inference", "training", "loss"},
        "gradients": trained | {"data"},
        "parameters": trained,
        "running_statistics": statistics,
        "running_statistics_formula": statistics,
    }
    for group, names in expected.items():
        both = {f"{mode} {name}" for mode in ("eager", "hybridized") for name in names}
        assert set(tensors[group]) == both, group


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
    for quantity in ("batch mean", "batch variance", "running mean", "running var", "gamma"):
        assert any(quantity in line for line in lines), quantity
    table = process.stdout[process.stdout.index("LeNet after 2 epochs") :]
    for row in ("scratch", "builtin", "seconds", "outputs", "gradients", "running statistics"):
        assert row in table, row
    assert "Traceback" not in process.stderr
    assert "batch/s" not in process.stderr, "a progress bar in a log"


def test_the_exported_symbol_needs_only_mxnet(finished, tmp_path, device, rng):
    _, out = finished
    images = rng.uniform(size=(5, 1, 28, 28)).astype("f4")
    np.save(tmp_path / "images.npy", images)
    process = run_python(
        """
import json, sys
import mxnet as mx, numpy as np
out, images = sys.argv[1:]
net = mx.gluon.SymbolBlock.imports(out + "/lenet-symbol.json", ["data"], out + "/lenet-0000.params")
scores = net(mx.nd.array(np.load(images)))
scratchbn = [name for name in sys.modules if name.startswith(("scratchbn", "models"))]
print(json.dumps({"scores": scores.asnumpy().tolist(), "scratchbn": scratchbn}))
""",
        out,
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
    monkeypatch.setitem(_training.NORMS, "builtin", ScratchBatchNorm)
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


def test_an_epoch_is_plain_sgd_on_the_summed_loss(device, rng):
    images = twenty_images(rng)
    order = rng.permutation(20)
    net = _training.build("builtin", "xavier", [device])
    other = _training.build("builtin", "tutorial", [device], like=net)
    run = _training.start(net, "builtin", 0.01, [device], hybridize=True)
    epoch = _training.train_epoch(run, images, images, order, 8)

    means = []
    for chosen in (order[:8], order[8:16], order[16:]):
        x = array(images.pixels[chosen], device, "float32")
        y = array(images.labels[chosen], device, "float32")
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
    assert epoch.loss == run.losses[-1]
    expected = _training.read_values(other)
    for name, value in _training.read_values(net).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    scores = other(array(images.pixels, device, "float32")).asnumpy()
    assert epoch.train_acc == pytest.approx((scores.argmax(1) == images.labels).mean(), abs=0.051)


def test_the_moving_average_goes_on_in_the_next_epoch(device, rng):
    images = twenty_images(rng)
    net = _training.build("scratch", "tutorial", [device])
    run = _training.start(net, "scratch", 0.001, [device], hybridize=False)
    for _ in range(2):
        _training.train_epoch(run, images, images, np.arange(20), 10)
    assert len(run.losses) == 4
    assert [e.epoch for e in run.epochs] == [1, 2]
    assert np.abs(np.diff(run.losses)).max() < 0.05, "the average was seeded again"


def wrong(**options):
    return lambda **_: ScratchBatchNorm(**options)


@pytest.mark.parametrize(
    ("broken", "groups", "tensor"),
    [
        ({"epsilon": 1e-4}, GROUPS - {"running_statistics_formula"}, "outputs: eager "),
        (
            {"momentum": 0.8},
            {"running_statistics", "running_statistics_formula"},
            "running statistics: eager lenet_batchnorm",
        ),
        (
            {"unbiased_variance": True},
            {"running_statistics", "running_statistics_formula"},
            "_running_var differs by",
        ),
        (
            {"scale": False},
            GROUPS - {"running_statistics_formula"},
            "_gamma differs by inf",
        ),
    ],
    ids=["epsilon", "momentum", "variance", "gamma"],
)
def test_a_broken_layer_fails_the_cross_check(
    broken, groups, tensor, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(_training.NORMS, "scratch", wrong(**broken))
    status, metrics = run_main(tmp_path)
    assert status == 1
    assert metrics["crosscheck"]["ok"] is False
    assert {text.split(":")[0] for text in metrics["crosscheck"]["failed"]} == groups
    error = capsys.readouterr().err
    assert "the cross-check failed" in error
    assert tensor in error
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES


def test_a_difference_that_is_not_a_number_fails():
    difference = _training.Difference("outputs", "eager loss", math.nan, math.nan)
    fine = [_training.Difference(group, "eager x", 0.0, 0.0) for group in GROUPS]
    check = _training.CrossCheck([*fine, difference])
    assert not check.ok
    assert check.failed == [difference]
    assert check.worst()["outputs"] is difference
    assert math.isnan(check.max_abs_diff()["outputs"])
    assert train_lenet._cross_check_metrics(check)["max_abs_diff"]["outputs"] is None


def test_large_values_may_differ_more():
    difference = _training.Difference("outputs", "eager loss", 1e-9, 1e-12)
    assert difference.ok
    assert not _training.Difference("outputs", "eager loss", 1e-9, 1e-9).ok


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
    monkeypatch.setattr(train_lenet, "_draw_curves", fail)
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


@pytest.mark.parametrize("module", ["tqdm", "matplotlib.figure", "rich.table"])
def test_a_missing_package_is_one_line(module, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "_training")
    monkeypatch.setitem(sys.modules, module, None)
    assert train_lenet.main([*FEW, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert module in error
    assert "pip install 'scratchbn[cpu,demo]'" in error
    assert not (tmp_path / "out").exists()


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
    images = twenty_images(rng)
    net = _training.build("scratch", "xavier", [device])
    run = _training.start(net, "scratch", 0.001, [device], hybridize=True)
    order = np.arange(20)
    _training.train_epoch(run, images, images, order, 20, recalibrated=True)
    first = net[0](array(images.pixels, device, "float32")).asnumpy().astype("f8")
    measured = _training.read_values(run.measured)
    name = net[1].running_mean.name
    np.testing.assert_allclose(measured[name], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    name = net[1].running_var.name
    np.testing.assert_allclose(measured[name], first.var((0, 2, 3)), rtol=1e-4)
    moving = _training.read_values(net)[name]
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
    assert _training.NORMS["scratch"] is ScratchBatchNorm
    assert _training.NORMS["builtin"] is nn.BatchNorm
