"""Folding of models that exist as files, by function and by command, and files that are bad."""

import json
import re

from scratchbn import ScratchBatchNorm, cli
from scratchbn.backends.marker import KEY as MARKER
from scratchbn.deploy import fold

import helpers
import mxnet as mx
import numpy as np
import pytest
from inference_files import EXACT, difference, operators, prepared, sequential
from mxnet.gluon import nn

ONE_BY_ONE = {"kernel": (1, 1), "num_filter": 4, "no_bias": True}


def batchnorm_params(rng, name, channels):
    v = {k: mx.nd.array(a) for k, a in helpers.random_values(rng, channels).items()}
    return {
        f"arg:{name}_gamma": v["gamma"],
        f"arg:{name}_beta": v["beta"],
        f"aux:{name}_moving_mean": v["running_mean"],
        f"aux:{name}_moving_var": v["running_var"],
    }


def module_model(rng):
    """A model as Module users write it, with the operator's default options and a label."""
    x = mx.sym.var("data")
    x = mx.sym.Convolution(x, kernel=(3, 3), num_filter=4, name="conv")
    x = mx.sym.BatchNorm(x, name="bn1")
    x = mx.sym.BatchNorm(mx.sym.Activation(x, act_type="relu", name="relu"), name="bn2", eps=1e-4)
    x = mx.sym.Activation(x, act_type="relu", name="relu2")
    x = mx.sym.FullyConnected(x, num_hidden=3, name="fc")
    symbol = mx.sym.SoftmaxOutput(x, name="softmax")
    params = {
        "arg:conv_weight": mx.nd.array(rng.normal(size=(4, 2, 3, 3))),
        "arg:conv_bias": mx.nd.array(rng.normal(size=4)),
        "arg:fc_weight": mx.nd.array(rng.normal(size=(3, 36))),
        "arg:fc_bias": mx.nd.array(rng.normal(size=3)),
        **batchnorm_params(rng, "bn1", 4),
        **batchnorm_params(rng, "bn2", 4),
    }
    return symbol, params


def run(symbol, params, **inputs):
    values = {re.sub("^(arg|aux):", "", k): v for k, v in {**params, **inputs}.items()}
    args, aux = symbol.list_arguments(), symbol.list_auxiliary_states()
    executor = symbol.bind(
        mx.cpu(), {k: values[k] for k in args}, aux_states={k: values[k] for k in aux}
    )
    return executor.forward(is_train=False)[0]


def test_fold_a_module_model(rng):
    symbol, params = module_model(rng)
    before = {name: value.asnumpy() for name, value in params.items()}
    inputs = {"data": mx.nd.array(rng.normal(size=(2, 2, 5, 5))), "softmax_label": mx.nd.zeros(2)}
    folded, values, report = fold(symbol, params)
    assert difference(run(symbol, params, **inputs), run(folded, values, **inputs)) < EXACT
    assert [row.node for row in report.folded] == ["bn1"]
    assert [(row.node, row.result) for row in report.kept] == [("bn2", "1x1 depthwise Convolution")]
    assert "BatchNorm" not in folded.tojson()
    assert all(name.startswith("arg:") for name in values)
    for name, value in params.items():
        np.testing.assert_array_equal(value.asnumpy(), before[name])


def test_fold_keeps_the_kind_of_names(rng):
    symbol, params = module_model(rng)
    plain = {name[4:]: value for name, value in params.items()}
    _, values, _ = fold(symbol, plain)
    assert "conv_weight" in values
    assert not any(":" in name for name in values)


def test_fold_without_knowing_the_rank(rng):
    symbol = mx.sym.BatchNorm(mx.sym.var("data"), name="bn", fix_gamma=False)
    params = batchnorm_params(rng, "bn", 3)
    x = mx.nd.array(rng.normal(size=(2, 3, 4)))
    unknown, values, report = fold(symbol, params)
    assert "give the input shapes" in report.kept[0].because
    assert "BatchNorm" in unknown.tojson()
    assert difference(run(symbol, params, data=x), run(unknown, values, data=x)) < EXACT
    for shapes, stated in (({"data": x.shape}, None), (None, (0, 3, 0)), (None, x.shape)):
        data = mx.sym.var("data", shape=stated)
        known, values, _ = fold(
            mx.sym.BatchNorm(data, name="bn", fix_gamma=False), params, shapes=shapes
        )
        assert ("BatchNorm" in known.tojson()) == (stated == (0, 3, 0))
        assert difference(run(symbol, params, data=x), run(known, values, data=x)) < EXACT


