"""The files, table and plot of the monitor, its errors, and its page."""

import csv
import io
import json
import sys

from scratchbn import ScratchBatchNorm
from scratchbn.monitor import FIELDS, Monitor

import mxnet as mx
import pytest
from helpers import REPOSITORY, array, run_python
from monitored_nets import deep_net, hooks, one_layer, train_step
from mxnet import autograd, gluon
from mxnet.gluon import SymbolBlock, nn


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
sys.path.insert(0, "tests")
import scratchbn.monitor
import monitored_nets as t
import mxnet as mx
layer, net = t.one_layer(t.ScratchBatchNorm, mx.cpu(), "hybrid")
monitor = scratchbn.monitor.Monitor(net, path=sys.argv[1])
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
    package = module.split(".")[0]
    with pytest.raises(ImportError, match=rf"needs {package}: .*pip install .*\[demo\]"):
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
