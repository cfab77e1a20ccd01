"""The benchmark: its arithmetic, its nets and entries, and a real run that writes its files."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys

import benchmark
import matplotlib.image
import mxnet as mx
import numpy as np
import psutil
import pytest
from bench import plan, stats
from bench.entries import ABOUT, ENTRIES, WORKS, Entry, Textbook
from bench.figure import STYLES
from bench.groups import measure_group
from bench.machine import available_memory, cache_sizes
from bench.memory import measure_memory
from bench.nets import LAYOUTS, NETS, single_layer
from bench.report import Report, summarize
from bench.rounds import Effort, take_samples
from bench.runner import Data, Seconds, build_runner
from bench.torch_client import TorchError, TorchWorker
from helpers import REPOSITORY, last_json
from mxnet import autograd
from mxnet.gluon import nn

SCRIPT = REPOSITORY / "scripts" / "benchmark.py"
FEW = ["control", "none", "textbook", "portable", "file", "builtin-folded", "folded"]


# --- arithmetic ---------------------------------------------------------------------------------


def test_ratio_is_that_of_medians():
    interval = stats.ratio_of_medians([1, 2, 30], [4, 4, 5])
    assert interval.value == 0.5
    assert 0.2 <= interval.low <= interval.value <= interval.high <= 7.5


def test_ratio_of_proportional_times_has_no_spread(rng):
    times = rng.uniform(1, 5, 40)
    # Paired by round: what slows both down cancels, however much the rounds differ.
    interval = stats.ratio_of_medians(3 * times, times)
    np.testing.assert_allclose(interval, (3, 3, 3), rtol=1e-12)


def test_unpaired_times_spread(rng):
    times = rng.uniform(1, 5, 40)
    interval = stats.ratio_of_medians(3 * times, rng.permutation(times))
    assert interval.low < 2.8 < 3.2 < interval.high


def test_interval_covers_the_true_ratio_as_often_as_it_says(rng):
    covered = 0
    for _ in range(200):
        above, below = 1.3 * rng.lognormal(0, 0.2, 25), rng.lognormal(0, 0.2, 25)
        interval = stats.ratio_of_medians(above, below)
        covered += interval.low <= 1.3 <= interval.high
    assert 180 <= covered <= 199  # about 95% of 200; the bootstrap of a median is a little wide


def test_interval_is_reproducible(rng):
    times, reference = rng.uniform(1, 2, (2, 40))  # of few, two draws may share their bounds
    first = stats.ratio_of_medians(times, reference)
    assert first == stats.ratio_of_medians(times, reference)
    assert first != stats.ratio_of_medians(times, reference, seed=1)


@pytest.mark.parametrize(
    "times, reference, said",
    [
        ([], [], "shapes"),
        ([1, 2], [1], "shapes"),
        ([1, 0], [1, 1], "times must be positive"),
        ([1, 1], [1, math.nan], "reference must be positive"),
        ([1, math.inf], [1, 1], "times must be positive"),
    ],
)
def test_ratio_of_unusable_times(times, reference, said):
    with pytest.raises(ValueError, match=said):
        stats.ratio_of_medians(times, reference)


def test_interval_in_words():
    assert str(stats.Interval(0.914, 0.9, 0.93)) == "0.91 [0.90, 0.93]"
    assert str(stats.Interval(12.34, 11.0, 13.0)) == "12.3 [11.0, 13.0]"
    assert stats.Interval(2, 1, 3).scaled(0.5) == (1, 0.5, 1.5)


def floor_seconds(work, nbytes, bytes_per_second):
    """How long memory alone needs for a norm layer on a tensor of `nbytes`."""
    return stats.FLOOR_PASSES[work] * nbytes / bytes_per_second


def test_floor():
    # 100 MB copied in 20 ms: 200 MB moved, 10 GB/s.
    assert stats.bandwidth(100_000_000, 0.02) == pytest.approx(1e10)
    assert floor_seconds("train", 100_000_000, 1e10) == pytest.approx(0.08)
    assert floor_seconds("inference", 100_000_000, 1e10) == pytest.approx(0.02)


@pytest.mark.parametrize("work", ["train", "inference"])
def test_floor_multiple_agrees_with_the_floor(work):
    nbytes, copies, times = 1 << 20, [2e-4, 1e-4, 4e-4], [5e-3, 3e-3, 9e-3]
    floor = floor_seconds(work, nbytes, stats.bandwidth(nbytes, 2e-4))
    assert stats.floor_multiple(work, times, copies).value == pytest.approx(5e-3 / floor)


def test_folded_work_has_no_floor():
    with pytest.raises(ValueError, match="work must be one of train, inference, got 'folded'"):
        stats.floor_multiple("folded", [1.0], [1.0])


def test_cache_sizes(tmp_path):
    for index, (level, size) in enumerate([("1", "48K"), ("2", "1024K"), ("3", "24M"), ("4", "?")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cache_sizes(tmp_path) == {2: 2**20, 3: 24 * 2**20}


def test_cache_sizes_where_nothing_tells_them(tmp_path):
    assert cache_sizes(tmp_path / "nowhere") == {2: 2**20, 3: 2**25}


def test_available_memory(tmp_path, monkeypatch):
    others = ("MemTotal", "MemFree", "Buffers", "Cached", "Shmem", "Active", "Inactive")
    sizes = {**dict.fromkeys(others, 9), "MemAvailable": 7}
    text = "".join(f"{name}: {size} kB\n" for name, size in sizes.items())
    (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert available_memory() == 7 * 1024


def test_sweep_goes_from_level_2_to_ten_times_level_3():
    assert stats.sweep_sizes(2**20, 2**24) == [2**20, 2**22, 2**24, 10 * 2**24]


# --- taking samples -----------------------------------------------------------------------------


def test_every_sampler_runs_once_a_round_in_an_order_that_changes():
    called = []

    def sampler(name, seconds):
        def run(steps):
            called.append((name, steps))
            return Seconds(seconds * steps, 2 * seconds * steps)

        return run

    samplers = {"slow": sampler("slow", 0.5), "fast": sampler("fast", 0.03)}
    steps, samples = take_samples(samplers, Effort(1, 12, 0.1))
    assert steps == {"slow": 1, "fast": 4}  # as many as fill 0.1 s
    np.testing.assert_allclose(samples["slow"], [(0.5, 1.0)] * 12)
    np.testing.assert_allclose(samples["fast"], [(0.03, 0.06)] * 12)
    timed = [call for call in called[4:] if call != ("fast", 1)]  # one step before, not counted
    assert called[4:].count(("fast", 1)) == 12
    pairs = {tuple(timed[i : i + 2]) for i in range(0, len(timed), 2)}
    assert pairs == {(("slow", 1), ("fast", 4)), (("fast", 4), ("slow", 1))}


@pytest.mark.parametrize("once, rounds", [(0.1, 20), (100.0, 5), (1e-4, 200)])
def test_rounds_fill_the_seconds_within_bounds(once, rounds):
    effort = Effort(seconds=2.0, rounds=None, sample_seconds=1e-4)
    _, samples = take_samples({"one": lambda steps: Seconds(once * steps, 1.0)}, effort)
    assert len(samples["one"]) == rounds


def test_nothing_to_sample():
    assert take_samples({}, Effort(1, None, 1)) == ({}, {})


# --- nets and entries ---------------------------------------------------------------------------


def test_the_command_line_names_what_there_is():
    text = benchmark.build_parser().format_help()
    assert re.findall(r"^  ([a-z-]+)  +\S", text.partition("\nentries\n")[2], re.M) == [*ENTRIES]
    for name in (*NETS, *LAYOUTS, *WORKS):
        assert name in text
    assert set(ABOUT) == set(STYLES)


@pytest.mark.filterwarnings("ignore:Parameter .* is not used:UserWarning")
@pytest.mark.parametrize("axis, shape", [(1, (6, 5)), (1, (4, 5, 3, 3)), (-1, (4, 3, 3, 5))])
@pytest.mark.parametrize("training", [True, False])
def test_textbook_computes_the_formula(axis, shape, training, rng):
    layer = Textbook(axis=axis)
    layer.initialize()
    x = rng.normal(2, 3, shape)
    layer(mx.nd.array(x))
    state = {"gamma": 1.5, "beta": -0.5, "running_mean": 0.7, "running_var": 2.5}
    for name, value in state.items():
        getattr(layer, name).set_data(mx.nd.full((5,), value))
    layer.hybridize()
    over = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    mean, var = x.mean(over, keepdims=True), x.var(over, keepdims=True)
    if not training:
        mean, var = 0.7, 2.5
    with autograd.record(train_mode=training):
        y = layer(mx.nd.array(x))
    expected = 1.5 * (x - mean) / np.sqrt(var + 1e-5) - 0.5
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_layers_have_the_size_asked_for(layout):
    net = single_layer(layout, 3_000_000)
    assert net.nbytes == pytest.approx(3_000_000, rel=0.05)
    block = net.build(nn.BatchNorm)
    block.initialize()
    assert block(mx.nd.zeros((2, *net.shape[1:]))).shape == (2, *net.shape[1:])
    channels = net.shape[LAYOUTS[layout][1]]
    assert block[0].gamma.shape == (channels,)


def test_large_single_layers_leave_the_textbook_out():
    entries = ["builtin", "none", "textbook"]
    assert single_layer("layer_2d", 2**20).entries("train", entries) == ["builtin", "textbook"]
    assert single_layer("layer_2d", 2**25).entries("train", entries) == ["builtin"]
    assert NETS["mlp"].entries("folded", entries) == ["builtin", "none"]


def test_nets_take_batches_of_other_sizes():
    found = plan.groups(["mlp", "layer_2d"], ["train"], True, [], [1, 8])
    assert [net.shape[0] for net, _ in found if not net.layer] == [1, 8]
    assert [net.shape for net, _ in plan.groups(["mlp"], ["train"], True, [])] == [(256, 784)]
    assert benchmark.build_parser().parse_args(["--batch", "1", "32"]).batch == [1, 32]


def test_eager_nets_are_not_hybridized_and_compute_the_same(monkeypatch):
    found = plan.groups(["mlp", "layer_2d"], WORKS, True, [], [8], eager=True)
    assert {work for _, work in found} == {"train", "inference"}
    assert all(", eager" in net.title for net, _ in found)
    net = next(net for net, _ in found if not net.layer)
    chosen = ["builtin", "control", "portable", "native", "folded"]
    hybridized = []
    monkeypatch.setattr(nn.HybridSequential, "hybridize", lambda *a, **k: hybridized.append(a))
    group = measure_group(net, "train", chosen, Effort(1, 1, 1e-6))
    assert not hybridized
    assert group.problems == {}
    assert max(group.differences.values()) < 1e-5
    assert group.net == "mlp, eager"
    assert set(group.samples) == set(chosen) - {"folded"}


@pytest.mark.parametrize("name", ["channels_last", "mlp", "layer_nhwc"])
def test_entries_compute_the_same(name):
    net = NETS.get(name) or single_layer(name, 2**16)
    effort = Effort(1, 1, 1e-6)
    for work in ("train", "inference") if net.layer else WORKS:
        group = measure_group(net, work, ["builtin", *FEW], effort)
        assert group.problems == {}
        compared = set(net.entries(work, FEW)) - {"none"}
        assert set(group.differences) == compared
        assert max(group.differences.values()) < 1e-5
        assert group.differences["control"] == 0
        assert group.wrong == {}
        assert set(group.samples) == {"builtin", *net.entries(work, FEW)} | (
            {"copy"} if net.layer else set()
        )


def test_a_step_trains_without_moving_the_parameters():
    net = NETS["mlp"]
    data = Data.of(net)
    runner = build_runner(net, "train", "builtin", data)
    before = runner.output().asnumpy()
    runner.sample(3)
    np.testing.assert_array_equal(runner.output().asnumpy(), before)
    features = net.shape[1]
    assert runner.parameters == 512 * (features + 1 + 2 + 512 + 1 + 2) + 10 * 513


def test_an_entry_that_fails_is_reported_and_the_others_go_on():
    # nn.BatchNorm cannot be trained after a Conv1D.
    group = measure_group(
        NETS["conv1d"], "train", ["builtin", "none", "portable"], Effort(1, 1, 1e-6)
    )
    assert "MXNetError" in group.problems["builtin"]
    assert set(group.samples) == {"none", "portable"}
    report = Report("", {}, {}, [group])
    assert "| fails |" in report.to_markdown()
    assert all(row.ratio is None for row in summarize(group).values())


def test_a_wrong_entry_is_told(tmp_path, monkeypatch, capsys):
    class Wrong(nn.BatchNorm):
        def hybrid_forward(self, F, x, gamma, beta, running_mean, running_var):
            y = super().hybrid_forward(F, x, gamma, beta, running_mean, running_var)
            return y * 1.01

        def _alias(self):
            return "batchnorm"

    monkeypatch.setitem(ENTRIES, "textbook", Entry(Wrong, "wrong"))
    arguments = ["--quick", "--nets", "mlp", "--work", "inference", "--rounds", "1"]
    assert benchmark.main([*arguments, "--entries", "textbook", "--out", str(tmp_path)]) == 1
    assert "mlp, inference: textbook is" in capsys.readouterr().err


# --- a real run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    arguments = ["--quick", "--nets", "lenet", "layer_2d", "--rounds", "2"]
    assert benchmark.main([*arguments, "--entries", *FEW, "--out", str(out)]) == 0
    return out


def test_it_writes_its_files_and_nothing_else(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted(benchmark.FILES)
    picture = matplotlib.image.imread(finished / "benchmark.png")
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


def test_the_samples_are_all_there(finished):
    report = json.loads((finished / "benchmark.json").read_text())
    assert report["command"].startswith("python scripts/benchmark.py --quick --nets lenet")
    assert report["versions"]["mxnet"] == mx.__version__
    assert report["machine"]["cores"] >= 1
    groups = {(group["net"], group["work"]): group for group in report["groups"]}
    layer = {"builtin", "control", "textbook", "portable", "copy"}
    inference = {"builtin", "control", "none", "textbook", "portable", "file"}
    live = {"builtin", "control", "none", "textbook", "portable"}
    assert {key: set(group["samples"]) for key, group in groups.items()} == {
        ("lenet", "train"): live,
        ("lenet", "inference"): inference,
        ("lenet", "folded"): {"builtin", "control", "none", "builtin-folded", "folded"},
        ("layer_2d", "train"): layer,
        ("layer_2d", "inference"): layer | {"file"},
    }
    for group in groups.values():
        assert group["problems"] == {}
        for name, times in group["samples"].items():
            assert len(times) == 2
            process = group["process"][name]
            assert len(process) == 2
            assert min(times) > 0 < min(process)
            row, reference = group["rows"][name], group["samples"]["builtin"]
            assert row["process_ms"] == pytest.approx(1000 * np.median(process))
            of_process = np.median(process) / np.median(group["process"]["builtin"])
            assert row["process_ratio"][0] == pytest.approx(of_process)
            assert row["ms"] == pytest.approx(1000 * np.median(times))
            assert row["ratio"][0] == pytest.approx(np.median(times) / np.median(reference))
            assert row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]
            assert (row["floor"] is None) == (not group["layer"] or name == "copy")
        assert group["rows"]["builtin"]["ratio"] == [1, 1, 1]


def test_the_tables_say_what_the_samples_do(finished):
    report = json.loads((finished / "benchmark.json").read_text())
    text = (finished / "benchmark.md").read_text()
    for title in ("Training step", "Inference", "Inference, norms folded"):
        assert f"\n## {title}\n" in text
    for title in ("training step", "inference"):
        assert f"\n## Single layer: {title}\n" in text
    for group in report["groups"]:
        for name, row in group["rows"].items():
            if name not in ("builtin", "copy"):
                assert str(stats.Interval(*row["ratio"])) in text
                assert str(stats.Interval(*row["process_ratio"])) in text
    assert "8 passes of the tensor" in text
    widths = {
        line.count("|") for line in text.split("## Inference\n")[1].split("##")[0].split("\n")
    }
    assert widths == {0, 10}


def test_memory_of_a_process():
    command = [sys.executable, str(SCRIPT), "--memory-of", "mlp"]
    found = {}
    for entry in ("none", "textbook"):
        process = subprocess.run(
            [*command, entry], capture_output=True, text=True, timeout=120, check=False
        )
        found[entry] = last_json(process)["bytes"]
    parameters = 4 * 2 * (784 * 512 + 512 * 512)  # values and gradients
    assert parameters < found["none"] < found["textbook"] < 100 * parameters


def test_memory_table():
    report = Report("", {}, {}, [], {"mlp": {"builtin": 2**21, "portable": 3 * 2**20}})
    assert "| net | builtin | portable |" in report.to_markdown()
    assert "| mlp | 2 MiB | 1.50 |" in report.to_markdown()


def test_profile_lists_the_operators():
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--profile", "mlp", "builtin", "--work", "inference"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows = {line.split()[0]: line.split()[1:] for line in process.stdout.splitlines() if line}
    assert rows["BatchNorm"][0] == "2"
    assert rows["FullyConnected"][0] == "3"
    assert rows["all"][-1] == "100.0%"


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--nets", "lennet"], "argument --nets: invalid choice: 'lennet'"),
        (["--entries", "fast"], "argument --entries: invalid choice: 'fast'"),
        (["--work", "sleep"], "argument --work: invalid choice: 'sleep'"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got '0'"),
        (["--seconds", "-1"], "argument --seconds: must be positive and finite, got '-1'"),
        (["--seconds", "nan"], "argument --seconds: must be positive and finite, got 'nan'"),
        (["--seconds", "1", "--rounds", "1"], "not allowed with argument"),
        (["--threads", "two"], "argument --threads: must be an integer"),
        (["--against", "jax"], "argument --against: invalid choice: 'jax'"),
        (["--torch-python", "python"], "argument --torch-python: needs --against torch"),
        (["--profile", "lennet", "auto"], "argument --profile: 'lennet' is none of lenet, mlp"),
        (["--profile", "lenet", "fast"], "argument --profile: 'fast' is none of builtin"),
    ],
)
def test_bad_options(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_profile_of_an_entry_that_takes_no_part(capsys):
    assert benchmark.main(["--profile", "lenet", "folded"]) == 2
    assert "'folded' takes no part in --work train" in capsys.readouterr().err


def test_nothing_to_measure(tmp_path, capsys):
    arguments = ["--nets", "layer_2d", "--work", "folded", "--entries", "control"]
    assert benchmark.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "nothing to measure: single layers have no folded work" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_one(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--nets", "mlp", "--entries", "control"]
    assert benchmark.main([*arguments, "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_backend_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "missing_backend", {"native": "it is not built"}.get)
    arguments = ["--quick", "--nets", "mlp", "--rounds", "1", "--work", "folded"]
    out = ["--out", str(tmp_path / "out")]
    assert benchmark.main([*arguments, "--entries", "native", *out]) == 2
    assert "native cannot run here: it is not built" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert benchmark.main([*arguments, *out]) == 0
    assert "- native left out: it is not built" in (tmp_path / "out/benchmark.md").read_text()


def test_a_package_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["--nets", "resnet18_v1", "--entries", "control"]) == 2
    assert "resnet18_v1 cannot run here: needs gluoncv" in capsys.readouterr().err


def test_small_memory_leaves_large_layers_out(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 2**20)
    arguments = ["--quick", "--nets", "mlp", "layer_2d", "--rounds", "1", "--work", "inference"]
    assert benchmark.main([*arguments, "--entries", "control", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "benchmark.md").read_text()
    assert re.search(r"layer_2d, [\d.]+ MiB left out: needs 40 tensors of memory", text)
    assert "Single layer" not in text


# --- PyTorch ------------------------------------------------------------------------------------


def test_without_torch_the_error_says_so(tmp_path, capsys):
    broken = tmp_path / "python"
    broken.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1\n"
    )
    broken.chmod(0o755)
    for python, said in ((broken, "No module named 'torch'"), ("nowhere", "cannot be started")):
        arguments = ["--entries", "control", "--against", "torch", "--torch-python", str(python)]
        assert benchmark.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "name a Python that has it with --torch-python" in error


_STAND_IN = """\
#!{python}
import json, sys
print(json.dumps(dict(version="9.9", threads=2)), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "run":
        answer = dict(seconds=0.25 * asked["steps"], process=0.5 * asked["steps"])
    elif asked["net"] == "mlp":
        answer = dict(parameters=671754)
    elif asked["net"] == "lenet":
        answer = dict(error="RuntimeError: no")
    else:
        sys.exit("died")
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    """A program that speaks the protocol of the worker."""
    path = tmp_path / "python"
    path.write_text(_STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_the_worker_is_asked_for_samples(stand_in):
    with TorchWorker(stand_in) as worker:
        assert (worker.version, worker.threads) == ("9.9", 2)
        worker.build("mlp", "train", (2, 784), 671754)
        assert worker.sample(4) == (1.0, 2.0)
        with pytest.raises(TorchError, match="mlp trains 671754 numbers in PyTorch, 5 in"):
            worker.build("mlp", "train", (2, 784), 5)
        with pytest.raises(TorchError, match="RuntimeError: no"):
            worker.build("lenet", "train", (2, 1, 28, 28), 5)
        with pytest.raises(TorchError, match="died"):
            worker.build("other", "train", (2,), 5)


def test_memory_of_the_worker_is_seen_from_outside(stand_in):
    found, notes = measure_memory([NETS["mlp"], NETS["lenet"]], [], stand_in)
    assert found.keys() == {"mlp"}
    assert 0 <= found["mlp"]["torch"] < 2**25
    assert notes == ["lenet, memory: torch: RuntimeError: no"]


def test_torch_takes_part_in_the_rounds(stand_in, tmp_path):
    arguments = ["--quick", "--nets", "mlp", "lenet", "--rounds", "1", "--work", "train"]
    against = ["--against", "torch", "--torch-python", stand_in]
    out = tmp_path / "out"
    assert benchmark.main([*arguments, *against, "--entries", "control", "--out", str(out)]) == 0
    report = json.loads((out / "benchmark.json").read_text())
    mlp, lenet = report["groups"]
    assert (mlp["samples"]["torch"], mlp["process"]["torch"]) == ([0.25], [0.5])
    assert report["versions"]["torch"] == "9.9"
    assert lenet["problems"] == {"torch": "RuntimeError: no"}
    assert "lenet, train: torch fails: RuntimeError: no" in report["notes"]
