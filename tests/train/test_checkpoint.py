"""Runs that are killed, interrupted or damaged, and go on."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

from scratchbn.train import (
    CheckpointError,
    Checkpoints,
    Run,
    Session,
    checkpoint,
    read_values,
    write_values,
)

import mxnet as mx
import numpy as np
import pytest
from helpers import REPOSITORY, array

from models.lenet import initialize, lenet
from scripts import train_lenet

SCRIPT = [sys.executable, str(REPOSITORY / "scripts" / "train_lenet.py")]
FEW = ["--data", "sample", "--limit", "240", "--batch-size", "16", "--device", "cpu"]
STEPS = 2 * 15 * 2  # epochs, batches, nets
TWO_EPOCHS = [*FEW, "--epochs", "2"]


def run(out, *options):
    return train_lenet.main([*TWO_EPOCHS, "--out", str(out), *options])


def parameters(out):
    return {n: v.asnumpy() for n, v in mx.nd.load(str(out / "lenet.params")).items()}


def metrics_without_seconds(out):
    metrics = json.loads((out / "metrics.json").read_text())
    for epoch in metrics["epochs"]:
        del epoch["seconds"]
    return metrics["epochs"], metrics["crosscheck"]


def assert_same_result(out, expected):
    ours, theirs = parameters(out), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert metrics_without_seconds(out) == metrics_without_seconds(expected)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing happened to, and that saved no checkpoint."""
    out = tmp_path_factory.mktemp("unbroken")
    assert run(out) == 0
    return out


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """One of two epochs, with checkpoints of steps 10, 20 and 30."""
    out = tmp_path_factory.mktemp("partial")
    options = [*FEW, "--epochs", "1", "--checkpoint-every", "10", "--out", str(out)]
    assert train_lenet.main(options) == 0
    return out


@pytest.fixture
def copy(partial, tmp_path):
    return shutil.copytree(partial, tmp_path / "copy")


def start(out, *options):
    return subprocess.Popen(
        [*SCRIPT, *TWO_EPOCHS, "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(out, process, step):
    folder = out / "checkpoints"
    while process.poll() is None:
        if any(int(name[5:]) >= step for name in listed(folder)):
            return
        time.sleep(0.002)


def listed(folder):
    try:
        return sorted(name for name in os.listdir(folder) if name.startswith("step-"))
    except FileNotFoundError:
        return []


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(unbroken, tmp_path):
    moments = random.Random(6)
    for after_step in (1, 16, 31):  # before, in and after the twin's first epoch
        process = start(tmp_path, "--checkpoint-every", "1", "--resume")
        wait_for_checkpoint(tmp_path, process, after_step)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert run(tmp_path, "--checkpoint-every", "1", "--resume") == 0
    assert_same_result(tmp_path, unbroken)
    left = sorted(os.listdir(tmp_path / "checkpoints"))
    assert left == [f"step-{step:09d}" for step in range(STEPS - 2, STEPS + 1)]


def test_ctrl_c_saves_and_prints_the_command_that_goes_on(unbroken, tmp_path):
    process = start(tmp_path, "--checkpoint-every", "7")
    wait_for_checkpoint(tmp_path, process, 7)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    *_, saved, command = printed.strip().splitlines()
    path = saved.removeprefix("interrupted; saved ")
    assert path == str(tmp_path / "checkpoints" / listed(tmp_path / "checkpoints")[-1])
    assert not (tmp_path / "metrics.json").exists()

    command = command.removeprefix("to go on: ")
    resumed = subprocess.run(
        shlex.split(command), capture_output=True, text=True, timeout=60, check=True
    )
    assert f"resumed from {path}" in resumed.stdout
    assert_same_result(tmp_path, unbroken)


def test_ctrl_c_while_a_net_is_measured_saves_too(unbroken, tmp_path, monkeypatch):
    point = Session.interruption_point  # after each batch of an evaluation

    def interrupted(session):
        os.kill(os.getpid(), signal.SIGINT)
        point(session)

    monkeypatch.setattr(Session, "interruption_point", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert run(tmp_path) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert listed(tmp_path / "checkpoints") == ["step-000000015"]
    monkeypatch.undo()
    assert run(tmp_path, "--resume") == 0
    assert_same_result(tmp_path, unbroken)


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(unbroken, copy, capsys):
    assert run(copy, "--resume") == 0
    assert f"resumed from {copy}/checkpoints/step-000000030" in capsys.readouterr().out
    assert_same_result(copy, unbroken)


def test_resume_without_a_checkpoint_starts_afresh(unbroken, tmp_path, capsys):
    assert run(tmp_path, "--resume") == 0
    assert "starting afresh" in capsys.readouterr().out
    assert_same_result(tmp_path, unbroken)
    assert not (tmp_path / "checkpoints").exists()


def truncate(folder):
    file = folder / "scratch.npz"
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(folder):
    file = folder / "builtin.states"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def remove_a_file(folder):
    (folder / "scratch.json").unlink()


def remove_the_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder):
    os.truncate(folder / "manifest.json", 100)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "scratch.npz has changed"),
        (flip_a_bit, "builtin.states has changed"),
        (remove_a_file, "scratch.json: No such file"),
        (remove_the_manifest, "no manifest"),
        (cut_the_manifest, "no manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(damage, reason, copy):
    folder = copy / "checkpoints"
    identity = json.loads((folder / "step-000000030" / "manifest.json").read_text())["run"]
    damage(folder / "step-000000030")
    before = contents(copy)
    said = []
    assert Checkpoints(folder, identity).newest(said.append) == folder / "step-000000020"
    assert len(said) == 1
    assert reason in said[0]
    assert contents(copy) == before


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(unbroken, copy, capsys):
    truncate(copy / "checkpoints" / "step-000000030")
    assert run(copy, "--resume", "--checkpoint-every", "10") == 0
    printed = capsys.readouterr().out
    assert "step-000000030 is damaged (scratch.npz has changed), passed over" in printed
    assert f"resumed from {copy}/checkpoints/step-000000020" in printed
    assert_same_result(copy, unbroken)


def test_without_a_good_checkpoint_nothing_is_touched(copy, capsys):
    for folder in (copy / "checkpoints").iterdir():
        truncate(folder)
    before = contents(copy)
    assert run(copy, "--resume") == 2
    assert "none of the 3 checkpoints" in capsys.readouterr().err
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--seed", "2"], "--seed 1, now 2"),
        (["--lr", "0.002"], "--lr 0.001, now 0.002"),
        (["--batch-size", "17"], "--batch-size 16, now 17"),
        (["--init", "xavier"], "--init 'tutorial', now 'xavier'"),
        (["--norm", "builtin"], "--norm 'scratch', now 'builtin'"),
        (["--no-compare"], "--compare True, now False"),
        (["--no-hybridize"], "--no-hybridize False, now True"),
        (["--recalibrate"], "--recalibrate False, now True"),
        (["--limit", "230"], "images "),
    ],
    ids=" ".join,
)
def test_a_checkpoint_of_another_run_is_refused(options, reason, partial, capsys):
    before = contents(partial)
    assert run(partial, "--resume", *options) == 2
    error = capsys.readouterr().err
    assert "step-000000030 is of another run: " in error
    assert reason in error
    assert contents(partial) == before


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_new_ones(partial, capsys):
    before = contents(partial)
    assert run(partial, "--checkpoint-every", "5") == 2
    assert "add --resume to go on from them, or choose another --out" in capsys.readouterr().err
    assert contents(partial) == before


