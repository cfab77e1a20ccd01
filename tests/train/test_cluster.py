"""Jobs of several processes on MXNet's parameter server, and how they end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from scratchbn import launch
from scratchbn.train import ALONE, ClusterError, cluster, join

import mxnet as mx
import numpy as np
import pytest
from helpers import REPOSITORY, run_python
from train_worker import steps

LAUNCH = [sys.executable, str(REPOSITORY / "scripts" / "launch_local.py")]
TRAIN = [sys.executable, str(REPOSITORY / "scripts" / "train_lenet.py")]
FEW = ["--data", "sample", "--limit", "160", "--batch-size", "32", "--no-compare"]
WORKER = [sys.executable, str(REPOSITORY / "tests" / "train_worker.py")]
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith("DMLC_")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
}

needs_parameter_server = pytest.mark.skipif(
    not mx.runtime.Features().is_enabled("DIST_KVSTORE"),
    reason="this mxnet has no parameter server",
)


def start_job(*command, workers=2):
    return subprocess.Popen(
        [*LAUNCH, "--workers", str(workers), "--", *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status):
    printed, error = process.communicate(timeout=90)
    assert process.returncode == status, f"{printed}\n{error}"
    return printed, error


def children(process):
    """The processes of a job by name: `scheduler`, `server`, `worker`."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{entry}/environ") as file:
                variables = dict(v.split("=", 1) for v in file.read().split("\0") if "=" in v)
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid and "DMLC_ROLE" in variables:
            found.setdefault(variables["DMLC_ROLE"], []).append(int(entry))
    return found


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@needs_parameter_server
def test_two_workers_train_as_two_devices_do(tmp_path):
    finish(start_job(*WORKER, tmp_path), 0)
    expected, statistics = steps([mx.cpu(0), mx.cpu(1)], ALONE)
    with np.load(tmp_path / "0.npz") as first, np.load(tmp_path / "1.npz") as second:
        assert set(first) == set(second) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
            np.testing.assert_array_equal(first[name], value, err_msg=name)
    with np.load(tmp_path / "statistics0.npz") as gathered:
        assert set(gathered) == set(statistics)
        for name, value in statistics.items():
            copies = gathered[name].reshape(2, -1)
            np.testing.assert_array_equal(copies, value.reshape(2, -1))
            assert np.abs(copies[0] - copies[1]).max() > 0, "each worker keeps its own"


def test_long_lines_of_two_processes_do_not_mix():
    source = "import os; print(os.environ['DMLC_ROLE'][0] * 3_000_000)"
    printed, _ = finish(start_job(sys.executable, "-c", source), 0)
    lines = sorted(line.split(" | ")[1] for line in printed.splitlines())
    assert lines == [letter * 3_000_000 for letter in ("s", "s", "w", "w")]


def processes_in_training(process, out):
    """The processes of a job by name, when it has written a checkpoint."""
    checkpoints = out / "checkpoints"
    while process.poll() is None and not (checkpoints.exists() and any(checkpoints.glob("step*"))):
        time.sleep(0.01)
    found = children(process)
    assert {role: len(pids) for role, pids in found.items()} == {
        "scheduler": 1,
        "server": 1,
        "worker": 2,
    }
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A job of the training script of which one worker was killed after a checkpoint."""
    out = tmp_path_factory.mktemp("job")
    options = [*FEW, "--epochs", "4", "--kvstore", "dist_sync", "--checkpoint-every", "1"]
    process = start_job(*TRAIN, *options, "--out", str(out))
    found = processes_in_training(process, out)
    os.kill(found["worker"][1], signal.SIGKILL)
    return process, finish(process, 1), found, out, options


@needs_parameter_server
def test_a_killed_worker_ends_the_job(killed):
    _, (printed, error), found, out, _ = killed
    assert "was ended by SIGKILL; ending the job" in error
    assert not any(is_running(pid) for pids in found.values() for pid in pids)
    assert not (out / "metrics.json").exists()
    speakers = {line.split(" | ")[0] for line in printed.splitlines()}
    assert len(speakers) == 1
    assert speakers <= {"worker 0", "worker 1"}


@needs_parameter_server
def test_a_killed_job_is_resumed(killed, tmp_path):
    *_, killed_out, options = killed
    out = shutil.copytree(killed_out, tmp_path / "resumed")
    printed, _ = finish(start_job(*TRAIN, *options, "--out", str(out), "--resume"), 0)
    assert printed.count("resumed from") == 1
    assert printed.count("written to") == 1
    alone = [*TRAIN, *FEW, "--epochs", "4", "--device", "cpu:0,cpu:1", "--out", tmp_path / "alone"]
    subprocess.run(alone, env=ENVIRONMENT, stdout=subprocess.DEVNULL, timeout=90, check=True)
    metrics, expected = (
        json.loads((folder / "metrics.json").read_text()) for folder in (out, tmp_path / "alone")
    )
    assert (metrics["workers"], expected["workers"]) == (2, 1)
    for epoch, other in zip(metrics["epochs"], expected["epochs"]):
        assert epoch["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert epoch["test_acc"] == pytest.approx(other["test_acc"], abs=0.05)


@needs_parameter_server
def test_sigterm_in_a_job_saves_and_ends_all(tmp_path):
    options = [*FEW, "--epochs", "40", "--kvstore", "dist_sync", "--checkpoint-every", "3"]
    process = start_job(*TRAIN, *options, "--out", str(tmp_path))
    found = processes_in_training(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    printed, error = finish(process, 143)
    saved = re.search(r"ended by SIGTERM; saved (\S+/step-(\d+))", printed)
    assert saved, f"{printed}\n{error}"
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    assert str(newest) == saved[1]
    assert len(json.loads((newest / "scratch.json").read_text())["losses"]) == int(saved[2])
    for name, digest in json.loads((newest / "manifest.json").read_text())["sha256"].items():
        assert hashlib.sha256((newest / name).read_bytes()).hexdigest() == digest
    assert "Traceback" not in printed + error
    assert not any(is_running(pid) for pids in found.values() for pid in pids)


def start_by_hand(source, roles, workers):
    """Start processes of a job of one server as one would on several machines."""
    variables = {
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": str(launch.free_port()),
        "DMLC_NODE_HOST": "127.0.0.1",
        "DMLC_NUM_WORKER": str(workers),
        "DMLC_NUM_SERVER": "1",
    }
    source = f"import os, signal, sys\nfrom scratchbn.train import join\n{source}"
    processes = []
    for role in roles:  # the first is the scheduler; the others are told its number
        process = subprocess.Popen(
            [sys.executable, "-c", source, *(str(p.pid) for p in processes[:1])],
            env={**ENVIRONMENT, **variables, "DMLC_ROLE": role},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    return processes


@needs_parameter_server
@pytest.mark.parametrize("lost", ["worker", "scheduler"])
def test_without_a_launcher_a_lost_process_ends_the_others(lost):
    source = f"""
