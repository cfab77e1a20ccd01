"""Clause 8 of the contract: bad arguments and bad data are clear errors, and change nothing."""

import json
import subprocess
import sys

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.masked import MaskedBatchNorm
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import CLOSE, REPOSITORY, STATE, array
from mxnet import autograd, gluon

# Clause 8: bad arguments


def error_text(call, *words):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    text = str(caught.value)
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"
    return text


@pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("momentum", -0.1, ValueError),
        ("momentum", 1.5, ValueError),
        ("momentum", 5, ValueError),
        ("momentum", float("nan"), ValueError),
        ("momentum", float("inf"), ValueError),
        ("momentum", "0.9", TypeError),
        ("momentum", [0.9], TypeError),
        ("epsilon", -1.0, ValueError),
        ("epsilon", -1e-9, ValueError),
        ("epsilon", float("nan"), ValueError),
        ("epsilon", float("inf"), ValueError),
        ("epsilon", "1e-5", TypeError),
        ("epsilon", None, TypeError),
        ("axis", "1", TypeError),
        ("axis", 1.5, TypeError),
        ("axis", None, TypeError),
        ("axis", (0, 1), TypeError),
        ("in_channels", -1, ValueError),
        ("in_channels", 2.5, TypeError),
        ("in_channels", "3", TypeError),
        ("in_channels", None, TypeError),
        ("gamma_initializer", 5, TypeError),
        ("beta_initializer", [1, 2], TypeError),
        ("running_mean_initializer", 0.5, TypeError),
        ("running_variance_initializer", {}, TypeError),
    ],
)
def test_bad_arguments_name_themselves_and_their_value(layer_class, name, value, error):
    text = error_text(lambda: layer_class(**{name: value}), name, value)
    with pytest.raises(error):
        layer_class(**{name: value})
    assert len(text) < 300


@pytest.mark.parametrize("name", ["gamma_initializer", "running_variance_initializer"])
def test_an_unknown_initializer_is_named(device, name):
    """At the latest when it is needed, as for any Gluon layer; the name must show."""

    def use():
        layer = ScratchBatchNorm(in_channels=3, **{name: "nonesuch"})
        layer.initialize(ctx=device)

    error_text(use, "nonesuch")


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="epsilom"):
        ScratchBatchNorm(epsilom=1e-3)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.25), np.int64(1), None])
def test_good_momentum_of_any_number_type(value):
    assert ScratchBatchNorm(momentum=value)._kwargs["momentum"] == value


@pytest.mark.parametrize("value", [np.int64(2), -1, 0])
def test_good_axis_of_any_integer_type(value):
    assert ScratchBatchNorm(axis=value)._kwargs["axis"] == value


# Clause 8: bad data, eager


