"""Inputs without a stated type: every operator is read, what a CPU cannot run is written."""

import re

from scratchbn import cli, convert_files
from scratchbn.deploy import fold, largest_difference
from scratchbn.deploy._inference import infer_types
from scratchbn.deploy.check import compare_outputs, run_symbol

import mxnet as mx
import numpy as np
import pytest
from inference_files import inferring

S = mx.sym
SHAPE = (2, 3, 8, 8)
EXACT = 1e-5


@mx.operator.register("scratchbn_test_head")
class Head(mx.operator.CustomOpProp):
    """A custom operator that doubles its input."""

    def infer_shape(self, shapes):
        return shapes, [shapes[0]], []

    def create_operator(self, *_):
        class Doubles(mx.operator.CustomOp):
            def forward(self, is_train, req, in_data, out_data, aux):
                self.assign(out_data[0], req[0], in_data[0] * 2)

        return Doubles()


OPERATORS = {
    "Dropout": lambda x: S.Dropout(x, p=0.5),
    "UpSampling": lambda x: S.UpSampling(x, scale=2, sample_type="nearest"),
    "SwapAxis": lambda x: S.SwapAxis(x, dim1=2, dim2=3),
    "LRN": lambda x: S.LRN(x, nsize=3),
    "Embedding": lambda x: S.Embedding(
        S.slice_axis(x, axis=3, begin=0, end=1), S.var("table"), input_dim=4, output_dim=4
    ).reshape((0, 0, 0, -1)),
    "SequenceMask": lambda x: S.SequenceMask(x),
    "ROIAlign": lambda x: S.contrib.ROIAlign(
        x, S.var("rois", shape=(2, 5)), pooled_size=(8, 8), spatial_scale=1.0
    ),
    "quantize_v2": lambda x: S.contrib.dequantize(
        *S.contrib.quantize_v2(x, min_calib_range=-3.0, max_calib_range=3.0)
    ),
    "BatchNorm_v1": lambda x: S.BatchNorm_v1(x, name="v1", fix_gamma=False),
    "SyncBatchNorm": lambda x: S.contrib.SyncBatchNorm(x, key="k", name="sync"),
    "Crop": lambda x: S.Crop(x, h_w=(4, 4), num_args=1),
    "custom": lambda x: S.Custom(x, op_type="scratchbn_test_head"),
}


def values(symbol, rng, dtype="float32", **shapes):
    """Return random parameters, the norms' in float32 unless all is float64."""
    arguments, _, auxiliary = symbol.infer_shape(**shapes)
    named = dict(zip(symbol.list_arguments(), arguments))
    named |= dict(zip(symbol.list_auxiliary_states(), auxiliary))
    of_norm = re.compile("(gamma|beta|mean|var)$")
    return {
        name: mx.nd.array(
            rng.uniform(0.5, 1.5, shape),
            dtype="float32" if of_norm.search(name) and dtype == "float16" else dtype,
        )
        for name, shape in named.items()
        if name not in shapes and name != "rois"
    }


def layers(x, i=""):
    x = S.Convolution(x, kernel=(1, 1), num_filter=3, name=f"conv{i}")
    return S.BatchNorm(x, fix_gamma=False, name=f"bn{i}")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_that_need_a_type(operator, before, rng, tmp_path):
    make = OPERATORS[operator]
    symbol = layers(make(S.var("data"))) if before else layers(make(layers(S.var("data"))), 2)
    params = values(symbol, rng, data=SHAPE)
    shapes = {"data": SHAPE} | ({"rois": (2, 5)} if operator == "ROIAlign" else {})
    ours, theirs, report = convert_files(symbol, params, to="scratch")
    assert report.converted and not report.skipped
    back = convert_files(ours, theirs, to="builtin")[:2]
    infers = [inferring(*model, tmp_path) for model in ((symbol, params), (ours, theirs))]
    assert "BatchNorm" not in {node.attr("op") for node in infers[0][0].get_internals()}
    folded = [fold(*model)[:2] for model in ((symbol, params), (ours, theirs))]
    for model in ((ours, theirs), back, *folded, *infers):
        difference, size = largest_difference((symbol, params), model, shapes)
        assert difference < EXACT * size


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_inputs_have_the_type_of_the_parameters(dtype, rng):
    symbol = layers(S.Dropout(S.var("data")))
    types, outputs = infer_types(symbol, values(symbol, rng, dtype, data=SHAPE), {})
    assert types["data"] == outputs[0] == np.dtype(dtype)
    assert types["bn_gamma"] == (np.float64 if dtype == "float64" else np.float32)


