"""Files of every age: 0.x and 1.x JSON, Python 2's longs, AMP, int8, oneDNN, and other norms."""

import json
import logging

from scratchbn import convert_files
from scratchbn.deploy import (
    complete_shapes,
    export_inference,
    fold,
    largest_difference,
    write_model,
)

import mxnet as mx
import numpy as np
import pytest
from inference_files import inferring
from mxnet.contrib import quantization
from mxnet.gluon import nn

S = mx.sym
SHAPE = (2, 3, 9, 9)
EXACT = 1e-5


def values(symbol, rng, **shapes):
    arguments, _, auxiliary = symbol.infer_shape(**shapes)
    named = dict(zip(symbol.list_arguments(), arguments))
    named |= dict(zip(symbol.list_auxiliary_states(), auxiliary))
    return {n: mx.nd.array(rng.uniform(0.5, 2, s)) for n, s in named.items() if n not in shapes}


def norm_of_convolution(operator=S.BatchNorm, **options):
    x = S.Convolution(S.var("data"), kernel=(3, 3), num_filter=4, name="conv")
    return operator(x, name="bn", **{"fix_gamma": False, **options})


def check(symbol, params, tmp_path, before=None, converted=1, folded=1):
    """Convert, convert back, fold, infer; compare all with the model before."""
    before, shapes = before or (symbol, params), {"data": SHAPE}
    ours, theirs, report = convert_files(symbol, params, to="scratch")
    assert len(report.converted) == converted
    back = convert_files(ours, theirs, to="builtin")[:2]
    less, fewer, fold_report = fold(symbol, params)
    assert len(fold_report.folded) == folded
    infers = inferring(symbol, params, tmp_path, shapes=shapes)
    assert "Norm" not in infers[0].tojson().replace("__batch_norm__", "")
    for model in ((ours, theirs), back, (less, fewer), infers):
        difference, size = largest_difference(before, model, shapes)
        assert difference < EXACT * size
    return report, fold_report


def written(tmp_path, document):
    path = tmp_path / "net-symbol.json"
    path.write_text(json.dumps(document))
    return path


def test_json_of_0_8(rng, tmp_path):
    modern = norm_of_convolution(eps=0.5)
    params = values(modern, rng, data=SHAPE)

    def node(op, name, *inputs, attr=None, **param):
        inputs = [[i, 0] for i in inputs]
        more = {"attr": attr} if attr else {}
        return {"op": op, "param": param, "name": name, "inputs": inputs, **more} | {
            "backward_source_id": -1
        }

    nodes = [
        node("null", "data"),
        node("null", "conv_weight", attr={"lr_mult": "2"}),
        node("null", "conv_bias"),
        node("Convolution", "conv", 0, 1, 2, kernel="(3L, 3L)", num_filter="4L", no_bias="False"),
        node("null", "bn_gamma"),
        node("null", "bn_beta"),
        node("BatchNorm", "bn", 3, 4, 5, eps="0.5", fix_gamma="False", attr={"ctx_group": "a"}),
    ]
    old = {"nodes": nodes, "arg_nodes": [0, 1, 2, 4, 5], "heads": [[6, 0]]}
    check(written(tmp_path, old), params, tmp_path, (modern, params))


@pytest.mark.parametrize("key", ["attr", "attrs"])
@pytest.mark.parametrize("versions", [{}, {"attrs": {"mxnet_version": ["int", 10000]}}], ids=str)
def test_json_of_1_0(key, versions, rng, tmp_path):
    modern = norm_of_convolution()
    params = values(modern, rng, data=SHAPE)
    document = json.loads(modern.tojson())
    old = {k: document[k] for k in ("nodes", "arg_nodes", "heads")} | versions
    for node in old["nodes"]:
        if "attrs" in node:
            node[key] = node.pop("attrs")
    check(written(tmp_path, old), params, tmp_path, (modern, params))


@pytest.mark.parametrize("attribute", ["kernel", "num_filter", "__shape__", "axis"])
def test_longs_of_python_2(attribute, rng, tmp_path):
    x = S.Convolution(S.var("data", shape=SHAPE), kernel=(3, 3), num_filter=4, name="conv5L")
    modern = S.BatchNorm(x, name="bn", fix_gamma=False, axis=1)
    params = values(modern, rng, data=SHAPE)
    document = json.loads(modern.tojson())
    longs = {
        "kernel": "(3L, 3L)",
        "num_filter": "4L",
        "__shape__": "(2L,3L, 9L, 9L)",
        "axis": "1L",
    }
    changed = 0
    for node in document["nodes"]:
        if attribute in node.get("attrs", {}):
            node["attrs"][attribute] = longs[attribute]
            changed += 1
    assert changed
    check(written(tmp_path, document), params, tmp_path, (modern, params))


def test_a_symbol_that_was_loaded_with_longs(rng, tmp_path):
    text = norm_of_convolution().tojson().replace('"(3, 3)"', '"(3L, 3L)"')
    assert "3L" in text
    symbol = mx.sym.load_json(text)
    check(symbol, values(symbol, rng, data=SHAPE), tmp_path)


