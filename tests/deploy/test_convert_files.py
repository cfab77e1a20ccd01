"""Exported models between the layers: the same parameters, the same training, either way."""

import json

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, cli, convert_files
from scratchbn.backends.marker import KEY as MARKER
from scratchbn.deploy import fold
from scratchbn.deploy._files import plain_name, write_model
from scratchbn.deploy.check import compare_outputs, run_symbol

import helpers
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, SymbolBlock, nn

from models.lenet import initialize, lenet

LAYERS = {"builtin": nn.BatchNorm, "scratch": ScratchBatchNorm}
OTHER = {"builtin": "scratch", "scratch": "builtin"}


def export(net, prefix, rng, shape, dtype="float64"):
    """Give a net non-trivial norms, and write it; returns symbol and parameters as files have."""
    net.initialize(mx.init.Xavier(magnitude=3))
    net.cast(dtype)
    net.hybridize()
    x = mx.nd.array(rng.normal(size=shape), dtype=dtype)
    net(x)
    for name, parameter in net.collect_params().items():
        values = helpers.random_values(rng, parameter.shape[0])
        key = next((key for key in values if name.endswith("_" + key)), None)
        if key is not None:
            parameter.set_data(mx.nd.array(values[key], dtype=parameter.dtype))
    net.export(str(prefix))
    return mx.sym.load(f"{prefix}-symbol.json"), mx.nd.load(f"{prefix}-0000.params")


def operators(symbol):
    return [n["op"] for n in json.loads(symbol.tojson())["nodes"] if n["op"] != "null"]


def steps(prefix, data, unused=(), count=3):
    """Train an imported model; returns outputs and gradients, and the parameters at the end."""
    net = SymbolBlock.imports(f"{prefix}-symbol.json", ["data"], f"{prefix}-0000.params")
    parameters = net.collect_params()
    for name in unused:
        parameters[name].grad_req = "null"
    trained = {n: p for n, p in parameters.items() if p.grad_req != "null"}
    trainer = mx.gluon.Trainer(trained, "sgd", {"learning_rate": 0.05})
    seen = []
    for i in range(count):
        x = data[i]
        x.attach_grad()
        with autograd.record():
            y = net(x)
            loss = mx.nd.sin(y).mean()
        loss.backward()
        mx.nd.waitall()
        seen += [y.asnumpy(), x.grad.asnumpy(), *(p.grad().asnumpy() for p in trained.values())]
        trainer.step(1)
    mx.nd.waitall()
    inferred = net(data[0]).asnumpy()
    return seen, {n: p.data().asnumpy() for n, p in parameters.items()}, inferred


def check_training_agrees(one, other, shape, rng, unused=()):
    data = [mx.nd.array(rng.normal(size=shape), dtype="float64") for _ in range(3)]
    (seen, state, inferred), (seen2, state2, inferred2) = (
        steps(prefix, data, unused) for prefix in (one, other)
    )
    assert len(seen) == len(seen2)
    for a, b in zip(seen, seen2):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert state.keys() == state2.keys()
    for name in state.keys() - set(unused):
        np.testing.assert_allclose(state[name], state2[name], rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(inferred, inferred2, rtol=1e-5, atol=1e-5)


def sequential(*layers):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(*[layer() for layer in layers])
    return net


@pytest.mark.parametrize("to", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5, "epsilon": 0.1},
        {"scale": False},
        {"axis": -1},
        {"axis": 2},
        {"use_global_stats": True},
    ],
    ids=str,
)
def test_training_goes_on(to, options, rng, tmp_path):
    norm = LAYERS[OTHER[to]]
    net = sequential(
        lambda: nn.Conv2D(4, 3),
        lambda: norm(**options),
        lambda: nn.Activation("relu"),
        lambda: norm(**options),
        lambda: norm(**options),
        lambda: nn.Dense(3),
    )
    before = export(net, tmp_path / "before", rng, (4, 2, 6, 6))
    symbol, params, report = convert_files(*before, to=to)
    write_model(tmp_path / "after", symbol, params)

    assert (len(report.converted), report.skipped, report.notes) == (3, (), ())
    assert operators(symbol).count("BatchNorm") == (3 if to == "builtin" else 0)
    assert ("sgd_mom_update" in operators(symbol)) == (to == "scratch")
    assert set(symbol.list_arguments()) == set(before[0].list_arguments())
    assert set(symbol.list_auxiliary_states()) == set(before[0].list_auxiliary_states())
    written = mx.nd.load(str(tmp_path / "after-0000.params"))
    assert written.keys() == before[1].keys()
    for name, value in written.items():
        np.testing.assert_array_equal(value.asnumpy(), before[1][name].asnumpy())
    # The built-in writes 1 into a gamma that it does not use.
    unused = [plain_name(n) for n in params if "scale" in options and n.endswith("gamma")]
    check_training_agrees(tmp_path / "before", tmp_path / "after", (4, 2, 6, 6), rng, unused)


