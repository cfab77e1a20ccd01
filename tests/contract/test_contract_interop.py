"""The layer among others: its interface, options, `repr`, export, files, copies, and memory."""

import copy
import inspect
import json
import pickle

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import mxnet as mx
import numpy as np
import pytest
from helpers import (
    BLOCK_MODES,
    CLOSE,
    MODES,
    STATE,
    array,
    check_step,
    in_mode,
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
from mxnet.gluon import HybridBlock, SymbolBlock, nn

SHAPE = (6, 3, 4)
both_layers = pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
every_mode = pytest.mark.parametrize("mode", MODES)
every_block_mode = pytest.mark.parametrize("mode", BLOCK_MODES)
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


# The interface


@both_layers
def test_arguments_have_the_names_order_and_defaults_of_the_built_in(layer_class):
    ours = inspect.signature(layer_class).parameters
    theirs = inspect.signature(nn.BatchNorm).parameters
    named = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(named)] == named
    for name in named:
        assert ours[name].default == theirs[name].default
        assert ours[name].kind is ours[name].POSITIONAL_OR_KEYWORD
    assert ours["unbiased_variance"].kind is inspect.Parameter.KEYWORD_ONLY
    assert ours["unbiased_variance"].default is False
    assert issubclass(layer_class, HybridBlock)


def test_positional_arguments_arrive_where_the_built_in_puts_them(device):
    arguments = (-1, 0.8, 1e-3, False, False, True, "ones", "zeros", "ones", "zeros", 4)
    ours, theirs = ScratchBatchNorm(*arguments), nn.BatchNorm(*arguments)
    for layer in (ours, theirs):
        layer.initialize(ctx=device)
    for key in theirs._kwargs:
        assert ours._kwargs[key] == theirs._kwargs[key], key
    for name in STATE:
        a, b = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(a.data().asnumpy(), b.data().asnumpy())
        assert a.grad_req == b.grad_req


def test_fits_as_norm_layer_of_a_factory(device):
    """The calls GluonCV makes: keywords, a `norm_kwargs` of its own, a `name_scope`."""

    def block(norm_layer=nn.BatchNorm, norm_kwargs=None):
        net = nn.HybridSequential()
        with net.name_scope():
            net.add(nn.Conv2D(4, 1))
            net.add(norm_layer(epsilon=1e-3, momentum=0.1, **(norm_kwargs or {})))
            net.add(norm_layer(gamma_initializer="zeros", in_channels=4, prefix="last_"))
        return net

    options = {"use_global_stats": True}
    net = block(ScratchBatchNorm, options)
    net.initialize(ctx=device)
    assert net(mx.nd.ones((2, 3, 4, 4), ctx=device)).shape == (2, 4, 4, 4)
    assert options == {"use_global_stats": True}
    assert isinstance(net[1], ScratchBatchNorm)
    suffix = [name.split("_", 1)[1] for name in net.collect_params()]
    theirs = [name.split("_", 1)[1] for name in block().collect_params()]
    assert suffix == theirs


# `_kwargs` is read at call time


@pytest.mark.parametrize("mode", ["eager", "hybrid", "nested"])
def test_use_global_stats_can_be_switched_in_kwargs(build, rng, mode):
    """What GluonCV's `freeze_bn` does; a graph sees it once its cache is cleared."""
    subject = build(mode, SHAPE)
    for frozen in (False, True, False, True):
        subject.layer._kwargs["use_global_stats"] = frozen
        if mode != "eager":
            subject.net.hybridize()
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        expected = (subject.oracle.infer_step if frozen else subject.oracle.train_step)(x, dy)
        check_step(take_step(subject, x, dy), expected)
        subject.check_statistics(rtol=1e-12)


