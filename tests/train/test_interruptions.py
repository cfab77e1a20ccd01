"""Signals, disks that refuse, and machines that change: a trained net is never lost."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from scratchbn.launch import launch
from scratchbn.train import Interrupted, Run, Session, WriteError
from scratchbn.train.results import write_or_elsewhere

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import loss, nn

from scripts import train_lenet

SCRIPT = [sys.executable, str(Path(train_lenet.__file__))]
FEW = ["--data", "sample", "--limit", "96", "--batch-size", "16", "--no-compare"]


def line(devices=None):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.BatchNorm(in_channels=1), nn.Dense(1, in_units=1))
    net.initialize(mx.init.One(), ctx=devices or [mx.cpu()])
    return Run("line", net, loss.L2Loss(), optimizer_params={"learning_rate": 0.01})


def train(folder, run, *, epochs=2, before_step=lambda step: None, said=None, **options):
    """Train on 8 numbers, 2 at a time."""
    x = np.arange(8, dtype=np.float32)[:, np.newaxis]
    orders = [np.arange(8)] * epochs
    say = (lambda line: None) if said is None else said.append
    with Session([run], orders, 2, folder, {}, say=say, progress=False, **options) as session:
        for run, _, batches in session.epochs():
            for batch in batches:
                before_step(len(run.losses))
                run.step(x[batch], x[batch, 0])
            run.end_epoch()
    return session


@pytest.fixture
def second(tmp_path, monkeypatch):
    """The directory for temporary files."""
    place = tmp_path / "second"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def block(folder):
    """Make a directory one that nobody can write to: root can, whatever its mode."""
    folder.parent.mkdir(exist_ok=True, parents=True)
    folder.write_text("a file in the place of a directory")


def test_a_refused_checkpoint_is_said_once_and_written_when_it_can_be(tmp_path, second):
    folder, said = tmp_path / "checkpoints", []

    def step(number):
        if number == 0:
            block(folder)
        if number == 6:
            folder.unlink()

    session = train(folder, line(), before_step=step, said=said, every=2)
    assert session.unsaved is None
    assert [line for line in said if "cannot write" in line] == said
    assert len(said) == 1
    assert "step-000000002: Not a directory; training goes on with the nets in memory" in said[0]
    assert sorted(os.listdir(folder)) == ["step-000000008"]
    assert not list(second.iterdir())


def test_a_disk_that_is_full_to_the_end_leaves_the_nets_in_a_second_place(
    tmp_path, second, monkeypatch
):
    folder, said, run = tmp_path / "checkpoints", [], line()
    save = Run.save

    def full(self, place, statistics=None):
        if second not in place.parents:
            raise OSError(28, "No space left on device")
        save(self, place, statistics)

    monkeypatch.setattr(Run, "save", full)
    session = train(folder, run, said=said, every=2)
    assert "No space left on device" in session.unsaved
    (kept,) = second.glob("*/step-000000008")
    assert f"the nets are in {kept}: move it to {folder}, add --resume" in said[-1]
    monkeypatch.undo()
    folder.mkdir(exist_ok=True)
    os.replace(kept, folder / kept.name)
    again = line()
    train(folder, again, resume=True)
    assert again.losses == run.losses


@pytest.mark.parametrize(("number", "word"), [(2, "interrupted"), (15, "ended by SIGTERM")])
def test_a_signal_where_nothing_can_be_written(tmp_path, second, number, word):
    folder = tmp_path / "checkpoints"
    block(folder)
    before = signal.getsignal(number)

    def step(done):
        if done == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        train(folder, line(), before_step=step)
    assert caught.value.status == 128 + number
    assert caught.value.path is None
    (kept,) = second.glob("*/step-000000004")
    assert str(caught.value).startswith(f"{word}; cannot write {folder}")
    assert f"the nets are in {kept}" in str(caught.value)
    assert signal.getsignal(number) is before


def test_a_file_error_between_steps_leaves_the_nets_in_a_second_place(tmp_path, second):
    def step(done):
        if done == 3:
            raise OSError(28, "No space left on device", "monitor.csv")

    with pytest.raises(WriteError, match=r"monitor.csv.*; the nets are in ") as caught:
        train(tmp_path / "checkpoints", line(), before_step=step)
    (kept,) = second.glob("*/step-000000003")
    assert str(kept) in str(caught.value)


def test_results_go_to_a_second_place_and_all_or_nothing(tmp_path, second):
    out = tmp_path / "out"

    def write(folder):
        (folder / "a").write_text("whole")
        if second not in folder.parents:
            raise OSError(28, "No space left on device")
        return 5

    out.mkdir()
    result, where, refused = write_or_elsewhere(out, write)
    assert (result, refused) == (5, f"{out}: No space left on device")
    assert (where / "a").read_text() == "whole"
    assert not list(out.iterdir())
    for name in list(second.iterdir()):
        for file in name.iterdir():
            file.unlink()
        name.rmdir()
    second.rmdir()
    with pytest.raises(WriteError, match="nor to a second place"):
        write_or_elsewhere(out, write)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (2, 2)])
def test_a_checkpoint_is_resumed_on_other_devices(tmp_path, before, after):
    said, run = [], line([mx.cpu(i) for i in range(before)])
    train(tmp_path, run, epochs=1, every=4, place={"device": before})
    saved = run.statistics()
    other = line([mx.cpu(i) for i in range(after)])
    train(tmp_path, other, epochs=1, resume=True, said=said, place={"device": after})
    for name, copies in other.statistics().items():
        expected = saved[name]
        if before != after:
            expected = np.broadcast_to(expected.mean(axis=(0, 1)), copies.shape)
        np.testing.assert_allclose(copies, expected, rtol=1e-6)
    changed = [text for text in said if f"is of device {before}, now {after}" in text]
    assert len(changed) == (before != after)
    train(tmp_path, other, epochs=2, resume=True, place={"device": after})
    assert len(other.losses) == 8


def start(out, *options, limit=None):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [*SCRIPT, *FEW, "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limited if limit else None,
    )


def test_the_script_where_files_cannot_grow(tmp_path):
    first = start(tmp_path, "--checkpoint-every", "3", "--resume", limit=100_000)
    text, _ = first.communicate(timeout=300)
    assert first.returncode == 3, text
    assert "Traceback" not in text
    assert "cannot write" in text
    assert "step-000000003" in text
    assert not (tmp_path / "metrics.json").exists()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_script_saves_on_sigterm(tmp_path, monkeypatch, capsys):
    step = Run.step

    def ended(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(Run, "step", ended)
    options = [*FEW, "--device", "cpu", "--out", str(tmp_path)]
    assert train_lenet.main(options) == 143
    printed = capsys.readouterr().out
    assert f"ended by SIGTERM; saved {tmp_path}/checkpoints/step-000000001" in printed
    assert "to go on: " in printed
    monkeypatch.undo()
    assert train_lenet.main([*options, "--resume", "--device", "cpu:0,cpu:1"]) == 0
    printed = capsys.readouterr().out
    assert "is of --device cpu(0), now cpu(0), cpu(1)" in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["device"] == "cpu(0), cpu(1)"


def test_the_script_ends_where_nobody_reads_on_and_loses_nothing(tmp_path):
    child = subprocess.Popen(
        [*SCRIPT, *FEW, "--epochs", "9", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not child.stdout.readline().startswith("epoch 1"):
        assert child.poll() is None
    child.stdout.close()
    said = child.stderr.read().splitlines()
    assert child.wait(timeout=60) == 141
    assert len(said) == 2
    assert said[0].startswith(f"nobody reads the output; saved {tmp_path}/checkpoints/step-0")
    assert said[1].startswith("to go on: ") and said[1].endswith(" --resume")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


WORKER = """
import os, signal, sys, time
if os.environ["DMLC_ROLE"] != "worker":
    time.sleep(0.5); sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_the_launcher_passes_sigterm_on(capfd):
    before = signal.getsignal(signal.SIGTERM)
    assert launch([sys.executable, "-c", WORKER], workers=1) == 143
    assert "the workers may save their work" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