workers = join(90, 4)
workers.gather("ready", 0)
if {lost!r} == "scheduler" and workers.rank == 1:
    os.kill(int(sys.argv[1]), signal.SIGKILL)
if {lost!r} == "worker" and workers.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    workers.gather("step", 0)
"""
    processes = start_by_hand(source, ("scheduler", "server", "worker", "worker"), 2)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert sorted(statuses) == [-signal.SIGKILL, 1, 1, 1], errors
    for status, error in zip(statuses, errors):
        if status == 1:
            assert "silent for 4 s" in error
            assert "ending the job" in error


@needs_parameter_server
def test_a_job_that_does_not_fill_up_ends():
    for process in start_by_hand("join(3, 60)", ("scheduler", "worker"), 1):
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "not all processes of the job have joined it within 3 s" in error


@pytest.mark.parametrize(
    "missing", ["DMLC_ROLE", "DMLC_PS_ROOT_URI", "DMLC_NUM_WORKER", "DMLC_NUM_SERVER"]
)
def test_without_its_variables_a_process_says_what_is_missing(missing, monkeypatch):
    for name in ("DMLC_ROLE", *cluster._VARIABLES):
        monkeypatch.setenv(name, "worker")
    monkeypatch.delenv(missing)
    with pytest.raises(ClusterError, match=f"environment variables {missing}.*launch_loc"):
        join(1, 1)


def test_alone_there_is_nothing_to_wait_for():
    np.testing.assert_array_equal(ALONE.gather("x", [1, 2]), [[1.0, 2.0]])
    assert ALONE.leave(130) == 130


# --- the launcher, with commands that need no MXNet ----------------------------------------------

REPORT = """
import os, signal, sys, time
role = os.environ["DMLC_ROLE"]
"""


def test_the_launcher_does_without_mxnet():
    found = run_python("import sys, scratchbn.launch; print('mxnet' in sys.modules)")
    assert found.stdout == "False\n"


def test_the_launcher_gives_each_process_its_role_and_marks_its_output():
    source = f"""{REPORT}
print(role, os.environ["DMLC_NUM_WORKER"], os.environ["DMLC_NUM_SERVER"])
print("to stderr", file=sys.stderr)
"""
    printed, error = finish(start_job(sys.executable, "-c", source, workers=3), 0)
    expected = ["scheduler", "server 0", "worker 0", "worker 1", "worker 2"]
    assert sorted(printed.splitlines()) == [f"{n} | {n.split()[0]} 3 1" for n in expected]
    assert sorted(error.splitlines()) == [f"{n} | to stderr" for n in expected]


@pytest.mark.parametrize("role", ["scheduler", "server", "worker"])
def test_the_launcher_ends_all_when_one_fails(role):
    source = f"{REPORT}\nsys.exit(7) if role == {role!r} else time.sleep(60)"
    _, error = finish(start_job(sys.executable, "-c", source, workers=1), 7)
    assert "ended with status 7; ending the job" in error
    assert f"error: {role}" in error


def test_ctrl_c_reaches_the_workers_and_ends_the_rest():
    source = f"""{REPORT}
def save(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""
    process = start_job(sys.executable, "-c", source)
    ready = [process.stdout.readline() for _ in range(4)]
    assert all(line.endswith("| ready\n") for line in ready)
    process.send_signal(signal.SIGINT)
    printed, _ = finish(process, 130)
    assert sorted(printed.splitlines()) == ["worker 0 | saved", "worker 1 | saved"]


def test_a_second_ctrl_c_does_not_wait():
    source = f"{REPORT}\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint(1, flush=True)\n"
    process = start_job(sys.executable, "-c", f"{source}time.sleep(60)", workers=1)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert "interrupted: the workers may save their work" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, error = finish(process, 130)
    assert "interrupted again" in error


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workers", "0", "--", "true"], "--workers: must be at least 1, got '0'"),
        (["--servers", "x", "--", "true"], "--servers: must be an integer, got 'x'"),
        ([], "command"),
        (["--", "no-such-program"], "no program 'no-such-program'"),
    ],
)
def test_the_launcher_refuses(arguments, text, capsys):
    try:
        status = launch.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert text in capsys.readouterr().err