@pytest.mark.parametrize("start", LAYERS)
def test_there_and_back(start, rng, tmp_path):
    net = lenet(LAYERS[start], prefix="lenet_")
    before = export(net, tmp_path / "net", rng, (4, 1, 16, 16))
    there = convert_files(*before, to=OTHER[start])[:2]
    symbol, params, _ = convert_files(*there, to=start)
    write_model(tmp_path / "back", symbol, params)
    assert sorted(operators(symbol)) == sorted(operators(before[0]))
    check_training_agrees(tmp_path / "net", tmp_path / "back", (4, 1, 16, 16), rng)


@pytest.mark.parametrize("to", LAYERS)
def test_relu_layers(to, rng, tmp_path):
    relu = {"builtin": nn.BatchNormReLU, "scratch": ScratchBatchNormReLU}[OTHER[to]]
    net = sequential(lambda: nn.Conv2D(4, 3), relu, lambda: nn.Conv2D(4, 1), relu)
    before = export(net, tmp_path / "before", rng, (4, 2, 6, 6), "float32")
    symbol, params, report = convert_files(*before, to=to)
    assert len(report.converted) == 2
    assert operators(symbol).count("relu") == 2
    x = mx.nd.array(rng.normal(size=(4, 2, 6, 6)))
    write_model(tmp_path / "after", symbol, params)
    loaded = SymbolBlock.imports(
        str(tmp_path / "after-symbol.json"), ["data"], str(tmp_path / "after-0000.params")
    )
    np.testing.assert_allclose(loaded(x).asnumpy(), net(x).asnumpy(), rtol=1e-5, atol=1e-5)


class Twice(HybridBlock):
    """One norm layer, called twice."""

    def __init__(self, norm):
        super().__init__(prefix="twice_")
        with self.name_scope():
            self.conv, self.norm = nn.Conv2D(2, 1, in_channels=2), norm(in_channels=2)

    def hybrid_forward(self, F, x):
        return self.norm(self.conv(self.norm(x)))


def test_a_layer_called_twice_updates_twice_in_order(rng, tmp_path):
    ours = Twice(ScratchBatchNorm)
    shape = (4, 2, 5, 5)
    expected = export(ours, tmp_path / "ours", rng, shape)
    symbol, params, report = convert_files(*expected, to="builtin")
    assert [entry.path for entry in report.converted] == ["twice_batchnorm0"] * 2
    assert operators(symbol) == ["BatchNorm", "Convolution", "BatchNorm"]
    symbol, params, report = convert_files(symbol, params, to="scratch")
    assert len(report.converted) == 2
    write_model(tmp_path / "back", symbol, params)
    check_training_agrees(tmp_path / "ours", tmp_path / "back", shape, rng)


def test_dropout_before_a_norm(rng, tmp_path):
    norm = LAYERS["builtin"]
    net = sequential(lambda: nn.Dropout(0.5), norm, lambda: nn.Dropout(0.5), norm)
    before = export(net, tmp_path / "before", rng, (8, 5))
    symbol, _, report = convert_files(*before, to="scratch")
    assert len(report.converted) == 2
    kept = [n for n in json.loads(symbol.tojson())["nodes"] if n["name"].startswith("net_dropout")]
    assert [node["op"] for node in kept] == ["Dropout"] * 2


class Weighted(HybridBlock):
    """A layer with a weight that works in float16 on a CPU."""

    def __init__(self):
        super().__init__()
        self.weight = self.params.get("weight", shape=(1, 5), init="ones")

    def hybrid_forward(self, F, x, weight):
        return F.broadcast_mul(x, weight)


