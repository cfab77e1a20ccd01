"""The monitor: what it reports, against NumPy, and that it changes nothing."""

import csv
import io
import json
import math
import sys

from scratchbn import (
    BackendError,
    ScratchBatchNorm,
    ScratchBatchNormReLU,
    freeze,
    recalibrate,
    use_backend,
)
from scratchbn.monitor import FIELDS, SATURATION, Monitor

import mxnet as mx
import numpy as np
import pytest
from helpers import BLOCK_MODES, REPOSITORY, array, in_mode, run_python
from mxnet import autograd, gluon
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn

kinds = pytest.mark.parametrize("layer_class", [ScratchBatchNorm, nn.BatchNorm])
modes = pytest.mark.parametrize("mode", BLOCK_MODES)
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def train_step(net, trainer, *inputs):
    with autograd.record():
        loss = (net(*inputs) ** 2).sum()
    loss.backward()
    if trainer is not None:
        trainer.step(len(inputs[0]))


def one_layer(layer_class, device, mode="eager", dtype="float32", **options):
    """A norm layer of 4 channels that sees the data, and a dense layer."""
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(layer_class(in_channels=4, **options), nn.Dense(2))
    net.initialize(ctx=device)
    net.cast(dtype)
    return net[0], in_mode(net, mode)


def deep_net(layer_class, device, dropout=0.0):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        body = nn.HybridSequential(prefix="body_")
        with body.name_scope():
            body.add(nn.Conv2D(8, 3), layer_class(), nn.Activation("relu"), nn.Dropout(dropout))
            body.add(nn.Conv2D(5, 3), layer_class(), nn.Activation("relu"))
        net.add(body, nn.Dense(6), layer_class(), nn.Activation("relu"), nn.Dropout(dropout))
        net.add(nn.Dense(2))
    net.initialize(mx.init.Xavier(), ctx=device)
    return net


def values(net):
    mx.nd.waitall()
    return {name: p.data().asnumpy() for name, p in net.collect_params().items()}


# --- what it reports ----------------------------------------------------------------------------


@kinds
@modes
@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3, 2)])
def test_records_equal_numpy(layer_class, mode, shape, device, rng):
    layer, net = one_layer(layer_class, device, mode, momentum=0.7, epsilon=1e-3)
    gamma, beta = np.array([1, -2, 0.5, 0]), np.array([0.5, 1, 20, -1])
    layer.gamma.set_data(array(gamma, device, "float32"))
    layer.beta.set_data(array(beta, device, "float32"))
    x = rng.normal(2, 3, shape).astype(np.float32)
    with Monitor(net, channels=True) as monitor:
        train_step(net, None, array(x, device, "float32"))
        monitor.step()
    (record,) = monitor.records
    assert set(FIELDS) < set(record)

    axes = (0, *range(2, x.ndim))
    column = (1, 4) + (1,) * (x.ndim - 2)
    mean, var = x.mean(axis=axes, dtype=np.float64), x.var(axis=axes, dtype=np.float64)
    running_mean, running_var = 0.3 * mean, 0.7 + 0.3 * var
    normalized = (x - mean.reshape(column)) / np.sqrt(var.reshape(column) + 1e-3)
    y = normalized * gamma.reshape(column) + beta.reshape(column)
    expected = {
        "batch_mean": mean,
        "batch_var": var,
        "running_mean": running_mean,
        "running_var": running_var,
        "mean_distance": abs(mean - running_mean) / np.sqrt(running_var + 1e-3),
        "var_ratio": (var + 1e-3) / (running_var + 1e-3),
        "gamma": gamma,
        "beta": beta,
    }
    for name, per_channel in expected.items():
        np.testing.assert_allclose(record[name], per_channel, err_msg=name, **CLOSE)
        for summary in ("mean", "min", "max"):
            np.testing.assert_allclose(
                record[f"{name}_{summary}"], getattr(per_channel, summary)(), **CLOSE
            )
    assert (record["step"], record["layer"], record["calls"]) == (1, layer.name, 1)
    assert record["dead"] == (y <= 0).all(axis=axes).mean() == 0.25
    np.testing.assert_allclose(record["saturated"], (abs(y) > SATURATION).mean(), **CLOSE)
    assert record["saturated"] >= 0.25
    assert record["nonfinite_batches"] == 0