def test_the_norm_of_cudnn(rng, tmp_path):
    modern = norm_of_convolution(eps=1e-3, cudnn_off=False)
    params = values(modern, rng, data=SHAPE)
    document = json.loads(modern.tojson().replace('"BatchNorm"', '"CuDNNBatchNorm"'))
    check(written(tmp_path, document), params, tmp_path, (modern, params))


@pytest.mark.parametrize("options", [{}, {"eps": 0.01}, {"fix_gamma": True}], ids=str)
def test_batchnorm_v1(options, rng, tmp_path):
    symbol = norm_of_convolution(S.BatchNorm_v1, **options)
    check(symbol, values(symbol, rng, data=SHAPE), tmp_path)


def test_syncbatchnorm_says_whose_statistics_it_has(rng, tmp_path):
    symbol = norm_of_convolution(S.contrib.SyncBatchNorm, key="k", ndev=1)
    report, _ = check(symbol, values(symbol, rng, data=SHAPE), tmp_path)
    assert "each device now has statistics of its own" in report.notes[0].text


OPERATORS = {
    "BatchNorm": (S.BatchNorm, "double"),
    "BatchNorm_v1": (S.BatchNorm_v1, "single"),
    "SyncBatchNorm": (S.contrib.SyncBatchNorm, "single"),
}