@pytest.mark.parametrize("to", LAYERS)
def test_float16(to, rng, tmp_path):
    net = sequential(Weighted, LAYERS[OTHER[to]])
    before = export(net, tmp_path / "before", rng, (8, 5), "float16")
    symbol, params, report = convert_files(*before, to=to)
    assert len(report.converted) == 1
    arrays = {name.partition(":")[2]: value for name, value in params.items()}
    arrays["data"] = mx.nd.array(rng.normal(size=(8, 5)), dtype="float16")
    outputs = []
    for model in (before[0], symbol):
        args, aux = model.list_arguments(), model.list_auxiliary_states()
        executor = model.bind(
            mx.cpu(), {n: arrays[n] for n in args}, aux_states={n: arrays[n] for n in aux}
        )
        outputs.append(executor.forward(is_train=False)[0])
    assert [y.dtype for y in outputs] == [np.float16] * 2
    np.testing.assert_allclose(*(y.asnumpy() for y in outputs), rtol=5e-3, atol=5e-3)


def test_names_of_the_symbol_api_are_kept(rng):
    symbol = mx.sym.BatchNorm(mx.sym.var("data"), name="bn", axis=1)
    values = dict(zip(("gamma", "beta", "moving_mean", "moving_var"), range(4)))
    params = {f"bn_{name}": mx.nd.array(rng.uniform(1, 2, 3)) for name in values}
    ours, same, _ = convert_files(symbol, params, to="scratch")
    assert same.keys() == params.keys()
    assert ours.list_auxiliary_states() == symbol.list_auxiliary_states()
    (described,) = [
        json.loads(attrs[MARKER]) for attrs in ours.attr_dict().values() if MARKER in attrs
    ]
    assert described["running_mean"] == "bn_moving_mean"
    assert described["fix_gamma"] is True
    assert described["epsilon"] == float(np.float32(0.001))  # the operator's default
    # Folding reads the description; training writes the statistics.
    folded = fold(ours, params, shapes={"data": (2, 3)})[0]
    assert "sgd_mom_update" not in operators(folded)
    assert folded.list_outputs() == ["bn_output"]
    back = convert_files(ours, params, to="builtin")[0]
    assert operators(back) == ["BatchNorm"]
    assert back.list_inputs() == symbol.list_inputs()


def test_numpy_semantics(rng, tmp_path):
    mx.npx.set_np()
    net = sequential(lambda: nn.Dense(4, flatten=False), LAYERS["builtin"])
    net.initialize()
    net.hybridize()
    x = mx.np.array(rng.normal(size=(5, 3)), dtype="float32")
    expected = net(x)
    net.export(str(tmp_path / "net"))
    symbol, params, report = convert_files(
        str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params"), to="scratch"
    )
    assert len(report.converted) == 1
    write_model(tmp_path / "after", symbol, params)
    after = SymbolBlock.imports(
        str(tmp_path / "after-symbol.json"), ["data"], str(tmp_path / "after-0000.params")
    )
    np.testing.assert_allclose(after(x).asnumpy(), expected.asnumpy(), rtol=1e-5, atol=1e-5)


# --- what is kept, noted or refused -----------------------------------------------------------


@pytest.mark.parametrize("option", [{"momentum": None}, {"unbiased_variance": True}], ids=str)
def test_options_without_counterpart_are_refused(option, rng, tmp_path):
    net = sequential(ScratchBatchNorm, lambda: ScratchBatchNorm(**option))
    model = export(net, tmp_path / "net", rng, (4, 2))
    with pytest.raises(ValueError, match=rf"net_batchnorm1 .*{next(iter(option))}="):
        convert_files(*model, to="builtin")


@pytest.mark.parametrize("zero", [True, False])
def test_center_is_noted(zero, rng, tmp_path):
    net = sequential(lambda: ScratchBatchNorm(center=False))
    symbol, params = export(net, tmp_path / "net", rng, (4, 2))
    if zero:
        params["arg:net_batchnorm0_beta"][:] = 0
    _, _, report = convert_files(symbol, params, to="builtin")
    assert ("is not 0" in report.notes[0].text) != zero
    assert "net_batchnorm0_beta" in report.notes[0].text