@kinds
def test_hybridized_nets_report_what_eager_ones_do(layer_class, device, rng):
    batches = [array(rng.normal(size=(6, 3, 8, 8)), device, "float32") for _ in range(3)]
    found = {}
    for mode in BLOCK_MODES:
        mx.random.seed(1)
        net = deep_net(layer_class, device)
        outer = in_mode(net, mode)
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01})
        with Monitor(outer) as monitor:
            for x in batches:
                train_step(outer, trainer, x)
                monitor.step()
        found[mode] = monitor.records
    names = ["net_body_batchnorm0", "net_body_batchnorm1", "net_batchnorm0"]
    assert [(r["step"], r["layer"]) for r in found["eager"]] == [
        (step, name) for step in (1, 2, 3) for name in names
    ]
    for mode in BLOCK_MODES[1:]:
        for eager, graph in zip(found["eager"], found[mode]):
            for name in FIELDS:
                if name == "layer":
                    assert graph[name] == eager[name]
                else:
                    np.testing.assert_allclose(
                        graph[name], eager[name], rtol=1e-3, atol=1e-4, err_msg=name
                    )
    assert len({r["batch_mean_mean"] for r in found["hybrid"]}) == 9


def test_unused_scale_and_shift(device, rng):
    layer, net = one_layer(ScratchBatchNorm, device, scale=False, center=False)
    layer.gamma.set_data(mx.nd.full((4,), 7))
    with Monitor(net) as monitor:
        train_step(net, None, array(rng.normal(size=(5, 4)), device, "float32"))
        monitor.step()
    assert (monitor.records[0]["gamma_max"], monitor.records[0]["beta_max"]) == (1, 0)


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_and_a_fused_relu(mode, dtype, device, rng):
    net = nn.HybridSequential()
    net.add(ScratchBatchNormReLU(in_channels=4))
    net.initialize(ctx=device)
    net.cast(dtype)
    layer, net = net[0], in_mode(net, mode)
    layer.beta.set_data(array([0, 0, -30, 0], device))
    x = rng.normal(3, 1, (8, 4)).astype(dtype)
    with Monitor(net, channels=True) as monitor:
        train_step(net, None, array(x, device, dtype))
        monitor.step()
    expected = x.astype(np.float64).var(axis=0)
    rtol = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(monitor.records[0]["batch_var"], expected, rtol=rtol)
    assert monitor.records[0]["dead"] == 0.25


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_numpy_semantics(mode, device, rng):
    mx.npx.set_np()
    _, net = one_layer(ScratchBatchNorm, device, mode)
    x = rng.normal(3, 1, (8, 4)).astype(np.float32)
    with Monitor(net, channels=True) as monitor:
        train_step(net, None, array(x, device, "float32"))
        monitor.step()
    np.testing.assert_allclose(monitor.records[0]["batch_mean"], x.mean(axis=0), rtol=1e-6)


@kinds
@pytest.mark.parametrize("mode", ["eager", "hybrid", "static_shape"])
def test_nonfinite_batches_are_reported(layer_class, mode, device, rng, tmp_path):
    _, net = one_layer(layer_class, device, mode)
    good = rng.normal(size=(6, 4))
    bad = good.copy()
    bad[2, 1] = np.inf
    path = tmp_path / "out.jsonl"
    with Monitor(net, path=path) as monitor:
        for x in (good, bad, good):
            train_step(net, None, array(x, device, "float32"))
            monitor.step()
    assert [r["nonfinite_batches"] for r in monitor.records] == [0, 1, 1]
    assert [math.isnan(r["dead"]) for r in monitor.records] == [False, True, False]
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert (lines[1]["batch_mean_max"], lines[1]["saturated"]) == (None, None)
    if layer_class is ScratchBatchNorm:
        assert np.isfinite(monitor.records[2]["running_mean_max"])


