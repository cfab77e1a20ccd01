"""The training script, run for real on a few digits of the sample."""

from __future__ import annotations

import json

from scratchbn import ScratchBatchNorm
from scratchbn.train import read_values, write_values

import mxnet as mx
import numpy as np
import pytest
from helpers import array, last_json, run_python, run_script, without_scratchbn
from lenet_runs import FEW, FILES, KINDS, SYMBOLS, build, run_main, start, train, twenty_images
from mxnet import autograd, gluon

from models.lenet import lenet
from scripts import train_lenet


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run in a process of its own, started elsewhere than in the repository."""
    directory = tmp_path_factory.mktemp("run")
    options = [*FEW, "--epochs", "2", "--debug", "--out", "a/b"]
    process = run_script("train_lenet.py", options, directory)
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
