"""Rewritten models that are wrong: made so on purpose, refused with the node's name."""

from importlib import import_module

from scratchbn import ScratchBatchNorm, cli, convert_files
from scratchbn.deploy import (
    _to_builtin,
    _to_scratch,
    export_inference,
    fold,
    inference_symbol,
    write_inference_symbol,
)
from scratchbn.deploy._verify import verify

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

S = mx.sym
read = import_module("scratchbn.deploy._lower.read")
SHAPE = (2, 3, 7, 7)
SHAPES = {"data": SHAPE}
EPSILON = 1e-5


def model():
    """Two layers with a norm each; the second is the one that is rewritten wrong."""
    x = S.var("data")
    for i in range(2):
        x = S.Convolution(x, kernel=(3, 3), num_filter=4, name=f"conv{i}")
        x = S.BatchNorm(x, fix_gamma=False, eps=EPSILON, name=f"bn{i}")
        x = S.relu(x, name=f"relu{i}")
    return S.FullyConnected(x, num_hidden=3, name="fc")


def values_of(symbol, rng, dtype="float32", **shapes):
    found, _, more = symbol.infer_shape(**(shapes or SHAPES))
    named = [*zip(symbol.list_arguments(), found), *zip(symbol.list_auxiliary_states(), more)]
    drawn = {n: rng.uniform(0.5, 1.5, s) if "var" in n else rng.normal(size=s) for n, s in named}
    inputs = shapes or SHAPES
    return {n: mx.nd.array(value, dtype=dtype) for n, value in drawn.items() if n not in inputs}


# Each spoils the second norm only, and returns what takes the place of a function of the product.


def in_folding(spoil):
    right, calls = read.scale_and_shift, []

    def wrong(*arguments):
        calls.append(None)
        scale, shift = right(*arguments)
        return (spoil(scale), shift) if len(calls) == 2 else (scale, shift)

    return read, "scale_and_shift", wrong


def in_options(**options):
    right = _to_scratch._options

    def wrong(node):
        return {**right(node), **(options if node.name == "bn1" else {})}

    return _to_scratch, "_options", wrong


def in_attributes(**options):
    right = _to_builtin._attributes

    def wrong(about):
        second = about["gamma"] == "bn1_gamma"
        return {**right(about), **(options if second else {})}

    return _to_builtin, "_attributes", wrong


def in_roles(module):
    right = module.check_parameters

    def wrong(node, names, values):
        right(node, names, values)
        if node.name == "bn1":
            names["gamma"], names["beta"] = names["beta"], names["gamma"]

    return module, "check_parameters", wrong


def in_call(name, **changes):
    right = getattr(inference_symbol, name)

    def wrong(node, *more, **options):
        call = right(node, *more, **options)
        if call is not None and call.node.name == "bn1":
            for key, change in changes.items():
                setattr(call, key, change(getattr(call, key)))
        return call

    return inference_symbol, name, wrong


def swapped(parameters):
    return (parameters[1], parameters[0], *parameters[2:])