@pytest.mark.parametrize("epsilon, off", [(1e-6, True), (1e-5, False)])
def test_an_epsilon_that_cudnn_does_not_take(epsilon, off, rng, tmp_path):
    net = sequential(lambda: ScratchBatchNorm(epsilon=epsilon))
    symbol, _, _ = convert_files(*export(net, tmp_path / "net", rng, (4, 2)), to="builtin")
    (attrs,) = [a for a in symbol.attr_dict().values() if "eps" in a]
    assert float(attrs["eps"]) == epsilon
    assert (attrs.get("cudnn_off") == "True") == off


class Doubled(ScratchBatchNorm):
    def transform(self, F, view, batch, gamma, beta, epsilon):
        return super().transform(F, view, batch, gamma, beta, epsilon) * 2


def test_a_variant_is_kept(rng, tmp_path):
    net = sequential(ScratchBatchNorm, Doubled)
    symbol, params, report = convert_files(
        *export(net, tmp_path / "net", rng, (4, 2)), to="builtin"
    )
    assert [len(report.converted), len(report.skipped)] == [1, 1]
    assert "no description" in str(report)
    assert operators(symbol).count("sgd_mom_update") == 2  # one for each running statistic
    write_model(tmp_path / "after", symbol, params)
    check_training_agrees(tmp_path / "net", tmp_path / "after", (4, 2), rng)


def test_a_description_without_training_options_is_kept(rng, tmp_path):
    net = sequential(ScratchBatchNorm)
    symbol, params = export(net, tmp_path / "net", rng, (4, 2))
    node = next(name for name, attrs in symbol.attr_dict().items() if MARKER in attrs)
    about = json.loads(symbol.attr_dict()[node][MARKER])
    del about["momentum"]
    symbol._set_attr(**{MARKER: json.dumps(about)})
    converted, _, report = convert_files(symbol, params, to="builtin")
    assert "does not tell its momentum" in report.skipped[0].text
    assert operators(converted) == operators(symbol)


def norms(rng, *names, channels=3):
    ends = ("gamma", "beta", "moving_mean", "moving_var")
    return {f"{n}_{e}": mx.nd.array(rng.uniform(1, 2, channels)) for n in names for e in ends}


def test_nodes_that_are_kept(rng):
    data = mx.sym.var("data")
    gamma = mx.sym.var("computed_gamma") * 2
    kept = [
        mx.sym.BatchNorm(data, gamma, name="computed"),
        mx.sym.BatchNorm(data, output_mean_var=True, name="outputs"),
    ]
    symbol = mx.sym.Group([*kept, mx.sym.BatchNorm(data, name="bn")])
    params = norms(rng, "computed", "outputs", "bn")
    converted, _, report = convert_files(symbol, params, to="scratch")
    assert [entry.path for entry in report.converted] == ["bn"]
    assert {entry.name: entry.text.partition(" ")[2] for entry in report.skipped} == {
        "computed": "is computed in the graph",
        "outputs": "statistics are outputs too",
    }
    assert operators(converted).count("BatchNorm") == 2


def test_statistics_shared_by_unlike_nodes(rng):
    data, mean, var = (mx.sym.var(n) for n in ("data", "a_moving_mean", "a_moving_var"))
    first = mx.sym.BatchNorm(data, moving_mean=mean, moving_var=var, name="a")
    second = mx.sym.BatchNorm(first, moving_mean=mean, moving_var=var, eps=0.5, name="b")
    params = norms(rng, "a", "b")
    _, _, report = convert_files(second, params, to="scratch")
    assert [entry.path for entry in report.converted] == ["a"]
    assert "shares its running statistics" in report.skipped[0].text


class Loop(HybridBlock):
    def __init__(self, norm):
        super().__init__(prefix="loop_")
        with self.name_scope():
            self.norm = norm(in_channels=3)

    def hybrid_forward(self, F, x):
        return F.contrib.foreach(lambda item, state: (self.norm(item), state), x, [])[0]


@pytest.mark.parametrize("to", LAYERS)
def test_a_norm_inside_a_loop_is_kept(to):
    net = Loop(LAYERS[OTHER[to]])
    symbol = net(mx.sym.var("data"))
    ends = ("gamma", "beta", "running_mean", "running_var")
    params = {f"loop_batchnorm0_{end}": mx.nd.ones(3) for end in ends}
    converted, _, report = convert_files(symbol, params, to=to)
    assert "inside a loop" in report.skipped[0].text
    assert operators(converted) == operators(symbol)