@kinds
@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_batches_on_several_devices_are_taken_together(
    layer_class, mode, device, second_device, rng
):
    _, net = one_layer(layer_class, [device, second_device], mode)
    x = rng.normal(2, 1, (9, 4)).astype(np.float32)
    with Monitor(net, channels=True) as monitor:
        with autograd.record():
            losses = [
                (net(array(part, on, "float32")) ** 2).sum()
                for part, on in ((x[:3], device), (x[3:], second_device))
            ]
        autograd.backward(losses)
        monitor.step()
    (record,) = monitor.records
    assert record["calls"] == 2
    np.testing.assert_allclose(record["batch_mean"], x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(record["batch_var"], x.var(axis=0), rtol=1e-5)
    average = 0.1 * (x[:3].mean(axis=0) + x[3:].mean(axis=0)) / 2
    np.testing.assert_allclose(record["running_mean"], average, rtol=1e-5)


def test_only_training_steps_are_observed(device, rng):
    _, net = one_layer(ScratchBatchNorm, device, "hybrid")
    x = array(rng.normal(size=(6, 4)), device, "float32")
    with Monitor(net, every=3) as monitor:
        for _ in range(7):
            train_step(net, None, x)
            net(x)
            with autograd.record(train_mode=False):
                net(x * 2)
            recalibrate(net, [x, x])
            monitor.step()
    assert [(r["step"], r["calls"]) for r in monitor.records] == [(1, 1), (4, 1), (7, 1)]


def test_frozen_layers_are_observed(device, rng):
    _, net = one_layer(ScratchBatchNorm, device, "hybrid")
    freeze(net)
    x = rng.normal(3, 1, (6, 4))
    with Monitor(net) as monitor:
        train_step(net, None, array(x, device, "float32"))
        monitor.step()
    np.testing.assert_allclose(monitor.records[0]["batch_mean_mean"], x.mean(), rtol=1e-6)
    assert monitor.records[0]["running_mean_max"] == 0


# --- that it changes nothing --------------------------------------------------------------------


def train(layer_class, mode, device, rng, every):
    mx.random.seed(2)
    net = deep_net(layer_class, device, dropout=0.4)
    outer = in_mode(net, mode)
    trainer = gluon.Trainer(net.collect_params(), "adam", {"learning_rate": 0.01})
    monitor = Monitor(outer, every) if every else None
    for _ in range(5):
        train_step(outer, trainer, array(rng.normal(size=(6, 3, 8, 8)), device, "float32"))
        if monitor:
            monitor.step()
    if monitor:
        monitor.close()
        assert len(monitor.records) == 3 * len(range(0, 5, every))
    after = values(net)
    after["random numbers"] = mx.nd.random.uniform(shape=(4,), ctx=device).asnumpy()
    return after


@kinds
@modes
def test_results_are_bit_identical(layer_class, mode, device):
    alone, *watched = (
        train(layer_class, mode, device, np.random.default_rng(3), every) for every in (0, 1, 2)
    )
    for other in watched:
        assert other.keys() == alone.keys()
        differing = [name for name in alone if alone[name].tobytes() != other[name].tobytes()]
        assert not differing


@pytest.mark.parametrize(("traced", "later"), [("portable", "native"), ("native", "portable")])
def test_a_net_is_observed_with_the_backend_it_was_traced_with(traced, later, device, rng):
    x = array(rng.normal(size=(6, 3, 8, 8)), device, "float32")
    found = []
    try:
        for watched in (False, True):
            mx.random.seed(2)
            net = deep_net(ScratchBatchNorm, device)
            net.hybridize()
            with use_backend(traced):
                net(x)
            with use_backend(later):
                monitor = Monitor(net)
                if not watched:
                    monitor.close()
                train_step(net, None, x)
                if watched:
                    monitor.step()
                    monitor.close()
                    assert len(monitor.records) == 3
            found.append(values(net))
    except BackendError as error:
        pytest.skip(str(error))
    assert not [name for name in found[0] if found[0][name].tobytes() != found[1][name].tobytes()]


class Counted(HybridBlock):
    """Counts how often it is traced."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer
        self.traced = 0

    def hybrid_forward(self, F, x):
        self.traced += F is mx.sym
        return self.layer(x)


def hooks(net):
    found = []
    net.apply(lambda b: found.extend([*b._forward_hooks.values(), *b._forward_pre_hooks.values()]))
    return found


@kinds
def test_traces_once_and_leaves_nothing_behind(layer_class, device, rng):
    net = Counted(layer_class(in_channels=4))
    net.initialize(ctx=device)
    net.hybridize()
    x = array(rng.normal(size=(6, 4)), device, "float32")
    train_step(net, None, x)
    op, graph, traced = net._cached_op, net._cached_graph, net.traced
    with Monitor(net, every=2) as monitor:
        for _ in range(5):
            train_step(net, None, x)
            monitor.step()
            assert net._cached_op is op
    assert len(monitor.records) == 3
    assert net.traced == traced + 1
    assert (net._cached_op, net._cached_graph) == (op, graph)
    assert not hooks(net)
    monitor.close()
    train_step(net, None, x)
    assert (net.traced, len(monitor.records)) == (traced + 1, 3)


def test_no_trace_and_no_hook_of_unobserved_steps_has_an_effect(device, rng):
    net = Counted(ScratchBatchNorm(in_channels=4))
    net.initialize(ctx=device)
    net.hybridize()
    x = array(rng.normal(size=(6, 4)), device, "float32")
    net(x)
    traced = net.traced
    with Monitor(net, every=100) as monitor:
        with pytest.warns(UserWarning, match="no norm layer"):
            monitor.step()
        for _ in range(3):
            train_step(net, None, x)
            monitor.step()
    assert (net.traced, monitor.records) == (traced, [])


@kinds
def test_hybridizing_again_is_noticed(layer_class, device, rng):
    _, net = one_layer(layer_class, device, "hybrid")
    x = array(rng.normal(size=(6, 4)), device, "float32")
    with Monitor(net) as monitor:
        train_step(net, None, x)
        monitor.step()
        with pytest.warns(UserWarning, match="is being hybridized while still having"):
            net.hybridize(static_alloc=True)
        train_step(net, None, x * 3)
        monitor.step()
        with pytest.warns(UserWarning, match="is being hybridized while still having"):
            net.hybridize(False)
        train_step(net, None, x * 9)
        monitor.step()
    found = [r["batch_var_max"] for r in monitor.records]
    np.testing.assert_allclose(found, found[0] * np.array([1, 9, 81]), rtol=1e-5)


@kinds
def test_an_error_in_the_net_leaves_it_as_it_was(layer_class, device, rng):
    _, net = one_layer(layer_class, device, "hybrid")
    x = array(rng.normal(size=(6, 4)), device, "float32")
    train_step(net, None, x)
    op = net._cached_op
    with Monitor(net) as monitor:
        with pytest.raises(ValueError, match="argument structure"), autograd.record():
            net(x, x)
        monitor.close()
        assert net._cached_op is op
    with Monitor(net) as monitor:
        with pytest.raises(ValueError, match="argument structure"), autograd.record():
            net(x, x)
        train_step(net, None, x)
        monitor.step()
        assert net._cached_op is op
    assert monitor.records[0]["calls"] == 1


@kinds
def test_an_error_before_the_graph_runs_observes_no_other_call(layer_class, device, rng):
    layer, net = one_layer(layer_class, device, "hybrid")
    x = array(rng.normal(size=(6, 4)), device, "float32")
    train_step(net, None, x)
    with Monitor(net) as monitor:
        data, layer.gamma.data = layer.gamma.data, None
        with pytest.raises(TypeError), autograd.record():
            net(x)
        layer.gamma.data = data
        net(x)
        with pytest.warns(UserWarning, match="no norm layer"):
            monitor.step()
    assert not monitor.records


class TwoParts(Block):
    """A plain block of two hybridized ones, of which the first has two inputs and two outputs."""

    def __init__(self, layer_class):
        super().__init__()
        self.first = Pair(layer_class)
        self.second = nn.HybridSequential()
        self.second.add(layer_class(), nn.Dense(1))

    def forward(self, x, y):
        a, (b,) = self.first(x, [y])
        return self.second(a * b)


class Pair(HybridBlock):
    def __init__(self, layer_class):
        super().__init__()
        self.layer = layer_class()
        self.unused = layer_class()

    def hybrid_forward(self, F, x, y):
        self.unused(x)
        return self.layer(x), [y[0] + 1]


@kinds
@pytest.mark.parametrize("hybridize", [False, True])
def test_several_graphs_and_a_layer_whose_result_is_not_used(layer_class, hybridize, device, rng):
    net = TwoParts(layer_class)
    net.initialize(ctx=device)
    x, y = (array(rng.normal(size=(6, 4)), device, "float32") for _ in range(2))
    net(x, y)
    if hybridize:
        net.hybridize()
        with pytest.warns(UserWarning, match="is not used by any computation"):
            net(x, y)
    with Monitor(net) as monitor:
        train_step(net, None, x, y)
        monitor.step()
    unused = net.first.unused
    expected = [net.first.layer.name, unused.name, net.second[0].name]
    if hybridize:
        expected.remove(unused.name)
        assert not unused.running_mean.data().asnumpy().any()
    assert sorted(r["layer"] for r in monitor.records) == sorted(expected)


class Loop(HybridBlock):
    def __init__(self):
        super().__init__()
        self.before = ScratchBatchNorm(in_channels=4)
        self.inside = ScratchBatchNorm(in_channels=4)

    def hybrid_forward(self, F, x):
        def body(item, state):
            y = self.inside(item)
            return y, state

        y, _ = F.contrib.foreach(body, self.before(x).expand_dims(0), F.zeros((1,)))
        return y


@pytest.mark.parametrize(("mode", "seen"), [("eager", 2), ("hybrid", 1)])
def test_layers_in_a_loop(mode, seen, device, rng):
    net = Loop()
    net.initialize(ctx=device)
    outer = in_mode(net, mode)
    x = rng.normal(3, 1, (6, 4))
    with Monitor(outer) as monitor:
        with autograd.record():  # without backward, which MXNet cannot do for a loop in a graph
            outer(array(x, device, "float32"))
        monitor.step()
    assert len(monitor.records) == seen
    mx.nd.waitall()
    np.testing.assert_allclose(
        net.before.running_mean.data().asnumpy(), 0.1 * x.mean(axis=0), rtol=1e-5
    )
    # Training moved the layer in the loop once, not twice.
    np.testing.assert_allclose(
        net.inside.running_var.data().asnumpy(), 0.9 + 0.1 * np.ones(4), rtol=1e-4
    )


# --- files, table, plot -------------------------------------------------------------------------


@pytest.fixture
def observed(device, rng):
    """A function that trains a net of three norm layers under a monitor with some options."""

    def observe(steps=3, **options):
        net = deep_net(ScratchBatchNorm, device)
        net.hybridize()
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01})
        with Monitor(net, **options) as monitor:
            for _ in range(steps):
                train_step(net, trainer, array(rng.normal(size=(6, 3, 8, 8)), device, "float32"))
                monitor.step()
        return monitor

    return observe


def test_csv(observed, tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("an older run")
    monitor = observed(path=str(path))
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == FIELDS
    assert len(rows) == len(monitor.records) == 9
    for row, record in zip(rows, monitor.records):
        assert row.pop("layer") == record["layer"]
        assert {name: float(text) for name, text in row.items()} == {
            name: record[name] for name in row
        }


def test_json_lines(observed, tmp_path):
    path = tmp_path / "out.jsonl"
    monitor = observed(path=path, channels=True)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert lines == monitor.records
    assert len(lines[0]["gamma"]) == 8


_KILLED = """
import os, signal, sys
sys.path.insert(0, "tests/monitor")
import test_monitor as t
import mxnet as mx
layer, net = t.one_layer(t.ScratchBatchNorm, mx.cpu(), "hybrid")
monitor = t.Monitor(net, path=sys.argv[1])
for _ in range(2):
    t.train_step(net, None, mx.nd.random.normal(shape=(6, 4)))
    monitor.step()
t.train_step(net, None, mx.nd.random.normal(shape=(6, 4)))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_killed_process_leaves_all_finished_steps(suffix, tmp_path):
    path = tmp_path / f"out{suffix}"
    assert run_python(_KILLED, path).returncode == -9
    lines = path.read_text("utf-8").splitlines()
    if suffix == ".csv":
        steps = [row["step"] for row in csv.DictReader(lines)]
    else:
        steps = [str(json.loads(line)["step"]) for line in lines]
    assert steps == ["1", "2"]


def test_table(observed):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=100)
    monitor = observed(console=console)
    text = console.file.getvalue()
    assert "step 3" in text
    for record in monitor.records[-3:]:
        assert record["layer"] in text
        for name in ("batch_var_min", "var_ratio_max"):
            assert f"{record[name]:.3g}" in text