FOLD = [
    ("a wrong factor", lambda: in_folding(lambda scale: scale * 1.0001)),
    ("channels swapped", lambda: in_folding(lambda scale: scale[::-1])),
    ("no epsilon", lambda: in_folding(lambda scale: scale * np.sqrt(1 + EPSILON))),
]
INFER = [
    ("a wrong factor", "scale", lambda value: False),
    ("parameters swapped", "parameters", swapped),
    ("no epsilon", "epsilon", lambda value: 0.0),
]
CASES = [
    *[("fold", "theirs", *case, r"node 'conv1', into which 'bn1' was folded:") for case in FOLD],
    *[("fold", "ours", *case, r"node 'conv1', into which 'bn1' was folded:") for case in FOLD],
    ("scratch", "theirs", "a wrong factor", lambda: in_options(scale=False), "node 'bn1':"),
    ("scratch", "theirs", "parameters swapped", lambda: in_roles(_to_scratch), "node 'bn1':"),
    ("scratch", "theirs", "no epsilon", lambda: in_options(epsilon=1e-12), "node 'bn1':"),
    ("builtin", "ours", "a wrong factor", lambda: in_attributes(fix_gamma="True"), "node 'bn1':"),
    ("builtin", "ours", "parameters swapped", lambda: in_roles(_to_builtin), "node 'bn1':"),
    ("builtin", "ours", "no epsilon", lambda: in_attributes(eps="1e-12"), "node 'bn1':"),
    *[
        ("infer", which, what, lambda k=key, c=change, f=find: in_call(f, **{k: c}), "node 'bn1':")
        for which, find in (("theirs", "_builtin"), ("ours", "described"))
        for what, key, change in INFER
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a model with the built-in, and of one with ours."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(3)
    symbol = model()
    params = values_of(symbol, rng)
    ours, _, _ = convert_files(symbol, params, to="scratch")
    for name, graph in (("theirs", symbol), ("ours", ours)):
        graph.save(str(folder / f"{name}-symbol.json"))
        named = symbol.list_auxiliary_states()
        full = {f"{'aux' if n in named else 'arg'}:{n}": v for n, v in params.items()}
        mx.nd.save(str(folder / f"{name}-0000.params"), full)
    return folder


@pytest.mark.parametrize(
    ("action", "which", "what", "plant", "match"), CASES, ids=lambda v: v if type(v) is str else ""
)
def test_what_is_rewritten_wrong_is_refused(
    action, which, what, plant, match, folder, tmp_path, monkeypatch, capsys
):
    symbol, params = str(folder / f"{which}-symbol.json"), str(folder / f"{which}-0000.params")
    calls = {
        "fold": lambda **o: fold(symbol, params, shapes=SHAPES, **o),
        "scratch": lambda **o: convert_files(symbol, params, to="scratch", shapes=SHAPES, **o),
        "builtin": lambda **o: convert_files(symbol, params, to="builtin", shapes=SHAPES, **o),
        "infer": lambda **o: write_inference_symbol(
            symbol, tmp_path / "one", params=params, shapes=SHAPES, **o
        ),
    }
    out = ["--out", str(tmp_path / "out"), "--shape", "data=2,3,7,7"]
    commands = {
        "fold": ["fold", symbol, params],
        "scratch": ["convert", symbol, params, "--to", "scratch"],
        "builtin": ["convert", symbol, params, "--to", "builtin"],
        "infer": ["infer-symbol", symbol, "--params", params],
    }

    def run(function, *arguments, **options):
        with monkeypatch.context() as patched:
            patched.setattr(*plant())
            return function(*arguments, **options)

    with pytest.raises(ValueError, match=f"would not be what it was, at {match} it differs by"):
        run(calls[action])
    run(calls[action], verify=False)
    (tmp_path / "one").unlink(missing_ok=True)

    assert run(cli.main, [*commands[action], *out]) == 1
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run(cli.main, [*commands[action], *out, "--no-verify"]) == 0
    assert "not measured, because of --no-verify" in capsys.readouterr().out
    assert list(tmp_path.iterdir())
    assert cli.main([*commands[action], *out]) == 0
    assert "largest difference on random input" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "plant"), FOLD, ids=lambda v: v if type(v) is str else "")
def test_a_net_that_is_exported_wrong_is_refused(what, plant, tmp_path, monkeypatch):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Conv2D(4, 3), ScratchBatchNorm(), nn.Conv2D(4, 3), ScratchBatchNorm())
    net.initialize()
    zeros = mx.nd.zeros(SHAPE)
    net(zeros)
    for parameter in net.collect_params(".*(gamma|beta|mean)").values():
        parameter.set_data(mx.nd.random.normal(shape=parameter.shape))
    with monkeypatch.context() as patched:
        patched.setattr(*plant())
        with pytest.raises(ValueError, match="at node 'net_batchnorm1_fwd'"):
            export_inference(net, tmp_path / "net", zeros)
    assert not list(tmp_path.iterdir())
    report = export_inference(net, tmp_path / "net", zeros)
    assert report.comparison.difference < 1e-5 * report.comparison.size
    assert export_inference(net, tmp_path / "net", zeros, verify=False).comparison.size is None


