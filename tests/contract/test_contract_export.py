"""What a graph and exported files hold, and who can load them and go on training."""

import json

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import mxnet as mx
import numpy as np
import pytest
from contract_cases import both_layers
from helpers import (
    CLOSE,
    STATE,
    array,
    check_step,
    infer,
    last_json,
    random_values,
    run_python,
    set_values,
    take_step,
    train_forward,
    without_scratchbn,
)
from mxnet import autograd, gluon
from mxnet.gluon import SymbolBlock, nn

SHAPE = (6, 3, 4)
NORMALIZATION_OPERATORS = (
    "batchnorm",
    "batch_norm",
    "instancenorm",
    "instance_norm",
    "layernorm",
    "layer_norm",
    "groupnorm",
    "group_norm",
    "l2normalization",
    "l2_normalization",
    "lrn",
)


def is_normalization(operator):
    """Tell whether MXNet's own operator of this name normalizes."""
    ours = operator == "_scratchbn_batch_norm"
    return not ours and any(word in operator.lower() for word in NORMALIZATION_OPERATORS)


# No normalization operator anywhere


@both_layers
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"use_global_stats": True}, {"axis": -1}]
)
def test_the_graph_holds_no_normalization_operator(layer_class, options, backend):
    layer = layer_class(in_channels=3, **options)
    for symbol in (layer(mx.sym.var("data")), layer(mx.sym.var("data", shape=(2, 3, 4, 3)))):
        nodes = json.loads(symbol.tojson())["nodes"]
        operators = {node["op"] for node in nodes}
        assert ("_scratchbn_batch_norm" in operators) == (backend == "native")
        assert not {operator for operator in operators if is_normalization(operator)}
        assert all("subgraphs" not in node for node in nodes)
        assert "Custom" not in operators


@both_layers
def test_eager_calls_use_no_normalization_operator(build, rng, monkeypatch, layer_class):
    def refuse(*args, **kwargs):
        raise AssertionError("a normalization operator was called")

    refused = set()
    for kind in (mx.nd, mx.sym):
        for module in (kind, kind.contrib, kind.op, kind._internal, kind.gen_op):
            for name in [
                n for n in dir(module) if is_normalization(n) and callable(getattr(module, n))
            ]:
                monkeypatch.setattr(module, name, refuse)
                refused.add(name)
    assert {"BatchNorm", "BatchNormWithReLU", "SyncBatchNorm", "LayerNorm"} <= refused
    with pytest.raises(AssertionError):
        nn.BatchNorm(in_channels=3).hybrid_forward(mx.nd, None, None, None, None, None)
    subject = build("eager", SHAPE, layer_class=layer_class)
    x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
    np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])


# Export


IMPORT_PROGRAM = """
import sys
sys.modules["scratchbn"] = None  # any import of the package fails
import json
import numpy as np, mxnet as mx
from mxnet import autograd, gluon
kind, _, index = sys.argv[1].partition("(")
device = mx.Context(kind, int(index.rstrip(")")))
folder, dtype = sys.argv[2], sys.argv[3]
files = folder + "/net-symbol.json", folder + "/net-0000.params"
net = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=device)
trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.0625})
batches = np.load(folder + "/batches.npy")
history = []
for batch in batches:
    x = mx.nd.array(batch, dtype=dtype, ctx=device)
    inferred = net(x).asnumpy().tolist()
    with autograd.record():
        y = net(x)
        loss = (y ** 2).sum()
    loss.backward()
    trainer.step(len(batch))
    mx.nd.waitall()
    state = {n: p.data().asnumpy().tolist() for n, p in net.collect_params().items()}
    history.append({"inferred": inferred, "y": y.asnumpy().tolist(), **state})
assert not [name for name in sys.modules if name.startswith("scratchbn.")]
print(json.dumps(history))
"""