def test_fold_leaves_a_norm_with_computed_parameters(rng):
    x, gamma = mx.sym.var("data"), mx.sym.var("gamma_of_condition") * 2
    symbol = mx.sym.BatchNorm(x, gamma, name="bn", fix_gamma=False)
    params = {k: v for k, v in batchnorm_params(rng, "bn", 3).items() if "gamma" not in k}
    folded, _, report = fold(symbol, params)
    assert "computed in the graph" in report.kept[0].because
    assert '"use_global_stats": "True"' in folded.tojson()


def test_fold_leaves_a_norm_whose_statistics_are_outputs(rng):
    symbol = mx.sym.BatchNorm(mx.sym.var("data"), name="bn", output_mean_var=True)
    folded, values, report = fold(symbol, batchnorm_params(rng, "bn", 3))
    assert report.kept[0].because == "its statistics are outputs too"
    assert folded.list_outputs() == symbol.list_outputs()
    assert len(values) == 4


def test_refuses_a_weight_that_is_no_parameter(rng):
    data, weight = mx.sym.var("data"), mx.sym.var("kernels")
    symbol = mx.sym.BatchNorm(mx.sym.Convolution(data, weight, **ONE_BY_ONE), name="bn")
    params = batchnorm_params(rng, "bn", 4)
    _, _, report = fold(symbol, params)
    assert "kernels is not a parameter" in report.kept[0].because


def trained_export(tmp_path, rng):
    net = sequential(nn.Conv2D(4, 3), ScratchBatchNorm(epsilon=1e-3), nn.Dropout(0.5))
    net.hybridize()
    y, x = prepared(net, rng, (2, 3, 6, 6))
    net.export(str(tmp_path / "net"))
    return y, x


def test_fold_reduces_our_training_graph_to_inference(rng, tmp_path):
    y, x = trained_export(tmp_path, rng)
    folded, values, report = fold(tmp_path / "net-symbol.json", tmp_path / "net-0000.params")
    assert difference(y, run(folded, values, data=x)) < EXACT
    ops = {node["op"] for node in json.loads(folded.tojson())["nodes"]}
    assert not {"Dropout", "sgd_mom_update", "where"} & ops
    assert len(report.folded) + len(report.kept) == 1


def test_fold_folds_our_training_graph_if_it_describes_its_layers(rng, tmp_path):
    y, x = trained_export(tmp_path, rng)
    symbol = json.loads((tmp_path / "net-symbol.json").read_text())
    last = [n for n in symbol["nodes"] if n["op"] == "reshape_like"][-1]
    layer = last["name"].removesuffix("_fwd")
    names = {name: f"{layer}_{name}" for name in helpers.STATE}
    options = {"axis": 1, "epsilon": 1e-3, "fix_gamma": False, "center": True}
    last["attrs"] = {MARKER: json.dumps({**options, **names})}
    (tmp_path / "net-symbol.json").write_text(json.dumps(symbol))
    folded, values, report = fold(tmp_path / "net-symbol.json", tmp_path / "net-0000.params")
    assert [row.result.split()[0] for row in report.folded] == ["folded"]
    assert difference(y, run(folded, values, data=x)) < EXACT
    assert [n["op"] for n in json.loads(folded.tojson())["nodes"]].count("Convolution") == 1

    last["attrs"] = {MARKER: "{}"}
    (tmp_path / "net-symbol.json").write_text(json.dumps(symbol))
    with pytest.raises(ValueError, match=f"{MARKER} of node '{last['name']}' is damaged"):
        fold(tmp_path / "net-symbol.json", tmp_path / "net-0000.params")


# --- bad input --------------------------------------------------------------------------------


def test_bad_files(rng, tmp_path):
    symbol, params = module_model(rng)
    text, garbage = tmp_path / "net-symbol.json", tmp_path / "garbage"
    symbol.save(str(text))
    garbage.write_text("garbage")
    with pytest.raises(ValueError, match="garbage' is not an MXNet symbol file"):
        fold(garbage, params)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fold(tmp_path / "nowhere", params)
    with pytest.raises(ValueError, match="garbage' is not an MXNet parameter file"):
        fold(text, garbage)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fold(text, tmp_path / "nowhere")
    mx.nd.save(str(garbage), [mx.nd.ones(3)])
    with pytest.raises(ValueError, match="1 arrays without names"):
        fold(text, garbage)
    text.write_text(text.read_text().replace('"Convolution"', '"Convolved"'))
    with pytest.raises(ValueError, match=r"operator 'Convolved' of node 'conv' in .* is unknown"):
        fold(text, params)
    for symbol_like in (3, None):
        with pytest.raises(TypeError, match="symbol must be a Symbol or a path"):
            fold(symbol_like, params)
    with pytest.raises(TypeError, match="params must be a dict or a path, got list"):
        fold(symbol, [])
    with pytest.raises(TypeError, match="got 'conv_weight': ndarray"):
        fold(symbol, {"conv_weight": np.ones(3)})


