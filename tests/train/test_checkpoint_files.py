"""The files of a checkpoint, and those of several devices."""

from __future__ import annotations

import json
import os
import signal

from scratchbn.train import (
    CheckpointError,
    Checkpoints,
    Run,
    checkpoint,
    read_values,
    write_values,
)

import mxnet as mx
import numpy as np
import pytest
from checkpointed_runs import assert_same_result, build, contents, listed, run, run_of
from helpers import array


def writer(text):
    return lambda folder: (folder / "file").write_text(text)


def test_the_newest_three_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "all", {"seed": 1})
    assert checkpoints.steps() == []
    for step in (5, 12, 30, 31):
        assert checkpoints.save(step, writer(f"{step}")) == checkpoints.path(step)
    assert checkpoints.steps() == [12, 30, 31]
    newest = checkpoints.newest(pytest.fail)
    assert (newest / "file").read_text() == "31"


def test_later_checkpoints_do_not_crowd_out_an_earlier_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    for step in (100, 200, 300):
        checkpoints.save(step, writer("good"))
        (checkpoints.path(step) / "file").write_text("damaged")
    checkpoints.save(50, writer("good"))
    assert checkpoints.newest(lambda _: None) == checkpoints.path(50)


def test_a_failing_save_leaves_what_was_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, writer("good"))
    before = contents(tmp_path)

    def fail(folder):
        (folder / "file").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(2, fail)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["step-000000001"]


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleared(tmp_path):
    left_over = tmp_path / ".unfinished-abc"
    left_over.mkdir()
    (left_over / "manifest.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path, {})
    assert checkpoints.newest(pytest.fail) is None
    checkpoints.save(1, writer("good"))
    assert sorted(os.listdir(tmp_path)) == ["step-000000001"]


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    synced = []
    sync = checkpoint._sync
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (synced.append(path.name), sync(path)))
    Checkpoints(tmp_path, {}).save(3, writer("x"))
    assert synced[:2] == ["file", "manifest.json"]
    assert synced[-1] == tmp_path.name
    manifest = json.loads((tmp_path / "step-000000003" / "manifest.json").read_text())
    assert manifest["sha256"]["file"].startswith("2d711642b726b044")  # echo -n x | sha256sum


@pytest.mark.parametrize("hybridize", [False, True], ids=["eager", "hybridized"])
@pytest.mark.parametrize("norm", ["scratch", "builtin"])
def test_two_devices_add_gradients_and_keep_statistics(norm, hybridize, device, second_device, rng):
    devices = [device, second_device]
    pixels, labels = rng.uniform(size=(6, 1, 28, 28)), np.arange(6.0)
    net = build64(norm, devices)
    initial = read_values(net)
    lr = 2**-7  # exact in float32, as which the optimizer has it
    net.hybridize(active=hybridize)
    run = run_of(norm, net, lr)
    # 5 images, 3 and 2 of them on each device; then a batch that leaves one device without any.
    batches = [np.array([4, 0, 5, 2, 1]), np.array([3])]
    losses = [run.step(pixels[batch], labels[batch]) for batch in batches]

    copies = [build64(norm, [device]) for _ in devices]
    for copy in copies:
        write_values(copy, initial)
    expected_losses = []
    for parts in ([batches[0][:3], batches[0][3:]], [batches[1]]):
        values = []
        for copy, part in zip(copies, parts):
            x, y = (array(v[part], device) for v in (pixels, labels))
            with mx.autograd.record():
                loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()(copy(x), y)
            loss.backward()
            values += loss.asnumpy().tolist()
        expected_losses.append(np.mean(values))
        mx.nd.waitall()
        used = copies[: len(parts)]
        for same in zip(*(parameters_of(copy, trained=True) for copy in copies)):
            gradient = sum(p.grad().asnumpy() for p, _ in zip(same, used))
            value = array(same[0].data().asnumpy() - lr * gradient, device)
            for parameter in same:
                parameter.set_data(value)

    np.testing.assert_allclose(losses, expected_losses, rtol=1e-12)
    mx.nd.waitall()
    for on, copy in zip(devices, copies):
        expected = read_values(copy)
        for name, parameter in net.collect_params().items():
            np.testing.assert_allclose(
                parameter.data(on).asnumpy(), expected[name], rtol=1e-9, atol=1e-13, err_msg=name
            )
    averages = run.averages()
    for parameter in parameters_of(net, trained=False):
        one, other = (parameter.data(on).asnumpy() for on in devices)
        assert np.abs(one - other).max() > 1e-4
        np.testing.assert_allclose(averages[parameter.name], (one + other) / 2, rtol=1e-15)


def build64(norm, devices):
    """A LeNet in float64."""
    return build(norm, devices, "float64")


def parameters_of(net, trained):
    return [p for p in net.collect_params().values() if (p.grad_req != "null") == trained]


def test_what_is_measured_and_saved_has_the_average_of_the_statistics(device, second_device, rng):
    devices = [device, second_device]
    pixels, labels = rng.uniform(size=(20, 1, 28, 28)).astype("f4"), np.arange(20.0) % 10
    net = build("scratch", devices)
    net.hybridize()
    run = run_of("scratch", net, 0.001)
    for i in range(0, 20, 7):
        run.step(pixels[i : i + 7], labels[i : i + 7])
    measured = run.evaluated(lambda: build("scratch", [device]))
    assert measured is not net
    for name, parameter in measured.collect_params().items():
        assert parameter.list_ctx() == [device]
        copies = [copy.asnumpy() for copy in net.collect_params()[name].list_data()]
        np.testing.assert_allclose(parameter.data().asnumpy(), np.mean(copies, 0), rtol=1e-6)
        if "running" in name:
            assert np.abs(copies[0] - copies[1]).max() > 0, "each device keeps its own"
        else:
            np.testing.assert_array_equal(*copies, err_msg=name)


def test_a_run_on_two_devices_goes_on_with_the_statistics_of_each(tmp_path, monkeypatch):
    options = ["--device", "cpu:0,cpu:1", "--no-compare", "--batch-size", "33"]
    assert run(tmp_path / "unbroken", *options) == 0
    steps = []
    step = Run.step

    def interrupted(*arguments):
        steps.append(0)
        if len(steps) == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(Run, "step", interrupted)
    assert run(tmp_path / "broken", *options) == 130
    monkeypatch.undo()
    assert listed(tmp_path / "broken" / "checkpoints") == ["step-000000011"]
    assert run(tmp_path / "broken", *options, "--resume") == 0
    assert_same_result(tmp_path / "broken", tmp_path / "unbroken")