@pytest.mark.parametrize("mode", ["eager", "hybrid", "nested"])
@pytest.mark.parametrize(
    ("key", "attribute", "value"),
    [("momentum", "momentum", 0.25), ("eps", "epsilon", 0.5), ("axis", "axis", -1)],
)
def test_other_options_can_be_changed_in_kwargs(build, rng, mode, key, attribute, value):
    shape = (6, 3, 3)
    subject = build(mode, shape)
    for change in (False, True):
        if change:
            subject.layer._kwargs[key] = value
            setattr(subject.oracle, attribute, value)
            if mode != "eager":
                subject.net.hybridize()
        x, dy = rng.normal(size=shape), rng.normal(size=shape)
        check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
        subject.check_statistics(rtol=1e-12)


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_fix_gamma_can_be_changed_in_kwargs(build, rng, mode):
    subject = build(mode, SHAPE)
    subject.layer._kwargs["fix_gamma"] = True
    subject.net._clear_cached_op()
    subject.oracle.scale = False
    x = rng.normal(size=SHAPE)
    np.testing.assert_allclose(
        train_forward(subject, x), subject.oracle.train(x), **CLOSE["float64"]
    )


# repr

OPTION_SETS = [
    {},
    {"axis": -1, "momentum": 0.25, "epsilon": 1e-3, "in_channels": 3},
    {"momentum": None, "unbiased_variance": True},
    {"center": False, "scale": False, "use_global_stats": True},
    {"beta_initializer": "ones", "gamma_initializer": "zeros", "in_channels": 3},
    {"running_mean_initializer": "ones", "running_variance_initializer": "zeros"},
    {
        "gamma_initializer": mx.init.Constant(2.5),
        "beta_initializer": mx.init.Constant(-0.5),
        "running_mean_initializer": mx.init.Constant(0.25),
        "running_variance_initializer": mx.init.Constant(4),
        "in_channels": 3,
    },
]


@both_layers
@pytest.mark.parametrize("options", OPTION_SETS)
def test_repr_rebuilds_the_layer(device, rng, layer_class, options):
    original = layer_class(**options)
    text = repr(original)
    names = {"ScratchBatchNorm": ScratchBatchNorm, "ScratchBatchNormReLU": ScratchBatchNormReLU}
    rebuilt = eval(text, {**names, "mx": mx, "mxnet": mx})
    assert type(rebuilt) is layer_class
    assert repr(rebuilt) == text
    assert rebuilt._kwargs == original._kwargs
    x = array(rng.normal(size=(3, 3)), device, "float32")
    results = []
    for layer in (original, rebuilt):
        layer.initialize(ctx=device)
        with autograd.train_mode():
            trained = layer(x).asnumpy()
        mx.nd.waitall()
        state = [getattr(layer, name).data().asnumpy() for name in STATE]
        requests = [getattr(layer, name).grad_req for name in STATE]
        results.append([trained, layer(x).asnumpy(), *state, requests])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


@both_layers
def test_repr_shows_every_option(layer_class):
    text = repr(layer_class(momentum=0.75, epsilon=0.125, in_channels=7))
    assert text.startswith(layer_class.__name__ + "(")
    for name, parameter in inspect.signature(layer_class).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD and name not in ("prefix", "params"):
            assert f"{name}=" in text, name
    assert "momentum=0.75" in text
    assert "epsilon=0.125" in text
    assert "in_channels=7" in text


def test_repr_knows_the_channels_after_the_first_call(device):
    layer = ScratchBatchNorm()
    layer.initialize(ctx=device)
    assert "in_channels=0" in repr(layer)
    layer(mx.nd.ones((2, 5), ctx=device))
    assert "in_channels=5" in repr(layer)


def test_repr_follows_kwargs():
    layer = ScratchBatchNorm()
    layer._kwargs["use_global_stats"] = True
    assert "use_global_stats=True" in repr(layer)


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


# Saving, copying


@every_block_mode
@pytest.mark.parametrize("momentum", [0.9, None])
def test_training_goes_on_from_a_file(build, device, rng, tmp_path, mode, momentum):
    """Every piece of state is in the file, the count of a cumulative average included."""
    subject = build(mode, SHAPE, momentum=momentum)
    for _ in range(3):
        x = rng.normal(size=SHAPE) + 2
        train_forward(subject, x)
        subject.oracle.train(x)
    subject.net.save_parameters(str(tmp_path / "net.params"))
    restored = build(mode, SHAPE, momentum=momentum)
    train_forward(restored, rng.normal(size=SHAPE))
    restored.net.load_parameters(str(tmp_path / "net.params"), ctx=device)
    restored.oracle = subject.oracle
    for _ in range(2):
        x, dy = rng.normal(size=SHAPE) - 1, rng.normal(size=SHAPE)
        check_step(take_step(restored, x, dy), restored.oracle.train_step(x, dy))
        restored.check_statistics(rtol=1e-12)