@pytest.mark.parametrize(
    "name", ["arg:conv_weight", "arg:bn1_gamma", "aux:bn2_moving_var", "arg:fc_bias"]
)
def test_a_missing_parameter_is_named(name, rng):
    symbol, params = module_model(rng)
    del params[name]
    with pytest.raises(ValueError, match=f"'{name[4:]}' of the symbol is missing"):
        fold(symbol, params)


def test_parameters_that_do_not_match(rng):
    symbol, params = module_model(rng)
    with pytest.raises(ValueError, match="must have one shape"):
        fold(symbol, {**params, "arg:bn1_beta": mx.nd.ones(5)})
    with pytest.raises(
        ValueError, match=r"'conv_weight' of shape .* has 5 output channels.* has 4"
    ):
        fold(symbol, {**params, "arg:conv_weight": mx.nd.ones((5, 2, 3, 3))})
    with pytest.raises(ValueError, match="bn1_moving_var' must not be negative, got -1"):
        fold(symbol, {**params, "aux:bn1_moving_var": -mx.nd.ones(4)})
    with pytest.raises(ValueError, match=r"shapes must name inputs .data, softmax_label., got 'x'"):
        fold(symbol, params, shapes={"x": (1, 2)})
    shapes = {"data": (2, 9, 5, 5), "softmax_label": (2,)}
    with pytest.raises(ValueError, match="do not match the symbol: Error in operator conv"):
        fold(symbol, params, shapes=shapes)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def model_files(rng, tmp_path):
    symbol, params = module_model(rng)
    symbol.save(str(tmp_path / "model-symbol.json"))
    mx.nd.save(str(tmp_path / "model-0000.params"), params)
    return [str(tmp_path / f"model-{end}") for end in ("symbol.json", "0000.params")]


def test_command(model_files, tmp_path, capsys):
    out = str(tmp_path / "folded")
    shapes = ["--shape", "data=2,2,5,5", "--shape", "softmax_label=2"]
    assert cli.main(["fold", *model_files, "--out", out, "--all", *shapes]) == 0
    printed = capsys.readouterr().out
    assert re.search("bn1 +folded into conv", printed)
    assert re.search(r"bn2 +1x1 depthwise Convolution +it follows relu \(Activation\)", printed)
    value, size = map(float, re.search(r"random input: (\S+), of (\S+)", printed).groups())
    assert 0 <= value < EXACT
    assert 0.3 < size <= 1  # of a softmax over three classes
    assert set(operators(out)) == {"Convolution", "Activation", "FullyConnected", "SoftmaxOutput"}


def test_command_without_shapes(model_files, tmp_path, capsys):
    out = str(tmp_path / "folded")
    (tmp_path / "folded-0000.params").touch()
    assert cli.main(["fold", *model_files, "--out", out, "--style", "affine"]) == 0
    printed = capsys.readouterr().out
    assert "not measured, give --shape data=N,C,..." in printed
    assert "bn1" not in printed and "bn2" in printed, "what is folded is not listed"
    assert printed.splitlines()[-1] == "1 folded, 1 kept (--all shows the folded ones)"
    assert f"\nwritten, in place of what was there: {out}-symbol.json, {out}-0000" in printed
    assert "broadcast_mul" in operators(out)


def test_command_with_bad_input(model_files, tmp_path, capsys):
    out = ["--out", str(tmp_path / "folded")]
    assert cli.main(["fold", model_files[1], model_files[1], *out]) == 1
    assert "is not an MXNet symbol file" in capsys.readouterr().err
    assert cli.main(["fold", *model_files, "--out", str(tmp_path / "nowhere" / "x")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["fold", *model_files, *out, "--shape", "x=1,2"]) == 1
    assert "shapes must name inputs" in capsys.readouterr().err
    for bad in ("data", "data=", "=1,2", "data=1,x", "data=0,1"):
        with pytest.raises(SystemExit):
            cli.main(["fold", *model_files, *out, "--shape", bad])
        assert "expected NAME=N,C" in capsys.readouterr().err
    assert not (tmp_path / "folded-symbol.json").exists()