def small_net(device, dtype, seed):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Conv2D(4, 3, in_channels=2), ScratchBatchNorm(in_channels=4, momentum=0.7))
        net.add(nn.Activation("tanh"), nn.Flatten(), nn.Dense(5, in_units=64))
        net.add(ScratchBatchNormReLU(in_channels=5, momentum=None, prefix="second_"))
        net.add(ScratchBatchNorm(in_channels=5, scale=False, center=False, prefix="third_"))
        net.add(nn.Dense(2, in_units=5))
    net.initialize(ctx=device)
    net.cast(dtype)
    stream = np.random.default_rng(seed)
    for name, parameter in net.collect_params().items():
        if name.endswith(("weight", "bias", *STATE)):
            value = stream.normal(size=parameter.shape) * 0.3
            value = np.abs(value) + 0.5 if name.endswith(("gamma", "var")) else value
            parameter.set_data(mx.nd.array(value, dtype=dtype))
    return net


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("traced", ["inference", "training"])
def test_a_process_without_the_package_infers_and_goes_on_training(
    device, rng, tmp_path, dtype, traced
):
    net = small_net(device, dtype, 5)
    net.hybridize()
    x = array(rng.normal(size=(4, 2, 6, 6)), device, dtype)
    for training in (traced == "training", False, True):
        with autograd.record(train_mode=training):
            net(x)
    mx.nd.waitall()
    net.export(str(tmp_path / "net"))
    batches = rng.normal(size=(20, 7, 2, 6, 6)) * 2 + 1
    np.save(tmp_path / "batches.npy", batches)
    process = run_python(IMPORT_PROGRAM, device, tmp_path, dtype, env=without_scratchbn())
    history = last_json(process)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.0625})
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == "float64" else {"rtol": 1e-3, "atol": 1e-3}
    for batch, record in zip(batches, history):
        x = array(batch, device, dtype)
        np.testing.assert_allclose(record["inferred"], net(x).asnumpy(), **close)
        with autograd.record():
            y = net(x)
            loss = (y**2).sum()
        loss.backward()
        trainer.step(len(batch))
        mx.nd.waitall()
        np.testing.assert_allclose(record["y"], y.asnumpy(), **close)
        for name, parameter in net.collect_params().items():
            value = parameter.data().asnumpy()
            np.testing.assert_allclose(record[name], value, err_msg=name, **close)


@both_layers
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"scale": False}, {"center": False}, {"use_global_stats": True}],
    ids=str,
)
def test_exported_parameters_are_arguments_and_auxiliary_states(
    device, tmp_path, layer_class, options
):
    layer = layer_class(in_channels=3, **options)
    layer.initialize(ctx=device)
    layer.hybridize()
    layer(mx.nd.ones((2, 3), ctx=device))
    layer.export(str(tmp_path / "net"))
    stored = set(mx.nd.load(str(tmp_path / "net-0000.params")))
    p = layer.prefix
    expected = {f"arg:{p}gamma", f"arg:{p}beta", f"aux:{p}running_mean", f"aux:{p}running_var"}
    assert expected <= stored
    assert all(name.startswith("aux:") for name in stored - expected)
    assert len(stored) == 4 + (options.get("momentum", 0.9) is None)
    symbol = mx.sym.load(str(tmp_path / "net-symbol.json"))
    arguments, states = symbol.list_arguments(), symbol.list_auxiliary_states()
    assert {f"arg:{n}" for n in arguments if n != "data"} | {f"aux:{n}" for n in states} == stored
    nodes = json.loads((tmp_path / "net-symbol.json").read_text())["nodes"]
    assert not [node["op"] for node in nodes if is_normalization(node["op"])]


def test_exported_files_load_into_the_built_in(device, tmp_path, rng):
    ours, theirs = ScratchBatchNorm(in_channels=3), nn.BatchNorm(in_channels=3)
    ours.initialize(ctx=device)
    set_values(ours, random_values(rng, 3))
    ours.hybridize()
    x = array(rng.normal(size=SHAPE), device, "float32")
    expected = ours(x).asnumpy()
    ours.export(str(tmp_path / "net"))
    loaded = nn.BatchNorm(in_channels=3, prefix=ours.prefix)
    loaded.collect_params().load(str(tmp_path / "net-0000.params"), ctx=device)
    np.testing.assert_allclose(loaded(x).asnumpy(), expected, **CLOSE["float32"])
    theirs.initialize(ctx=device)
    set_values(theirs, random_values(rng, 3))
    theirs.hybridize()
    expected = theirs(x).asnumpy()
    theirs.export(str(tmp_path / "theirs"))
    loaded = ScratchBatchNorm(in_channels=3, prefix=theirs.prefix)
    loaded.collect_params().load(str(tmp_path / "theirs-0000.params"), ctx=device)
    np.testing.assert_allclose(loaded(x).asnumpy(), expected, **CLOSE["float32"])


def test_an_exported_net_can_be_exported_again(build, rng, tmp_path):
    subject = build("exported", SHAPE)
    x = rng.normal(size=SHAPE)
    train_forward(subject, x)
    subject.oracle.train(x)
    subject.net.export(str(tmp_path / "again"))
    files = str(tmp_path / "again-symbol.json"), str(tmp_path / "again-0000.params")
    subject.net = SymbolBlock.imports(files[0], ["data"], files[1], ctx=subject.device)
    for _ in range(2):
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics(rtol=1e-12)


def test_an_imported_net_nests_in_another(build, rng):
    """Fine-tuning: an imported trunk below a new head, hybridized together."""
    subject = build("exported", SHAPE)
    outer = nn.HybridSequential()
    outer.add(subject.net, nn.HybridLambda(lambda F, data: data * 2))
    outer.hybridize()
    x = rng.normal(size=SHAPE)
    with autograd.record():
        y = outer(subject.array(x))
    np.testing.assert_allclose(y.asnumpy(), 2 * subject.oracle.train(x), **CLOSE["float64"])
    subject.check_statistics(rtol=1e-12)