def test_only_a_cumulative_average_has_a_fifth_parameter():
    assert list(ScratchBatchNorm()._collect_params_with_prefix()) == list(STATE)
    extra = set(ScratchBatchNorm(momentum=None)._collect_params_with_prefix()) - set(STATE)
    assert len(extra) == 1
    parameter = ScratchBatchNorm(momentum=None)._collect_params_with_prefix()[extra.pop()]
    assert parameter.grad_req == "null"


@both_layers
def test_deep_copies_are_independent(build, rng, layer_class):
    subject = build("eager", SHAPE, layer_class=layer_class)
    duplicate = copy.deepcopy(subject.layer)
    assert type(duplicate) is layer_class
    assert repr(duplicate) == repr(subject.layer)
    before = subject.statistics()
    x = rng.normal(size=SHAPE)
    with autograd.train_mode():
        y = duplicate(subject.array(x))
    mx.nd.waitall()
    for a, b in zip(subject.statistics(), before):
        assert a.tobytes() == b.tobytes()
    np.testing.assert_allclose(y.asnumpy(), subject.oracle.train(x), **CLOSE["float64"])
    mean = duplicate.running_mean.data().asnumpy()
    np.testing.assert_allclose(mean, subject.oracle.running_mean, rtol=1e-12)
    duplicate._kwargs["momentum"] = 0.1
    assert subject.layer._kwargs["momentum"] == 0.9


@both_layers
def test_layers_pickle_before_they_are_initialized(device, layer_class):
    """As Gluon layers do; afterwards they hold device arrays, which MXNet cannot pickle."""
    layer = pickle.loads(pickle.dumps(layer_class(momentum=0.5, in_channels=3)))
    assert type(layer) is layer_class
    layer.initialize(ctx=device)
    with autograd.train_mode():
        layer(mx.nd.ones((2, 3), ctx=device) * 4)
    mx.nd.waitall()
    assert layer.running_mean.data().asnumpy().tolist() == [2, 2, 2]


# ScratchBatchNormReLU


@every_mode
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_relu_layer_equals_relu_of_the_layer(device, rng, tmp_path, mode, dtype):
    values = random_values(rng, 3)
    nets = []
    for k, layer_class in enumerate((ScratchBatchNorm, ScratchBatchNormReLU)):
        layer = layer_class(in_channels=3)
        layer.initialize(ctx=device)
        layer.cast(dtype)
        set_values(layer, values)
        net = nn.HybridSequential()
        net.add(layer)
        if k == 0:
            net.add(nn.Activation("relu"))
        folder = tmp_path / str(k)
        folder.mkdir()
        nets.append(in_mode(net, mode, array(np.zeros(SHAPE), device, dtype), folder))
    for training in (True, False, True):
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        results = []
        for net in nets:
            data = array(x, device, dtype)
            data.attach_grad()
            with autograd.record(train_mode=training):
                y = net(data)
            y.backward(array(dy, device, dtype))
            mx.nd.waitall()
            results.append([y, data.grad])
            for name in STATE:
                parameters = [p for n, p in net.collect_params().items() if n.endswith("_" + name)]
                results[-1].append(parameters[0].data())
                if name in ("gamma", "beta"):
                    results[-1].append(parameters[0].grad())
        assert (results[0][0].asnumpy() == 0).mean() > 0.02
        for a, b in zip(*results):
            np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), **CLOSE[dtype])


def test_relu_layer_is_one_of_the_family():
    layer = ScratchBatchNormReLU(in_channels=3)
    assert isinstance(layer, ScratchBatchNorm)
    assert list(layer._collect_params_with_prefix()) == list(STATE)


# Variants


class Shifted(ScratchBatchNorm):
    """Normalizes around a mean that is 1 too large."""

    def statistics(self, F, view, running_mean, running_var, select):
        found = super().statistics(F, view, running_mean, running_var, select)
        return found._replace(centred=found.centred - 1)