# --- what jumps on rounding ---------------------------------------------------------------------


def detector(rng, classes=3, anchors=2):
    """Two scales with a norm each, boxes, and what sorts them; random weights."""
    x, scores, boxes, priors = S.var("data"), [], [], []
    for i in range(2):
        x = S.Convolution(x, kernel=(3, 3), pad=(1, 1), stride=(2, 2), num_filter=8, name=f"c{i}")
        x = S.relu(S.BatchNorm(x, fix_gamma=False, name=f"n{i}"), name=f"r{i}")
        heads = [
            S.Convolution(x, kernel=(3, 3), pad=(1, 1), num_filter=anchors * k, name=f"{n}{i}")
            for n, k in (("score", classes + 1), ("box", 4))
        ]
        flat = [S.Flatten(S.transpose(h, axes=(0, 2, 3, 1))) for h in heads]
        scores.append(flat[0])
        boxes.append(flat[1])
        priors.append(S.contrib.MultiBoxPrior(x, sizes=(0.3, 0.6), ratios=(1,), clip=True))
    score = S.Reshape(S.Concat(*scores, dim=1), shape=(0, -1, classes + 1))
    score = S.softmax(S.transpose(score, axes=(0, 2, 1)), axis=1)
    found = S.contrib.MultiBoxDetection(
        score, S.Concat(*boxes, dim=1), S.Concat(*priors, dim=1), name="found", nms_topk=50
    )
    return S.contrib.box_nms(found, overlap_thresh=0.3, name="nms")


def refolded(symbol, params, **shapes):
    """Return every rewriting of a model, each verified."""
    ours = convert_files(symbol, params, to="scratch", shapes=shapes)
    back = convert_files(*ours[:2], to="builtin", shapes=shapes)
    return [ours, back, fold(symbol, params, shapes=shapes), fold(*ours[:2], shapes=shapes)]


def test_a_detector_passes(rng, tmp_path):
    symbol, shapes = detector(rng), {"data": (2, 3, 32, 32)}
    params = values_of(symbol, rng, **shapes)
    for _, _, report in refolded(symbol, params, **shapes):
        assert report.comparison.difference is not None
    symbol.save(str(tmp_path / "d-symbol.json"))
    mx.nd.save(str(tmp_path / "d-0000.params"), params)
    assert write_inference_symbol(tmp_path / "d-symbol.json", shapes=shapes)


@pytest.mark.parametrize("style", ["dwconv", "affine"])
@pytest.mark.parametrize("jump", ["round", "argsort", "topk", "_greater_scalar", "floor"])
def test_rounding_that_jumps_is_told_from_what_is_wrong(jump, style, rng, monkeypatch):
    # The norm's output is all but constant, and right on the edge of the jump.
    x = S.BatchNorm(S.var("data"), fix_gamma=False, eps=EPSILON, name="bn0")
    options = {"k": 8} if jump == "topk" else {"scalar": 0.5} if "scalar" in jump else {}
    y = getattr(S, jump, getattr(S._internal, jump, None))(x, name="jump", **options)
    y = S.BatchNorm(S.broadcast_add(y, x), fix_gamma=False, eps=EPSILON, name="bn1")
    symbol = S.Group([y, S.relu(x, name="other")])
    params = values_of(symbol, rng, data=(64, 8))
    params["bn0_gamma"][:] = 1e-9
    params["bn0_beta"][:] = 0.5 if jump != "floor" else 1.0
    shapes = {"data": (64, 8)}
    report = fold(symbol, params, shapes=shapes, style=style)[2]
    line = str(report.comparison)
    assert "'jump'" in line
    assert line.endswith("makes more of rounding, all else agrees")
    # What follows the jump is compared all the same.
    with monkeypatch.context() as patched:
        patched.setattr(*in_folding(lambda scale: scale * 1.0001))
        with pytest.raises(ValueError, match=r"node 'bn1': it differs by"):
            fold(symbol, params, shapes=shapes, style=style)


