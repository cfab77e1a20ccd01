"""Statistics over several devices against one device with the whole batch, in child processes.

MXNet reads how much work space its CPUs have when it first computes, and this process has computed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

HERE = Path(__file__).parent
EXACT = 1e-10
RUNS = os.environ.get("SCRATCHBN_SYNC_RUNS", "7")


def environment_of(**variables):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    environment.pop("MXNET_CPU_TEMP_COPY", None)  # conftest.py sets it for other tests
    return environment


def child(script, *arguments, **variables):
    return subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        env=environment_of(**variables),
        timeout=60 + 30 * int(RUNS),
    )


@pytest.fixture(scope="module")
def results():
    """What the cases found, by their names."""
    cases = ["equal", "options", "far", "threads", "missing", "abandoned", "refused", "key"]
    done = child("sync_cases.py", *cases, "together", "files", "forks", "gluoncv")
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        found.update(json.loads(line))
    return found


def test_devices_that_share_train_as_one(results):
    assert len(results["equal"]) == 16
    assert max(results["equal"].values()) < EXACT


def test_layers_used_twice_several_nets_and_options(results):
    assert max(results["options"].values()) < EXACT
    assert results["threads"] < EXACT
    assert results["key"] == [[[-1.0]], [[1.0]]]


def test_a_large_mean_costs_no_digits(results):
    assert results["far"] < 2e-6


@pytest.mark.parametrize("form", ["eager", "hybrid"])
def test_a_missing_device_is_an_error_that_names_it(form, results):
    found = results["missing"]
    forward, backward = found[f"{form} forward"], found[f"{form} backward"]
    for text in ("net_batchnorm0", "came cpu(0)", "cpu(1) (not called) did not within 0.5 s"):
        assert text in forward
    for text in ("net_batchnorm1", "backward", "came cpu(1)", "cpu(0) did not within 5 s"):
        assert text in backward
    assert 0.5 <= found[f"{form} seconds"] < 30
    assert max(found[f"{form} after"], found[f"{form} after backward"]) < EXACT


def test_an_abandoned_step_ends_at_once(results):
    found = results["abandoned"]
    assert "the step was abandoned" in found["error"] and "net_batchnorm" in found["error"]
    assert found["seconds"] < 20
    assert found["after"] < EXACT


def test_errors_of_devices_that_fail_together_come_one_after_the_other(results):
    """MXNet's list of errors is not locked: two at one moment break it, and waitall dies of it."""
    found = results["together"]
    assert found["times"] == 4
    assert found["apart"] >= 0.05
    assert found["errors"] == ["the text of 0"]


def test_what_cannot_be_is_refused_at_once(results):
    found = results["refused"]
    assert "num_devices=3" in found["number"] and "cpu(0), cpu(1)" in found["number"]
    assert "num_devices=2" in found["one"] and "are on 1 (cpu(0))" in found["one"]
    assert found["number hybrid"] == found["number"] and found["one hybrid"] == found["one"]
    assert "needs num_devices" in found["key"]
    assert "at least 1" in found["num_devices"] and "greater than 0" in found["timeout"]


def test_files_hold_the_ordinary_graph_and_conversion_goes_both_ways(results):
    found = results["files"]
    assert found["stock"] and found["apart"] < EXACT
    assert found["nodes"] == [2, 2]
    text, name = found["there"]
    assert name == "ScratchSyncBatchNorm" and "num_devices=2" in text and "scale=False" in text
    assert found["repr"] and found["back"] and found["copies"] == 3


def test_a_fork_while_devices_wait(results):
    assert results["forks"]["answer"] == 2 and results["forks"]["exit"] == 0
    assert results["forks"]["after"] < EXACT


def test_a_net_of_gluoncv(results):
    assert results["gluoncv"] == {"layers": 21, "same": True}


def test_one_operator_at_a_time_is_refused_and_one_device_is_plain():
    code = (
        "from scratchbn import ScratchSyncBatchNorm, ScratchBatchNorm; import mxnet as mx\n"
        "x = mx.nd.array([[1], [3]])\n"
        "def y(layer):\n"
        "    with mx.autograd.record(): return layer(x).asnumpy().ravel().tolist()\n"
        "one, plain, two = (c(in_channels=1) for c in"
        " (ScratchSyncBatchNorm, ScratchBatchNorm, ScratchSyncBatchNorm))\n"
        "one.initialize(), plain.initialize(), two.initialize(ctx=[mx.cpu(0), mx.cpu(1)])\n"
        "assert y(one) == y(plain); one.hybridize(); assert y(one) == y(plain)\n"
        "try: y(two)\n"
        "except ValueError as error: print(error)\n"
    )
    environment = environment_of(MXNET_ENGINE_TYPE="NaiveEngine")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "unset MXNET_ENGINE_TYPE=NaiveEngine" in done.stdout


def test_random_delays_missing_devices_and_exits():
    """Seven runs; SCRATCHBN_SYNC_RUNS=200 for more."""
    done = child("sync_stress.py", RUNS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{RUNS} runs, 0 problems" in done.stdout