class Newest(ScratchBatchNorm):
    """Averages the newest statistic and the average before it, whatever momentum is."""

    def update(self, F, running, batch, count):
        return (running + batch) / 2


class Doubled(ScratchBatchNorm):
    """Twice the output."""

    def transform(self, *args, **kwargs):
        return 2 * super().transform(*args, **kwargs)


@every_mode
@pytest.mark.parametrize("variant", [Shifted, Newest, Doubled])
def test_a_variant_overrides_one_method(build, rng, mode, variant):
    subject = build(mode, SHAPE, layer_class=variant, epsilon=1e-3)
    oracle = subject.oracle
    oracle.momentum = 0.5 if variant is Newest else oracle.momentum
    for training in (True, False, True):
        x = rng.normal(size=SHAPE)
        var = x.var(axis=(0, 2)) if training else oracle.running_var
        expected = oracle.train(x) if training else oracle.infer(x)
        if variant is Shifted:
            expected = expected - (oracle.gamma / np.sqrt(var + 1e-3))[:, None]
        if variant is Doubled:
            expected = 2 * expected
        actual = train_forward(subject, x) if training else infer(subject, x)
        np.testing.assert_allclose(actual, expected, **CLOSE["float64"])
        subject.check_statistics(rtol=1e-12)


# Hooks and debugging aids of Gluon


@every_block_mode
def test_forward_hooks_see_input_and_output(device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    seen = []
    layer.register_forward_hook(lambda block, inputs, output: seen.append((inputs[0], output)))
    net = in_mode(layer, mode)
    y = net(mx.nd.ones((2, 3), ctx=device))
    assert seen
    if mode != "nested":
        assert seen[-1][1] is y


def test_summary_counts_the_parameters(device, capsys):
    net = nn.HybridSequential()
    net.add(nn.Dense(4, in_units=2), ScratchBatchNorm(in_channels=4))
    net.initialize(ctx=device)
    net.summary(mx.nd.ones((3, 2), ctx=device))
    assert "ScratchBatchNorm" in capsys.readouterr().out


# Memory

MEMORY_PROGRAM = """
import sys, json, gc, os
import scratchbn, mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn
kind, _, index = sys.argv[1].partition("(")
device = mx.Context(kind, int(index.rstrip(")")))
mode, momentum = sys.argv[2], None if sys.argv[3] == "None" else float(sys.argv[3])
layer = scratchbn.ScratchBatchNorm(in_channels=1024, momentum=momentum)
layer.initialize(ctx=device)
if mode != "eager":
    layer.hybridize(static_alloc=mode == "static_alloc")
trainer = gluon.Trainer(layer.collect_params(), "sgd", {"learning_rate": 0.01})
x = mx.nd.random.normal(shape=(4, 1024), ctx=device)

def resident():
    mx.nd.waitall()
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def train(steps):
    for step in range(steps):
        with autograd.record():
            y = layer(x)
        y.backward()
        trainer.step(4)
        if step % 50 == 0:
            mx.nd.waitall()
            layer(x).wait_to_read()

train(500)
sizes = [resident()]
for part in range(3):
    train(1000)
    sizes.append(resident())
# A leak grows in every part; what the allocator takes once does not.
growth = 3 * min(after - before for before, after in zip(sizes, sizes[1:]))
print(json.dumps(growth / 2**20))
"""


@pytest.mark.parametrize(
    ("mode", "momentum"), [("eager", 0.9), ("hybrid", None), ("static_alloc", 0.9)]
)
def test_memory_does_not_grow_over_3000_training_steps(device, mode, momentum):
    """One vector of 1,024 channels kept per step would cost 12 MiB, an autograd chain more."""
    growth = last_json(run_python(MEMORY_PROGRAM, device, mode, momentum))
    assert growth < 4, f"{growth:.1f} MiB"


@pytest.mark.parametrize("mode", ["eager", "hybrid", "static_alloc"])
def test_statistics_hold_no_autograd_history(device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    for _ in range(3):
        with autograd.record():
            y = net(array(rng.normal(size=SHAPE), device, "float32"))
    y.backward()
    with autograd.record():
        total = layer.running_mean.data().sum() + layer.running_var.data().sum()
    with pytest.raises(mx.MXNetError):
        total.backward()