BAD_CALLS = {
    "rank 1": ({}, (3,), "float32", ["(3,)"]),
    "rank 1, axis 0": ({"axis": 0}, (3,), "float32", ["(3,)"]),
    "rank 1, axis -1": ({"axis": -1}, (3,), "float32", ["(3,)"]),
    "axis above": ({"axis": 2}, (4, 3), "float32", ["axis", "2"]),
    "axis below": ({"axis": -3}, (4, 3), "float32", ["axis", "-3"]),
    "too many channels": ({}, (4, 5), "float32", ["3", "5"]),
    "too few channels": ({}, (4, 2, 6), "float32", ["3", "2"]),
    "one channel": ({}, (4, 1), "float32", ["3", "1"]),
    "channels on another axis": ({"axis": -1}, (4, 3, 6), "float32", ["3", "6"]),
    "integers": ({}, (4, 3), "int32", ["int32"]),
    "bytes": ({}, (4, 3), "uint8", ["uint8"]),
    "float64 data": ({}, (4, 3), "float64", ["float64", "float32"]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_data_is_refused_and_changes_nothing(device, rng, case, training):
    options, shape, dtype, words = BAD_CALLS[case]
    layer = ScratchBatchNorm(in_channels=3, **options)
    layer.initialize(ctx=device)
    before = [getattr(layer, name).data().asnumpy() for name in STATE]

    def call():
        with autograd.record(train_mode=training):
            layer(array(np.ones(shape), device, dtype))

    error_text(call, *words)
    mx.nd.waitall()
    after = [getattr(layer, name).data().asnumpy() for name in STATE]
    for a, b in zip(after, before):
        assert a.tobytes() == b.tobytes()
    good = rng.normal(size=(4, 3) if options.get("axis") == -1 else (3, 3, 3))
    with autograd.train_mode():
        y = layer(array(good, device, "float32"))
    oracle = OracleBatchNorm.fresh(3, **options)
    np.testing.assert_allclose(y.asnumpy(), oracle.train(good), **CLOSE["float32"])


@pytest.mark.parametrize("layer_class", [ScratchBatchNorm, MaskedBatchNorm])
@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda x: x.asnumpy(), ["data", "ndarray", "mx.nd.array(data)"]),
        (lambda x: [x], ["data", "list"]),
        (lambda x: None, ["data", "NoneType"]),
        (lambda x: x.tostype("csr"), ["data", "csr", "tostype('default')"]),
        (lambda x: x.tostype("row_sparse"), ["data", "row_sparse", "tostype('default')"]),
    ],
    ids=["NumPy", "list", "None", "csr", "row_sparse"],
)
def test_what_is_no_dense_array_is_refused(device, layer_class, hybridize, data, words):
    layer = layer_class(in_channels=3)
    layer.initialize(ctx=device)
    layer.hybridize(hybridize)
    error_text(lambda: layer(data(mx.nd.ones((2, 3), ctx=device))), *words)


def test_float64_layers_refuse_float32_data(device):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    layer.cast("float64")
    error_text(lambda: layer(mx.nd.ones((2, 3), ctx=device)), "float32", "float64")


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        ({}, (3,), ["(3,)"]),
        ({"axis": -1}, (3,), ["(3,)"]),
        ({"axis": 2}, (4, 3), ["axis", "2"]),
        ({"axis": -4}, (4, 3, 2), ["axis", "-4"]),
    ],
)
def test_bad_first_call_leaves_the_layer_deferred(device, rng, options, shape, words):
    layer = ScratchBatchNorm(**options)
    layer.initialize(ctx=device)
    error_text(lambda: layer(mx.nd.ones(shape, ctx=device)), *words)
    assert layer.gamma.shape in ((0,), None)
    x = rng.normal(size=(3, 4, 5, 6))
    with autograd.train_mode():
        y = layer(array(x, device, "float32"))
    oracle = OracleBatchNorm.fresh(x.shape[options.get("axis", 1)], **options)
    np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float32"])


def test_uninitialized_layers_say_so(device):
    layer = ScratchBatchNorm(in_channels=3)
    with pytest.raises(
        (RuntimeError, gluon.parameter.DeferredInitializationError), match="initialize"
    ):
        layer(mx.nd.ones((2, 3), ctx=device))


# Clause 8: bad data in a graph, in processes of their own: a crash would take the tests along