def test_bad_input(rng):
    symbol, params = mx.sym.BatchNorm(mx.sym.var("data"), name="bn"), norms(rng, "bn")
    with pytest.raises(ValueError, match="to must be one of builtin, scratch, got 'ours'"):
        convert_files(symbol, params, to="ours")
    with pytest.raises(TypeError, match="params"):
        convert_files(symbol, [1], to="scratch")
    without = {name: value for name, value in params.items() if name != "bn_moving_var"}
    with pytest.raises(ValueError, match="'bn_moving_var' of node 'bn' is missing"):
        convert_files(symbol, without, to="scratch")
    with pytest.raises(ValueError, match=r"parameters of 'bn' must have one shape"):
        convert_files(symbol, {**params, "bn_beta": mx.nd.ones(4)}, to="scratch")
    with pytest.raises(ValueError, match=r"bn \(BatchNorm\) cannot be converted: momentum"):
        convert_files(
            mx.sym.BatchNorm(mx.sym.var("data"), name="bn", momentum=1.5), params, to="scratch"
        )


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize("to", LAYERS)
def test_command(to, rng, tmp_path, capsys):
    net = lenet(LAYERS[OTHER[to]], prefix="lenet_")
    initialize(net)
    export(net, tmp_path / "net", rng, (2, 1, 16, 16), "float32")
    files = [str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")]
    out = str(tmp_path / "out")
    assert cli.main(["convert", *files, "--to", to, "--out", out]) == 0
    said = capsys.readouterr().out
    assert "3 converted, 0 skipped" in said
    assert f"now {LAYERS[to].__name__}" in said
    assert "give --shape data=" in said
    shape = ["--shape", "data=2,1,16,16"]
    assert cli.main(["convert", *files, "--to", to, "--out", out, *shape]) == 0
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("largest"))
    difference, size = line.rpartition(": ")[2].split(", of ")
    assert float(difference) < 1e-5 * float(size)
    assert operators(mx.sym.load(f"{out}-symbol.json")).count("BatchNorm") == (
        3 if to == "builtin" else 0
    )


def test_command_with_bad_input(rng, tmp_path, capsys):
    net = sequential(lambda: ScratchBatchNorm(momentum=None))
    export(net, tmp_path / "net", rng, (4, 2), "float32")
    files = [str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")]
    arguments = ["convert", *files, "--to", "builtin", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    assert "momentum=None has no counterpart" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert cli.main([*arguments, "--shape", "date=1,2"]) == 1
    assert "--shape must name an input of the symbol, got 'date'" in capsys.readouterr().err


def test_heads_keep_their_names_there_and_back_and_folded():
    data = mx.sym.var("data")
    dense = mx.sym.FullyConnected(data, num_hidden=3, name="pre")
    norm = mx.sym.BatchNorm(dense, name="fc1", fix_gamma=False)
    relu = mx.sym.contrib.BatchNormWithReLU(dense, name="fc2", fix_gamma=False)
    again = mx.sym.BatchNorm(mx.sym.FullyConnected(norm, num_hidden=2, name="last"), name="fc3")
    dropped = mx.sym.Dropout(again, name="fc4")
    symbol = mx.sym.Group([norm, relu, dropped, mx.sym.BlockGrad(norm, name="copy")])
    shapes, _, more = symbol.infer_shape(data=(2, 4))
    named = [*zip(symbol.list_arguments(), shapes), *zip(symbol.list_auxiliary_states(), more)]
    params = {name: mx.nd.ones(shape) for name, shape in named if name != "data"}
    outputs = ["fc1_output", "fc2_output", "fc4_output", "copy_output"]
    there = convert_files(symbol, params, to="scratch")[0]
    back = convert_files(there, params, to="builtin")[0]
    for graph in (there, back, fold(symbol, params)[0], fold(there, params)[0]):
        assert graph.list_outputs() == outputs
        internals = graph.get_internals().list_outputs()
        assert all(internals.count(name) == 1 for name in outputs)
    x = {"data": mx.nd.random.normal(shape=(2, 4))}
    for folded in (fold(symbol, params)[:2], fold(there, params)[:2]):
        difference, size = compare_outputs(run_symbol(*folded, x), run_symbol(there, params, x))
        assert difference < 1e-5 * size