@pytest.mark.parametrize("stated", [None, 0.001, 0.1], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_epsilon_is_the_operators_own(operator, stated, rng, tmp_path):
    make, precision = OPERATORS[operator]
    options = {} if stated is None else {"eps": stated}
    options |= {"key": "k"} if operator == "SyncBatchNorm" else {}
    symbol = make(S.var("data"), name="bn", fix_gamma=False, **options)
    params = {
        f"bn_{name}": mx.nd.array(rng.uniform(1e-4, 1e-3, 3), dtype="float64")
        for name in ("gamma", "beta", "moving_mean", "moving_var")
    }
    stated = 0.001 if stated is None else stated
    single = precision == "single" or not options.get("eps")
    eps = np.float64(np.float32(stated)) if single else stated
    gamma, beta, mean, var = (params[name].asnumpy() for name in params)
    ours = convert_files(symbol, params, to="scratch")[0]
    described = next(a for a in ours.attr_dict().values() if "__batch_norm__" in a)
    assert json.loads(described["__batch_norm__"])["epsilon"] == eps
    constants = fold(symbol, params, shapes={"data": (4, 3)}, style="affine")[1]
    scale = gamma / np.sqrt(var + eps)
    np.testing.assert_allclose(constants["bn_scale"].asnumpy()[0], scale, rtol=1e-14)
    shift = beta - mean * scale
    np.testing.assert_allclose(constants["bn_shift"].asnumpy()[0], shift, rtol=1e-12)
    infers, _ = inferring(symbol, params, tmp_path, shapes={"data": (4, 3)}, verify=False)
    attributes = infers.attr_dict().values()
    (added,) = [float(a["scalar"]) for a in attributes if "scalar" in a]
    assert added == eps


def casts(symbol):
    return symbol.tojson(remove_amp_cast=False).count('"amp_cast"')


def test_the_casts_of_amp_are_kept(rng, tmp_path):
    x = S.amp_cast(S.var("data"), dtype="float16")
    x = S.broadcast_mul(x, S.var("weight", shape=(1, 3, 1, 1)))
    symbol = S.BatchNorm(S.amp_cast(x, dtype="float32"), fix_gamma=False, name="bn")
    params = values(symbol, rng, data=SHAPE)
    params["weight"] = params["weight"].astype("float16")
    path = tmp_path / "net-symbol.json"
    symbol.save(str(path), remove_amp_cast=False)
    check(path, params, tmp_path, (symbol, params), folded=0)
    for changed, _, _ in (convert_files(path, params, to="scratch"), fold(path, params)):
        assert casts(changed) == 2
        write_model(tmp_path / "out", changed, params)
        assert casts(mx.sym.load(str(tmp_path / "out-symbol.json"))) == 2
    assert casts(inferring(path, params, tmp_path)[0]) == 2


def test_labels_are_inferred(rng):
    symbol = S.BatchNorm(S.transpose(S.var("data"), axes=(0, 2, 1)), name="bn", fix_gamma=False)
    symbol = S.SoftmaxOutput(S.Flatten(symbol), S.var("answer"), name="softmax")
    params = values(symbol, rng, data=(2, 3, 4), answer=(2,))
    shapes = {"data": (2, 3, 4)}
    assert complete_shapes(symbol, params, shapes)["answer"] == (2,)
    # Behind a transpose the rank is known from the shapes alone.
    folded, fewer, report = fold(symbol, params, shapes=shapes)
    assert [row.result for row in report.kept] == ["1x1 depthwise Convolution"]
    difference, size = largest_difference((symbol, params), (folded, fewer), shapes)
    assert difference < EXACT * size


# --- int8 and oneDNN --------------------------------------------------------------------------


def two_blocks():
    x = S.var("data")
    for i in range(2):
        x = S.Convolution(x, kernel=(3, 3), num_filter=4, name=f"conv{i}")
        x = S.relu(S.BatchNorm(x, name=f"bn{i}", fix_gamma=False), name=f"relu{i}")
    return S.FullyConnected(x, num_hidden=3, name="fc")


def quantized(symbol, params, rng, mode, **options):
    logging.disable(logging.CRITICAL)
    auxiliary = set(symbol.list_auxiliary_states())
    arguments = {n: v for n, v in params.items() if n not in auxiliary}
    states = {n: v for n, v in params.items() if n in auxiliary}
    data = mx.io.NDArrayIter(mx.nd.array(rng.normal(size=(4, *SHAPE[1:]))), batch_size=2)
    options |= {"calib_mode": "naive", "calib_data": data, "num_calib_examples": 4}
    try:
        symbol, arguments, states = quantization.quantize_model(
            symbol,
            arguments,
            states,
            label_names=None,
            quantize_mode=mode,
            quantized_dtype="auto",
            **options,
        )
    finally:
        logging.disable(logging.NOTSET)
    return symbol, {**arguments, **states}


def same(before, model):
    difference, size = largest_difference(before, model, {"data": SHAPE})
    assert difference < 0.02 * size  # int8 steps, where a float32 rounding tips the scale


def test_onednn_subgraphs_are_named(rng, tmp_path):
    symbol = two_blocks()
    params = values(symbol, rng, data=SHAPE)
    fused = symbol.get_backend_symbol("MKLDNN")
    folded, fewer, report = fold(fused, params)
    assert [row.because for row in report.kept] == ["oneDNN has fused it"] * 2
    _, _, report = convert_files(fused, params, to="scratch")
    assert [entry.text for entry in report.skipped] == ["oneDNN has fused BatchNorm"] * 2
    same((fused, params), (folded, fewer))
    assert nodes(inferring(fused, params, tmp_path)[0]) == nodes(fused)


def test_norms_in_int8_are_named(rng, tmp_path):
    symbol = two_blocks()
    params, layers = values(symbol, rng, data=SHAPE), ["conv0", "conv1", "fc"]
    model = quantized(symbol, params, rng, "full", excluded_sym_names=layers)
    folded, fewer, report = fold(*model)
    assert [(row.node, row.because) for row in report.kept] == [
        ("quantized_bn0", "it is computed in int8"),
        ("quantized_bn1", "it is computed in int8"),
    ]
    ours, _, report = convert_files(*model, to="scratch")
    assert len(report.skipped) == 2 and "computed in int8" in str(report)
    # This norm runs with ranges alone that MXNet measures elsewhere, so its nodes are compared.
    assert nodes(folded) == nodes(ours) == nodes(model[0])
    assert nodes(inferring(*model, tmp_path)[0]) == nodes(model[0])
    assert set(fewer) == set(model[0].list_inputs()) - {"data"}


def nodes(symbol):
    return [(n["op"], n["name"], n["inputs"]) for n in json.loads(symbol.tojson())["nodes"]]


def test_what_is_around_int8_is_folded(rng, tmp_path):
    symbol = two_blocks()
    params = values(symbol, rng, data=SHAPE)
    model = quantized(symbol, params, rng, "smart", excluded_sym_names=["conv0"])
    folded, fewer, report = fold(*model)
    assert [row.result for row in report.folded] == ["folded into conv0"]
    assert [row.result for row in report.kept] == ["1x1 depthwise Convolution"]
    same(model, (folded, fewer))
    ours, theirs, report = convert_files(*model, to="scratch")
    assert len(report.converted) == 2
    same(model, (ours, theirs))
    infers = inferring(*model, tmp_path)
    assert "BatchNorm" not in {op for op, *_ in nodes(infers[0])}
    same(model, infers)


def test_a_net_under_amp_is_exported_as_before(rng, tmp_path):
    class Casting(nn.HybridSequential):
        def hybrid_forward(self, F, x):
            return super().hybrid_forward(F, F.amp_cast(x, dtype="float32"))

    net = Casting()
    net.add(nn.Conv2D(3, 1), nn.BatchNorm())
    net.initialize()
    x = mx.nd.array(rng.normal(size=SHAPE))
    net(x)
    assert len(export_inference(net, tmp_path / "net", x).folded) == 1
    assert casts(mx.sym.load(str(tmp_path / "net-symbol.json"))) == 0


def test_a_net_without_parameters(tmp_path):
    write_model(tmp_path / "net", S.Dropout(S.var("data")), {})
    symbol, values, report = fold(tmp_path / "net-symbol.json", tmp_path / "net-0000.params")
    assert (symbol.list_inputs(), values, report.kept) == (["data"], {}, ())