GRAPH_PROGRAM = """
import json, os, sys, tempfile
import scratchbn
import numpy as np, mxnet as mx
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn

kind, _, index = sys.argv[1].partition("(")
device = mx.Context(kind, int(index.rstrip(")")))
for line in sys.stdin:
    case, mode, options, shape, dtype, training = json.loads(line)
    print(json.dumps([case, mode, "started"]), flush=True)
    known = 0 if case.startswith("deferred") else 3
    layer = scratchbn.ScratchBatchNorm(in_channels=known, **options)
    layer.initialize(ctx=device)
    net = layer
    good = mx.nd.ones((3, 3, 3, 3), ctx=device)
    if mode == "nested":
        net = nn.HybridSequential()
        net.add(layer)
    net.hybridize(static_alloc=mode == "static_shape", static_shape=mode == "static_shape")
    if mode == "exported":
        with tempfile.TemporaryDirectory() as folder:
            net(good)
            net.export(os.path.join(folder, "net"))
            files = [os.path.join(folder, "net" + end) for end in ("-symbol.json", "-0000.params")]
            net = SymbolBlock.imports(files[0], ["data"], files[1], ctx=device)
    try:
        with autograd.record(train_mode=training):
            y = net(mx.nd.ones(shape, dtype=dtype, ctx=device))
        mx.nd.waitall()
        outcome = ["returned", list(y.shape)]
    except Exception as exception:
        outcome = [type(exception).__name__, [c.__name__ for c in type(exception).__mro__]]
    try:
        mx.nd.waitall()
        with autograd.train_mode():
            fine = list(net(good).shape) == [3, 3, 3, 3]
        mx.nd.waitall()
    except Exception as exception:
        fine = repr(exception)[:300]
    print(json.dumps([case, mode, outcome, fine]), flush=True)
"""
GRAPH_CASES = [
    ("axis above", {"axis": 3}, (4, 3), "float32"),
    ("axis below", {"axis": -4}, (4, 3), "float32"),
    ("rank 1", {}, (3,), "float32"),
    ("rank 1, axis 0", {"axis": 0}, (3,), "float32"),
    ("rank 1, axis -1", {"axis": -1}, (3,), "float32"),
    ("too many channels", {}, (4, 5), "float32"),
    ("too few channels", {}, (4, 2, 6), "float32"),
    ("one channel", {}, (4, 1), "float32"),
    ("channels on another axis", {"axis": -1}, (4, 3, 6), "float32"),
    ("integers", {}, (4, 3), "int32"),
    ("float64 data", {}, (4, 3), "float64"),
    ("deferred rank 1", {}, (3,), "float32"),
    ("deferred rank 1, axis -1", {"axis": -1}, (3,), "float32"),
    ("deferred axis above", {"axis": 3}, (4, 3), "float32"),
    ("deferred axis below", {"axis": -4}, (4, 3), "float32"),
]
GRAPH_RUN_MODES = ["hybrid", "static_shape", "nested", "exported"]
GRAPH_RUNS = [
    (case[0], mode)
    for case in GRAPH_CASES
    for mode in GRAPH_RUN_MODES
    if not (mode == "exported" and case[0].startswith("deferred"))
]


@pytest.fixture(scope="module")
def graph_outcomes(device):
    """Run every bad call; start a new process after a crash, so that each call has its outcome."""
    waiting = [
        [case, mode, options, shape, dtype, training]
        for mode in GRAPH_RUN_MODES
        for training in (True, False)
        for case, options, shape, dtype in GRAPH_CASES
        if (case, mode) in GRAPH_RUNS
    ]
    outcomes = {}
    while waiting:
        process = subprocess.run(
            [sys.executable, "-c", GRAPH_PROGRAM, str(device)],
            input="\n".join(map(json.dumps, waiting)),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        reports = [json.loads(line) for line in process.stdout.splitlines() if line[:1] == "["]
        done = [report for report in reports if report[2] != "started"]
        for call, report in zip(waiting, done):
            assert call[:2] == report[:2]
            outcomes[call[0], call[1], call[5]] = report[2:]
        if len(done) < len(waiting):
            call = waiting[len(done)]
            outcomes[call[0], call[1], call[5]] = [["crashed", process.stderr[-500:]], False]
        waiting = waiting[len(done) + 1 :]
    return outcomes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("case", "mode"), GRAPH_RUNS)
def test_bad_data_in_a_graph_is_a_clean_error(graph_outcomes, case, mode, training):
    outcome, still_works = graph_outcomes[case, mode, training]
    assert outcome[0] not in ("crashed", "returned"), outcome
    assert {"MXNetError", "ValueError", "TypeError"} & set(outcome[1]), outcome
    assert still_works is True, still_works