def test_without_parameters_inputs_are_float32():
    assert infer_types(S.Dropout(S.var("data")), {}, {})[1] == [np.dtype("float32")]


def test_types_that_are_stated_or_given_come_first(rng):
    symbol = S.Cast(S.var("data", dtype="int32"), dtype="float32") * S.var("other")
    types, _ = infer_types(symbol, {"conv_weight": mx.nd.ones(3)}, {"other": np.float32})
    assert [types["data"], types["other"]] == [np.dtype("int32"), np.dtype("float32")]


def test_inputs_of_several_types(rng):
    x = S.FullyConnected(S.Dropout(S.var("a")), num_hidden=3, name="half")
    y = S.FullyConnected(S.Dropout(S.var("b")), num_hidden=3, name="single")
    params = {f"half_{n}": mx.nd.ones(s, dtype="float16") for n, s in FC.items()}
    params |= {f"single_{n}": mx.nd.ones(s) for n, s in FC.items()}
    types, _ = infer_types(S.Group([x, y]), params, {})
    assert [types["a"], types["b"]] == [np.dtype("float16"), np.dtype("float32")]


FC = {"weight": (3, 2), "bias": (3,)}


def test_types_that_never_fit_are_refused(rng):
    symbol = layers(S.var("data"))
    params = values(symbol, rng, data=SHAPE)
    params["conv_bias"] = params["conv_bias"].astype("float64")
    for action in (fold, lambda *model: convert_files(*model, to="scratch")):
        with pytest.raises(ValueError, match="do not match the symbol: Error in operator conv"):
            action(symbol, params)


@pytest.mark.parametrize("command", [["fold"], ["convert", "--to", "scratch"]], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_commands_on_files_of_any_type(dtype, command, rng, tmp_path, capsys):
    symbol = S.FullyConnected(layers(S.Dropout(S.var("data"))), num_hidden=2, name="fc")
    symbol = S.SoftmaxOutput(symbol, name="softmax")  # its label is inferred
    params = values(symbol, rng, dtype, data=SHAPE, softmax_label=(2,))
    symbol.save(str(tmp_path / "net-symbol.json"))
    mx.nd.save(str(tmp_path / "net.params"), params)
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net.params")]
    out = ["--out", str(tmp_path / "out"), "--shape", "data=2,3,8,8"]
    assert cli.main([command[0], *files, *out, *command[1:]]) == 0
    said = capsys.readouterr().out
    if dtype == "float16":
        assert re.search(r"not measured, the model cannot run on .*(FP16|float16)", said)
    else:
        difference, size = map(float, re.search(r"input: (\S+), of (\S+)", said).groups())
        assert difference < EXACT * size
    written = mx.nd.load(str(tmp_path / "out-0000.params"))
    assert written["arg:conv_weight"].dtype == np.dtype(dtype)
    for end in ("symbol.json", "0000.params"):
        assert (tmp_path / f"out-{end}").exists()


def test_shapes_that_do_not_fit_are_an_error_not_a_note(rng, tmp_path, capsys):
    symbol = layers(S.var("data"))
    symbol.save(str(tmp_path / "net-symbol.json"))
    mx.nd.save(str(tmp_path / "net.params"), values(symbol, rng, data=SHAPE))
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net.params")]
    out = ["--out", str(tmp_path / "out"), "--shape", "data=2,5,8,8"]
    assert cli.main(["convert", *files, "--to", "scratch", *out]) == 1
    assert re.search("does not take .*Error in operator conv", capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))


def test_float16_constants_where_the_input_is_float16(rng):
    symbol = S.relu(S.BatchNorm(S.relu(S.var("data")), name="bn", fix_gamma=False))
    symbol = S.broadcast_mul(symbol, S.var("weight", shape=(1, 3)))
    params = values(symbol, rng, "float16", data=(2, 3))
    folded, constants, _ = fold(symbol, params, shapes={"data": (2, 3)})
    assert constants["bn_scale"].dtype == np.float16
    x = {"data": mx.nd.array(rng.normal(size=(2, 3)), dtype="float16")}
    expected = run_symbol(symbol, params, x)
    difference, size = compare_outputs(run_symbol(folded, constants, x), expected)
    assert difference < 5e-3 * size


def test_equal_outputs_that_are_no_numbers_do_not_differ():
    odd = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert compare_outputs([odd], [odd])[0] == 0
    assert compare_outputs([odd], [odd[::-1]])[0] == np.inf
