"""Runs that are interrupted and resumed, and checkpoints that cannot be."""

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
    Checkpoints,
    Run,
    Session,
)

import mxnet as mx
import numpy as np
import pytest
from checkpointed_runs import (
    FEW,
    TWO_EPOCHS,
    assert_same_result,
    build,
    contents,
    listed,
    run,
    run_of,
)
from helpers import REPOSITORY

from scripts import train_lenet

SCRIPT = [sys.executable, str(REPOSITORY / "scripts" / "train_lenet.py")]
STEPS = 2 * 15 * 2  # epochs, batches, nets


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
