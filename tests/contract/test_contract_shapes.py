"""Clauses 8 and 9 of the contract: any rank and axis, clear errors, and numerical care."""

import json
import subprocess
import sys

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import hypothesis
import hypothesis.strategies as st
import mxnet as mx
import numpy as np
import pytest
from helpers import (
    BLOCK_MODES,
    CLOSE,
    MODES,
    REPOSITORY,
    STATE,
    array,
    check_step,
    in_mode,
    infer,
    take_step,
    train_forward,
)
from mxnet import autograd, gluon

SHAPES = {2: (5, 3), 3: (4, 3, 2), 4: (3, 2, 4, 5), 5: (2, 3, 2, 4, 2), 6: (2, 3, 2, 1, 3, 2)}
AXES = [(rank, axis) for rank in SHAPES for axis in range(-rank, rank)]
every_mode = pytest.mark.parametrize("mode", MODES)


# Clause 8: ranks and axes


@every_mode
@pytest.mark.parametrize(("rank", "axis"), AXES)
def test_every_rank_and_axis(build, rng, mode, rank, axis):
    shape = SHAPES[rank]
    subject = build(mode, shape, axis=axis, unbiased_variance=True)
    for training in (True, False):
        x, dy = rng.normal(size=shape) + 1, rng.normal(size=shape)
        expected = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        check_step(take_step(subject, x, dy, record_train=training), expected)
        subject.check_statistics(rtol=1e-12)


@every_mode
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 5, 4), (3, 1, 1), (2, 64, 1, 1), (2, 1024)])
def test_single_values_and_many_channels(build, rng, mode, shape):
    subject = build(mode, shape)
    x, dy = rng.normal(size=shape) + 1, rng.normal(size=shape)
    check_step(take_step(subject, x, dy), subject.oracle.train_step(x, dy))
    subject.check_statistics(rtol=1e-12)
    np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_one_layer_takes_several_ranks(device, rng, mode, axis):
    """Two layers sharing parameters would do the same; one eager layer must not remember a rank."""
    layer = ScratchBatchNorm(axis=axis, in_channels=3)
    layer.initialize(ctx=device)
    layer.cast("float64")
    oracle = OracleBatchNorm.fresh(3, axis=axis)
    net = in_mode(layer, mode)
    for shape in ((4, 3, 3, 3), (5, 3), (2, 3, 3), (4, 3, 3, 3)):
        x = rng.normal(size=shape)
        if mode != "eager":
            net.hybridize()
        with autograd.train_mode():
            y = net(array(x, device))
        np.testing.assert_allclose(y.asnumpy(), oracle.train(x), **CLOSE["float64"])