def test_random_numbers_are_not_what_is_compared(rng):
    x = S.BatchNorm(S.var("data"), fix_gamma=False, name="bn")
    symbol = S.FullyConnected(S.Dropout(x, mode="always", name="drop"), num_hidden=2, name="fc")
    params = values_of(symbol, rng, data=(4, 3))
    for _, _, report in refolded(symbol, params, data=(4, 3))[:2]:
        assert "'drop' (Dropout) makes more of rounding" in str(report.comparison)


# --- what rounding does --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ill_conditioned_statistics_are_no_error(dtype, rng):
    symbol = model()
    params = values_of(symbol, rng, dtype)
    params["conv0_bias"][:] = 3e3
    params["bn0_moving_mean"][:] = 3e3
    params["bn0_moving_var"][:] = 1e-4
    for _, _, report in refolded(symbol, params, **SHAPES):
        assert not report.comparison.note


def test_float16_is_compared_where_it_does_not_run(folder, rng, monkeypatch):
    symbol = model()
    params = values_of(symbol, rng)
    params = {n: v if "bn" in n else v.astype("float16") for n, v in params.items()}
    _, _, report = fold(symbol, params, shapes=SHAPES)
    assert report.comparison.difference is None
    assert "cannot run" in report.comparison.note
    monkeypatch.setattr(*in_folding(lambda scale: scale * 1.5))
    with pytest.raises(ValueError, match="at node 'conv1'"):
        fold(symbol, params, shapes=SHAPES)


def test_shapes_that_are_not_known(rng):
    symbol = model()
    params = values_of(symbol, rng)
    for report in (fold(symbol, params)[2], convert_files(symbol, params, to="scratch")[2]):
        assert report.comparison.unknown == "data"
        assert str(report.comparison).endswith("not measured, the shape of input 'data' is unknown")
    stated = symbol(data=S.var("data", shape=SHAPE))
    assert fold(stated, params)[2].comparison.size > 0
    with pytest.raises(ValueError, match=r"shapes must name inputs \(data\), got 'dat'"):
        convert_files(symbol, params, to="scratch", shapes={"dat": SHAPE})
    for wrong, error, said in (
        ("4,3", TypeError, "shapes must map names of inputs to shapes, .*got '4,3'"),
        (SHAPE, TypeError, "shapes must map names of inputs to shapes"),
        ({"data": 4}, TypeError, r"shapes\['data'\] must be a tuple of integers, got 4"),
        ({"data": "4,3"}, TypeError, r"shapes\['data'\] must be a tuple of integers, got '4,3'"),
        ({"data": (2.0, 3)}, TypeError, r"shapes\['data'\] must be an integer, got 2.0"),
        ({"data": (-1, *SHAPE[1:])}, ValueError, r"shapes\['data'\] must be at least 1, got -1"),
    ):
        with pytest.raises(error, match=said):
            fold(symbol, params, shapes=wrong)
    for action in (fold, lambda *m, **o: convert_files(*m, to="scratch", **o)):
        with pytest.raises(TypeError, match="verify must be True or False, got 'no'"):
            action(symbol, params, verify="no")


def test_another_shape_or_type_is_refused(rng):
    x = S.var("data")
    one = S.relu(x, name="y")
    for other, said in (
        (S.Flatten(one, name="y"), "shape"),
        (S.cast(x, "int32", name="y"), "type"),
    ):
        with pytest.raises(ValueError, match=f"at 'y_output': its {said} is"):
            verify((one, {}), (other, {}), {"data": (2, 3, 4)})
