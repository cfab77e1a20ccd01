"""Exported models between the layers: the same parameters, the same training, either way."""

import json

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, convert_files, native, use_backend
from scratchbn.backends.marker import KEY as MARKER
from scratchbn.deploy import fold
from scratchbn.deploy._files import plain_name, write_model
from scratchbn.deploy.check import compare_outputs, run_symbol

import mxnet as mx
import numpy as np
import pytest
from converted_files import LAYERS, OTHER, check_training_agrees, export, operators, sequential
from mxnet.gluon import HybridBlock, SymbolBlock, nn

from models.lenet import lenet


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


def test_the_backend_that_was_chosen_does_not_enter_a_file(rng, tmp_path):
    """A layer called on symbols is the compiled operator where native was chosen by name."""
    if not native.available():
        pytest.skip("needs the compiled kernel")
    model = export(sequential(nn.BatchNorm, lambda: nn.Dense(2)), tmp_path / "net", rng, (4, 3))
    want = convert_files(*model, to="scratch")[0]
    with use_backend("native"):
        got = convert_files(*model, to="scratch")[0]
    assert got.tojson() == want.tojson()


def test_heads_keep_their_names_there_and_back_and_folded():
    data = mx.sym.var("data")
    dense = mx.sym.FullyConnected(data, num_hidden=3, name="pre")
    norm = mx.sym.BatchNorm(dense, name="fc1", fix_gamma=False)
    relu = mx.sym.contrib.BatchNormWithReLU(dense, name="fc2", fix_gamma=False)
    again = mx.sym.BatchNorm(mx.sym.FullyConnected(norm, num_hidden=2, name="last"), name="fc3")
    dropped = mx.sym.Dropout(again, name="fc4")
    symbol = mx.sym.Group([norm, relu, dropped, mx.sym.BlockGrad(norm, name="copy"), data])
    shapes, _, more = symbol.infer_shape(data=(2, 4))
    named = [*zip(symbol.list_arguments(), shapes), *zip(symbol.list_auxiliary_states(), more)]
    params = {name: mx.nd.ones(shape) for name, shape in named if name != "data"}
    outputs = ["fc1_output", "fc2_output", "fc4_output", "copy_output", "data"]
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