def test_ctrl_c_saves_nothing_among_the_checkpoints_of_another_run(copy, monkeypatch, capsys):
    before = contents(copy)
    step = Run.step

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(Run, "step", interrupted)
    assert run(copy, "--seed", "5") == 130
    assert "no checkpoint was saved: " in capsys.readouterr().err
    assert contents(copy) == before


def test_a_checkpoint_beyond_the_last_epoch_is_refused(unbroken, tmp_path, capsys):
    assert run(tmp_path, "--checkpoint-every", "100") == 0
    before = contents(tmp_path)
    options = [*FEW, "--epochs", "1", "--resume", "--out", str(tmp_path)]
    assert train_lenet.main(options) == 2
    assert "is beyond the end of --epochs 1" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert run(tmp_path, "--resume") == 0
    assert_same_result(tmp_path, unbroken)


@pytest.mark.parametrize(
    ("names", "orders", "options", "text"),
    [
        ([], [[0]], {}, r"runs must be at least one, of different names, got \[\]"),
        (["a", "a"], [[0]], {}, r"got \['a', 'a'\]"),
        (["a"], [], {}, "orders must hold an order for each epoch"),
        (["a"], [[0]], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (["a"], [[0]], {"every": 0}, "every must be at least 1, got 0"),
    ],
)
def test_a_session_refuses(names, orders, options, text, device, tmp_path):
    runs = [run_of(name, build("none", [device]), 0.1) for name in names]
    options = {"batch_size": 1, "identity": {}, **options}
    with pytest.raises(ValueError, match=text):
        Session(runs, [np.array(order) for order in orders], folder=tmp_path, **options)


def test_a_run_needs_something_to_train():
    with pytest.raises(ValueError, match="net must have parameters to train, got Flatten"):
        run_of("empty", mx.gluon.nn.Flatten(), 0.1)


# --- the files ---------------------------------------------------------------------------------


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


# --- several devices ---------------------------------------------------------------------------


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


def build(norm, devices, dtype="float32"):
    net = lenet(train_lenet.NORMS[norm], prefix="lenet_")
    net.cast(dtype)
    initialize(net, "xavier", devices)
    net(mx.nd.zeros((1, 1, 28, 28), ctx=devices[0], dtype=dtype))
    return net


def build64(norm, devices):
    """A LeNet in float64."""
    return build(norm, devices, "float64")


def run_of(name, net, lr):
    loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    return Run(name, net, loss, optimizer_params={"learning_rate": lr})


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
