"""The nets and entries of the benchmark."""

from __future__ import annotations

import re

import benchmark
import mxnet as mx
import numpy as np
import pytest
from bench import plan
from bench.entries import ABOUT, ENTRIES, WORKS, Entry, Textbook
from bench.figure import STYLES
from bench.groups import measure_group
from bench.nets import LAYOUTS, NETS, single_layer
from bench.report import Report, summarize
from bench.rounds import Effort
from bench.runner import Data, build_runner
from benchmark_cases import FEW
from mxnet import autograd
from mxnet.gluon import nn


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