@pytest.mark.parametrize(("steps", "name"), [(1, "out.png"), (4, "out.svg")])
def test_plot(steps, name, observed, tmp_path):
    pytest.importorskip("matplotlib")
    monitor = observed(steps)
    monitor.plot(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert len(content) > 10_000
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_plot_of_many_layers_names_some(device, rng, tmp_path):
    pytest.importorskip("matplotlib")
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(*(ScratchBatchNorm(in_channels=4) for _ in range(30)))
    net.initialize(ctx=device)
    with Monitor(net) as monitor:
        train_step(net, None, array(rng.normal(size=(6, 4)), device, "float32"))
        monitor.step()
    monitor.plot(tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text("utf-8")
    assert "net_batchnorm0 " in text
    assert "net_batchnorm29 " in text
    assert "net_batchnorm1 " not in text


def test_a_plot_that_fails_leaves_the_file(observed, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.nothing"
    path.write_text("older")
    with pytest.raises(ValueError, match="nothing"):
        observed().plot(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.nothing", "older")]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": None}, TypeError, "net must be a gluon Block, got None"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be an integer, got 1.5"),
        ({"path": 3}, TypeError, "path must be a str or a path, got 3"),
        ({"path": "out.txt"}, ValueError, r"must end in \.csv or \.jsonl, got 'out.txt'"),
        ({"path": "out.csv", "channels": True}, ValueError, r"must end in \.jsonl with channels"),
        ({"path": "missing/out.csv"}, FileNotFoundError, "directory of 'missing/out.csv'"),
        ({"channels": None}, TypeError, "channels must be True or False, got None"),
        ({"console": "yes"}, TypeError, "console must be True, False or a rich Console, got 'yes'"),
    ],
)
def test_bad_arguments(options, error, message, tmp_path, monkeypatch, device):
    monkeypatch.chdir(tmp_path)
    _, net = one_layer(ScratchBatchNorm, device)
    with pytest.raises(error, match=message):
        Monitor(options.pop("net", net), **options)
    assert not hooks(net)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "act"),
    [
        ("rich.console", lambda monitor: Monitor(nn.Dense(1), console=True)),
        ("matplotlib.figure", lambda monitor: monitor.plot("out.png")),
    ],
)
def test_missing_packages_are_named(module, act, observed, monkeypatch):
    monitor = observed()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module.split('.')[0]}: .*scratchbn\[demo\]"):
        act(monitor)