@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_any_combination_of_options(build, data):
    """Ranks, axes, options and modes beyond those listed in the other tests."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5), "shape"))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), "seed"))
    subject = build(
        data.draw(st.sampled_from(MODES), "mode"),
        shape,
        axis=data.draw(st.integers(-len(shape), len(shape) - 1), "axis"),
        momentum=data.draw(st.none() | st.floats(0, 1, allow_subnormal=False), "momentum"),
        epsilon=data.draw(st.sampled_from([1e-8, 1e-5, 1e-3, 1.0]), "epsilon"),
        center=data.draw(st.booleans(), "center"),
        scale=data.draw(st.booleans(), "scale"),
        use_global_stats=data.draw(st.booleans(), "use_global_stats"),
        unbiased_variance=data.draw(st.booleans(), "unbiased_variance"),
        layer_class=data.draw(st.sampled_from([ScratchBatchNorm, ScratchBatchNormReLU]), "class"),
    )
    for training in data.draw(st.lists(st.booleans(), min_size=1, max_size=4), "training"):
        x = rng.normal(size=shape) * 3 + rng.normal()
        dy = rng.normal(size=shape)
        expected = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        actual = take_step(subject, x, dy, record_train=training)
        # A channel of one value is a constant: rounding is divided by the root of epsilon.
        loose = {"rtol": 1e-8, "atol": 1e-8}
        np.testing.assert_allclose(actual.y, expected.y, **loose)
        size = max(
            1.0, np.abs(expected.dx).max(), np.abs(dy).max() / np.sqrt(subject.oracle.epsilon)
        )
        np.testing.assert_allclose(actual.dx / size, expected.dx / size, **loose)
        subject.check_statistics()


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


# Clause 9: numerical care


@every_mode
@pytest.mark.parametrize("mean", [1e5, -1e5, 1e4])
def test_large_means_lose_nothing_visible_in_float32(build, rng, mode, mean):
    shape = (64, 2, 8, 8)
    subject = build(
        mode, shape, dtype="float32", momentum=0.0, values={"gamma": [1.0, 1.0], "beta": [0.0, 0.0]}
    )
    x = (rng.normal(size=shape) + mean).astype("float32")
    dy = rng.normal(size=shape).astype("float32")
    step, expected = take_step(subject, x, dy), subject.oracle.train_step(x, dy)
    running_mean, running_var = subject.statistics()
    # Neighbouring float32 numbers are 0.008 apart at 1e5. A plain float32 mean is several of them
    # off and shifts the output by hundredths; one pass, E[x^2] - E[x]^2, is wrong by hundreds.
    np.testing.assert_allclose(running_mean, subject.oracle.running_mean, rtol=1e-7)
    np.testing.assert_allclose(running_var, subject.oracle.running_var, rtol=1e-5)
    np.testing.assert_allclose(step.y.std(axis=(0, 2, 3)), 1, atol=2e-5)
    np.testing.assert_allclose(step.y, expected.y, atol=1e-4)
    np.testing.assert_allclose(step.dx, expected.dx, atol=1e-4)


@every_mode
@pytest.mark.parametrize("value", [1 / 3, 1e3 / 3, -1e4 / 7])
def test_a_constant_channel_has_no_variance(build, mode, value):
    """Nothing but the rounding of its mean, seven digits in, and never a negative variance."""
    subject = build(mode, (50, 2, 7), dtype="float32", momentum=0.0)
    y = train_forward(subject, np.full((50, 2, 7), value, np.float32))
    _, var = subject.statistics()
    rounding = 2e-7 * abs(value)
    assert (var >= 0).all()
    assert (var <= rounding**2).all()
    allowed = rounding / np.sqrt(subject.oracle.epsilon) * np.abs(subject.oracle.gamma) + 1e-6
    assert (np.abs(y - subject.oracle.beta[:, None]) <= allowed[:, None]).all()


@every_mode
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e18])
def test_extreme_scales_in_float32(build, rng, mode, scale):
    """Squares of 1e18 fit float32 barely; a sum of squares over the batch must fit as well."""
    subject = build(mode, (16, 3), dtype="float32", momentum=0.0, epsilon=1e-30)
    x = (rng.normal(size=(16, 3)) * scale).astype("float32")
    y = train_forward(subject, x)
    expected = subject.oracle.train(x)
    np.testing.assert_allclose(subject.statistics()[1], subject.oracle.running_var, rtol=1e-5)
    if scale > 1e-18:  # below, epsilon matters and is itself near the smallest float32
        np.testing.assert_allclose(y, expected, **CLOSE["float32"])


@pytest.mark.parametrize("mode", ["eager", "hybrid", "exported"])
@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
def test_large_reductions_keep_five_digits(build, mode, mean):
    """Four million values per channel: a naive float32 sum would stop growing."""
    shape = (4, 2, 1024, 1024)
    rng = np.random.default_rng(7)
    subject = build(mode, shape, dtype="float32", momentum=0.0)
    x = rng.standard_normal(size=shape, dtype="float32")
    x += np.float32(mean)
    with autograd.train_mode():
        subject(subject.array(x))
    exact = [(np.mean(c, dtype="float64"), np.var(c, dtype="float64")) for c in (x[:, 0], x[:, 1])]
    running_mean, running_var = subject.statistics()
    np.testing.assert_allclose(running_var, [e[1] for e in exact], rtol=1e-5)
    np.testing.assert_allclose(running_mean, [e[0] for e in exact], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_large_reductions_in_the_gradient(build, mode):
    """dgamma and dbeta are sums over a million values too."""
    shape = (2, 2, 1024, 1024)
    rng = np.random.default_rng(8)
    subject = build(mode, shape, dtype="float32")
    x = rng.standard_normal(size=shape, dtype="float32")
    dy = rng.standard_normal(size=shape, dtype="float32") + np.float32(1)
    step, expected = take_step(subject, x, dy), subject.oracle.train_step(x, dy)
    np.testing.assert_allclose(step.dbeta, expected.dbeta, rtol=1e-5)
    np.testing.assert_allclose(step.dgamma, expected.dgamma, rtol=1e-5, atol=0.05)
    np.testing.assert_allclose(step.dx, expected.dx, rtol=1e-3, atol=1e-4)