def test_closed(observed, device, rng):
    monitor = observed(path=None)
    with pytest.raises(ValueError, match="the monitor is closed"):
        monitor.step()


def test_nothing_to_plot(device):
    with Monitor(nn.Dense(2)) as monitor:
        monitor.step()
    with pytest.raises(ValueError, match="no records to plot"):
        monitor.plot("out.png")


def test_a_step_without_training_warns_once(device):
    _, net = one_layer(ScratchBatchNorm, device)
    with Monitor(net) as monitor:
        net(mx.nd.ones((2, 4), ctx=device))
        with pytest.warns(UserWarning, match=r"no norm layer .* in step 1") as caught:
            monitor.step()
            monitor.step()
    assert len(caught) == 1


def test_layers_in_imported_graphs_are_observed(device, rng, tmp_path):
    _, net = one_layer(ScratchBatchNorm, device, "hybrid")
    net(array(rng.normal(size=(6, 4)), device, "float32"))
    net.export(str(tmp_path / "net"))
    files = [str(tmp_path / f"net-{name}") for name in ("symbol.json", "0000.params")]
    with pytest.warns(UserWarning):
        imported = SymbolBlock.imports(files[0], ["data"], files[1], ctx=device)
    with Monitor(imported) as monitor:
        with autograd.record():
            imported(array(rng.normal(size=(6, 4)), device, "float32"))
        monitor.step()
    assert len(monitor.records) == 1


# --- the documentation --------------------------------------------------------------------------


def test_the_example_in_the_documentation(tmp_path, monkeypatch, capsys):
    for needed in ("matplotlib", "mlxtend"):
        pytest.importorskip(needed)
    text = (REPOSITORY / "docs" / "monitoring.md").read_text("utf-8")
    example, starting = (part.split("```", 1)[0] for part in text.split("```python\n")[1:3])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "monitoring.md", "exec"), names)
    before, after = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert before < 0.5
    assert after > 0.95
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lenet.csv", "monitor-lenet.png"]

    exec(compile(starting, "monitoring.md", "exec"), names)
    early = names["early"]
    assert early["momentum=0.9"] < 0.6
    assert min(early[name] for name in ("momentum=None", "DebiasedBatchNorm")) > 0.75
    assert early["recalibrate"] > 0.88
