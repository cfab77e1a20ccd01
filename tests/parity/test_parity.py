"""Parity: nets that agree, planted errors, what is left behind, the report, the grid, the page."""

import importlib.util
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path

from scratchbn import (
    BackendError,
    ScratchBatchNorm,
    ScratchBatchNormReLU,
    __version__,
    cli,
    get_backend,
    parity,
    use_backend,
)
from scratchbn.backends import BACKENDS
from scratchbn.defects import Finding, Outcome
from scratchbn.parity import Case, Report, Row, compare, run_grid, standard_grid
from scratchbn.parity.oracle_layer import OracleLayer, OracleReLU

import helpers
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from models.lenet import initialize, lenet

SHAPE = (6, 4, 5, 5)
PYTHON = platform.python_version()


@pytest.fixture
def x(rng):
    return rng.normal(1, 2, SHAPE)


class Blind(ScratchBatchNorm):
    """Ignores gamma."""

    def transform(self, F, view, batch, gamma, beta, epsilon):
        gamma = F.ones_like(gamma)
        return super().transform(F, view, batch, gamma, beta, epsilon)


class Detached(ScratchBatchNorm):
    """Lets no gradient through the batch mean."""

    def statistics(self, F, view, running_mean, running_var, select):
        batch = super().statistics(F, view, running_mean, running_var, select)
        return batch._replace(low=F.BlockGrad(batch.low))


class Stuck(ScratchBatchNorm):
    """Never moves its running statistics."""

    def update(self, F, running, batch, count):
        return running


class Reversed(ScratchBatchNorm):
    """Applies gamma to the channels in reverse order."""

    def transform(self, F, view, batch, gamma, beta, epsilon):
        gamma = F.reverse(gamma, axis=0)
        return super().transform(F, view, batch, gamma, beta, epsilon)


class Nan(ScratchBatchNorm):
    """Its output is NaN in inference."""

    def statistics(self, F, view, running_mean, running_var, select):
        return super().statistics(F, view, running_mean, running_var * np.nan, select)


class Plain(gluon.HybridBlock):
    """A normalization of one's own, with neither `_kwargs` nor anything of this package."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name, init in (("gamma", "ones"), ("beta", "zeros")):
            setattr(self, name, self.params.get(name, shape=(4,), init=init))
        for name, init in (("running_mean", "zeros"), ("running_var", "ones")):
            parameter = self.params.get(name, shape=(4,), init=init, differentiable=False)
            setattr(self, name, parameter)

    def hybrid_forward(self, F, x, gamma, beta, running_mean, running_var):
        return F.BatchNorm(x, gamma, beta, running_mean, running_var, fix_gamma=False, eps=1e-5)


def kinds(report, **where):
    """The kinds of tensors that failed, in rows whose attributes are as given."""
    return {
        row.kind for row in report.failures if all(getattr(row, k) == v for k, v in where.items())
    }


# --- agreement --------------------------------------------------------------------------------


def test_equal_layers_hold_in_every_mode_phase_and_step(x):
    report = compare(ScratchBatchNorm(), nn.BatchNorm(), x, modes=("eager", "hybrid", "static"))
    assert report, str(report)
    assert not report.failures
    per_step = {"output", "input gradient", "parameter gradient", "statistic"}
    for mode in ("eager", "hybrid", "static"):
        for phase, steps in (("train", 3), ("inference", 2), ("frozen", 1)):
            rows = [row for row in report.rows if (row.mode, row.phase) == (mode, phase)]
            assert {row.step for row in rows} == set(range(1, steps + 1))
            assert {row.kind for row in rows} == per_step
            assert {r.tensor for r in rows if r.kind == "statistic"} == {
                "running_mean",
                "running_var",
            }


def test_a_net_equals_itself_exactly(x):
    layer = ScratchBatchNorm()
    report = compare(layer, layer, x)
    assert report
    assert max(row.absolute for row in report.rows) == 0


def test_nets_that_share_their_parameters(x):
    one = ScratchBatchNorm(in_channels=4)
    one.initialize()
    assert compare(one, nn.BatchNorm(in_channels=4, params=one.params), x)


def test_inference_alone(x):
    report = compare(ScratchBatchNorm(momentum=0.9), nn.BatchNorm(momentum=0.1), x, train=False)
    assert report
    assert {row.phase for row in report.rows} == {"inference"}


def test_parameters_of_a_are_used(x, rng):
    layer, other = ScratchBatchNorm(in_channels=4), nn.BatchNorm(in_channels=4)
    for net in (layer, other):
        net.initialize()
        helpers.set_values(net, helpers.random_values(rng, 4))
    assert compare(layer, other, x)


def test_a_layer_of_ones_own_without_a_frozen_mode(x):
    report = compare(Plain(), ScratchBatchNorm(), x, statistics_rtol=1e-6)
    assert report, str(report)
    assert {row.phase for row in report.rows} == {"train", "inference"}
    assert "use_global_stats" in report.notes[0]
    assert report.notes[0] in str(report)


def test_batches_are_fed_in_turn(x):
    batches = [np.ones(SHAPE), x]
    settings = {"modes": ("eager",), "steps": 3, "learning_rate": 0}
    report = compare(ScratchBatchNorm(), nn.BatchNorm(epsilon=1e-3), batches, **settings)
    # A constant batch is normalized to beta whatever epsilon is.
    assert "output" not in kinds(report, phase="train", step=1)
    assert "output" in kinds(report, phase="train", step=2)
    assert "output" not in kinds(report, phase="train", step=3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(x, dtype):
    report = compare(ScratchBatchNorm(), nn.BatchNorm(), x, dtype=dtype, steps=2)
    assert report, str(report)
    largest = max(row.relative for row in report.rows if row.kind == "output")
    assert largest > np.finfo("float64").eps  # it did compute in that dtype


def test_np_arrays(x):
    mx.npx.set_np()
    assert compare(ScratchBatchNorm(), nn.BatchNorm(), mx.np.array(x), dtype="float32")


def test_accumulated_gradients_start_from_zero(x):
    layer = ScratchBatchNorm()
    layer.collect_params(".*(gamma|beta)").setattr("grad_req", "add")
    assert compare(layer, ScratchBatchNorm(), x)


@pytest.mark.parametrize("reference", [nn.BatchNorm, ScratchBatchNorm])
def test_lenet(rng, reference):
    data = rng.normal(size=(4, 1, 28, 28))
    report = compare(lenet(), lenet(reference), data, steps=2)
    assert report, str(report)
    assert len({r.tensor for r in report.rows if r.kind == "parameter gradient"}) == 14


def test_a_fault_deep_in_a_net_is_found(rng):
    data = rng.normal(size=(4, 1, 28, 28))
    count = iter(range(3))
    net = lenet(lambda: (Stuck if next(count) == 1 else ScratchBatchNorm)())
    report = compare(lenet(), net, data, steps=1, modes=("eager",))
    assert {row.tensor for row in report.failures} == {"5.running_mean", "5.running_var"}


def test_several_inputs_and_outputs(rng):
    class Two(gluon.HybridBlock):
        def __init__(self, norm, **kwargs):
            super().__init__(**kwargs)
            self.norm = norm

        def hybrid_forward(self, F, x, y):
            return self.norm(x + y), (self.norm(x), y)

    data = (rng.normal(size=(5, 3)), rng.normal(size=(5, 3)))
    report = compare(Two(ScratchBatchNorm()), Two(ScratchBatchNorm()), data, steps=1)
    assert report
    names = {row.tensor for row in report.rows}
    assert {"output[0]", "output[1]", "output[2]", "input[0]", "input[1]"} <= names


def test_dropout_is_off(rng):
    def net(norm):
        found = nn.HybridSequential()
        found.add(nn.Dense(6), nn.Dropout(0.5), norm())
        return found

    assert compare(net(ScratchBatchNorm), net(nn.BatchNorm), rng.normal(size=(9, 5)))


# --- the gradient that is followed ------------------------------------------------------------


class Scaled(gluon.Block):
    """Multiplies by gamma; keeps the output gradients it is handed, or replaces what follows."""

    def __init__(self, by_hand=None):
        super().__init__()
        self.gamma = self.params.get("gamma", shape=(1,))
        self.by_hand = by_hand
        self.heads = []

    def forward(self, x):
        return _Scale(self)(x, self.gamma.data())


class _Scale(autograd.Function):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, gamma):
        self.save_for_backward(x, gamma)
        return x * gamma

    def backward(self, dy):
        x, gamma = self.saved_tensors
        self.block.heads.append(dy.asnumpy())
        if self.block.by_hand:
            return self.block.by_hand(x, gamma)
        return dy * gamma, (dy * x).sum().reshape((1,))


def half_square(y):
    return (y**2).sum() / 2


def test_the_gradient_of_a_loss_equals_a_hand_computation(x):
    # loss = (gamma x)^2 / 2, so its derivatives are gamma^2 x and gamma x^2, whatever dy is.
    derived = Scaled(lambda x, gamma: (gamma**2 * x, (gamma * x**2).sum().reshape((1,))))
    report = compare(Scaled(), derived, x, modes=("eager",), loss=half_square)
    assert report, str(report)
    assert report.settings["loss"] == "half_square"
    assert {row.phase for row in report.rows} == {"train", "inference"}
    random = compare(Scaled(), derived, x, modes=("eager",))
    assert kinds(random) >= {"input gradient", "parameter gradient"}
    assert "loss" not in random.settings
    other = compare(Scaled(), derived, x, modes=("eager",), loss=lambda y: 2 * half_square(y))
    assert kinds(other) >= {"input gradient", "parameter gradient"}


def test_a_loss_takes_the_place_of_random_output_gradients(x, rng):
    weights = rng.normal(size=SHAPE)
    settings = {"modes": ("eager",), "steps": 2}
    one, two = Scaled(), Scaled()
    assert compare(
        one, two, x, loss=lambda y: y * mx.nd.array(weights, dtype="float64"), **settings
    )
    assert len(one.heads) == 3
    for heads in one.heads + two.heads:
        np.testing.assert_array_equal(heads, weights)
    one, two = Scaled(), Scaled()
    assert compare(one, two, x, **settings)
    first, second, inference = one.heads
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, inference)  # each of its first batch
    np.testing.assert_array_equal(two.heads, one.heads)


def test_random_output_gradients_as_a_loss_change_nothing(x):
    heads = np.random.default_rng((0, 0, 1)).normal(size=SHAPE)
    settings = {"steps": 1, "statistics_rtol": 0, "statistics_atol": 0, "modes": ("eager",)}
    pair = [ScratchBatchNorm(), Detached()]
    as_loss = compare(*pair, x, loss=lambda y: y * mx.nd.array(heads, dtype="float64"), **settings)
    assert as_loss.rows == compare(*pair, x, **settings).rows


@pytest.mark.parametrize("reference", [nn.BatchNorm, lambda: OracleLayer(in_channels=5)])
def test_a_loss_with_labels(rng, reference):
    data, labels = rng.normal(1, 2, (12, 5)), mx.nd.array(rng.integers(0, 5, 12))
    cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()
    modes = ("eager", "hybrid") if reference is nn.BatchNorm else ("eager",)

    def loss(outputs):
        return cross_entropy(outputs, labels)

    report = compare(ScratchBatchNorm(), reference(), data, loss=loss, modes=modes)
    assert report, str(report)
    assert kinds(compare(ScratchBatchNorm(), Detached(), data, loss=loss, steps=1)) == {
        "input gradient"
    }


def test_a_loss_of_several_outputs_gets_them_in_a_list(rng):
    class Two(gluon.HybridBlock):
        def hybrid_forward(self, F, x):
            return x, (2 * x, 3 * x)

    seen = []

    def loss(outputs):
        seen.append([type(outputs), len(outputs)])
        return outputs[0] * outputs[2]

    report = compare(Two(), Two(), rng.normal(size=(4, 3)), loss=loss, modes=("eager",))
    assert report
    assert seen
    assert all(call == [list, 3] for call in seen)


def test_a_grid_takes_a_loss():
    report = run_grid(
        ScratchBatchNorm, OracleLayer, [Case((4, 3))], modes=("eager",), loss=half_square
    )
    assert report, str(report)
    assert report.settings["loss"] == "half_square"
    assert Report.from_json(report.to_json()).settings == report.to_dict()["settings"]


def test_a_loss_must_return_an_array(x):
    with pytest.raises(TypeError, match=r"loss must return an NDArray, got 1\.0"):
        compare(ScratchBatchNorm(), ScratchBatchNorm(), x, loss=lambda y: 1.0)


# --- planted errors ---------------------------------------------------------------------------

ALL = {"output", "input gradient", "parameter gradient"}


@pytest.mark.parametrize(
    ("wrong", "phase", "expected"),
    [
        (lambda: ScratchBatchNorm(epsilon=1e-3), "inference", {"output", "input gradient"}),
        (lambda: nn.BatchNorm(epsilon=1e-3), "inference", {"output", "input gradient"}),
        (lambda: ScratchBatchNorm(momentum=0.8), "train", {"statistic"}),
        (Stuck, "train", {"statistic"}),
        (Blind, "frozen", ALL),
        (Reversed, "frozen", ALL),
        (Nan, "inference", {"output", "input gradient", "parameter gradient"}),
        (lambda: ScratchBatchNorm(axis=2, in_channels=4), "inference", ALL),
        (lambda: ScratchBatchNorm(scale=False), "train", ALL),
    ],
)
def test_planted_errors_are_found_in_both_modes(rng, wrong, phase, expected):
    report = compare(ScratchBatchNorm(), wrong(), rng.normal(1, 2, (6, 4, 4, 5)))
    assert not report
    for mode in ("eager", "hybrid"):
        assert expected <= kinds(report, mode=mode, phase=phase), str(report)
    assert "FAIL" in str(report)


def test_a_wrong_momentum_is_nothing_but_wrong_statistics(x):
    report = compare(ScratchBatchNorm(), ScratchBatchNorm(momentum=0.89), x)
    assert kinds(report) == {"statistic"}
    assert {row.phase for row in report.failures} == {"train"}
    assert {row.tensor for row in report.failures} == {"running_mean", "running_var"}


def test_a_detached_mean_is_nothing_but_a_wrong_input_gradient(x):
    report = compare(ScratchBatchNorm(), Detached(), x, steps=1)
    assert kinds(report) == {"input gradient"}
    assert {row.phase for row in report.failures} == {"train"}


def test_the_place_and_size_of_a_difference(x):
    class OneOff(nn.HybridBlock):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.gamma = self.params.get("gamma", shape=(1,))

        def hybrid_forward(self, F, x, gamma):
            spot = np.zeros(SHAPE)
            spot[2, 1, 3, 4] = 0.25
            return F.broadcast_mul(x, gamma) + self.off * mx.nd.array(spot, dtype="float64")

    one, two = OneOff(), OneOff()
    one.off, two.off = 0, 1
    report = compare(one, two, x, train=False, modes=("eager",))
    (row,) = [row for row in report.failures if row.step == 1]
    assert (row.tensor, row.index) == ("output", (2, 1, 3, 4))
    assert row.absolute == pytest.approx(0.25)
    assert "(2, 1, 3, 4)" in row.where


def test_the_statistics_of_the_built_in_need_their_own_tolerance(x):
    strict = {"statistics_rtol": 1e-12, "statistics_atol": 0}
    assert kinds(compare(ScratchBatchNorm(), nn.BatchNorm(), x, **strict)) == {"statistic"}
    # Without the built-in, strict is the default.
    report = compare(ScratchBatchNorm(), ScratchBatchNorm(momentum=0.9 + 1e-9), x)
    assert kinds(report) == {"statistic"}
    assert compare(
        ScratchBatchNorm(), ScratchBatchNorm(momentum=0.9 + 1e-9), x, statistics_rtol=1e-6
    )


def test_tolerances_are_obeyed(x):
    nearly = ScratchBatchNorm(epsilon=1.1e-5)
    assert not compare(ScratchBatchNorm(), nearly, x)
    assert compare(ScratchBatchNorm(), nearly, x, rtol=1e-4)
    assert compare(ScratchBatchNorm(), nearly, x, atol=1e-1)


def test_another_shape_is_a_failure(x):
    flat = nn.HybridSequential()
    flat.add(nn.Flatten())
    report = compare(nn.HybridLambda("identity"), flat, x, train=False, modes=("eager",))
    assert "shape" in report.failures[0].note


def test_a_net_that_mxnet_cannot_run_is_a_failure_of_that_net(rng):
    def net(norm):
        found = nn.HybridSequential()
        found.add(nn.Conv1D(8, 3), norm())
        return found

    report = compare(
        net(ScratchBatchNorm),
        net(nn.BatchNorm),
        rng.normal(size=(4, 3, 12)),
        dtype="float32",
        rtol=1e-4,
    )
    errors = [row for row in report.failures if row.kind == "error"]
    assert errors
    assert {row.tensor for row in errors} == {"b"}
    assert "Check failed" in errors[0].note
    assert "error in b" in str(report)


# --- what it leaves behind --------------------------------------------------------------------


def state(net):
    """Everything observable about a net: arrays by identity and by value."""
    found = {}
    for name, p in net._collect_params_with_prefix().items():
        arrays = p.list_data() if p._data is not None else []
        gradients = p.list_grad() if p.grad_req != "null" and arrays else []
        found[name] = (
            [id(v) for v in arrays + gradients],
            [v.asnumpy().tobytes() for v in arrays + gradients],
            (p.grad_req, str(p.dtype), p.shape, bool(p._deferred_init), p._trainer),
        )
    blocks = []
    net.apply(
        lambda b: blocks.append(
            {
                name: dict(v) if name == "_kwargs" else v
                for name, v in vars(b).items()
                if name not in ("_children", "_reg_params")
            }
        )
    )
    return found, blocks


@pytest.mark.filterwarnings("ignore:.*still having forward hook:UserWarning")
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("reference", [nn.BatchNorm, Stuck])
def test_the_nets_are_untouched(rng, fail, reference):
    data = rng.normal(size=(4, 1, 28, 28))
    nets = [lenet(), lenet(reference)]
    trainers = []
    for net in nets:
        initialize(net)
        net.hybridize(static_alloc=True)
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
        with autograd.record():
            loss = net(mx.nd.array(data)).sum()
        loss.backward()
        trainer.step(4)
        trainers.append(trainer)
    nets[0].collect_params(".*weight").setattr("grad_req", "add")
    mx.nd.waitall()
    if fail:
        calls = iter(range(100))

        def interrupt(block, inputs):
            if next(calls) == 5:
                raise RuntimeError("halfway")

        nets[1][3].register_forward_pre_hook(interrupt)
    before = [state(net) for net in nets]
    if fail:
        with pytest.raises(RuntimeError, match="halfway"):
            compare(*nets, data, modes=("eager", "hybrid"))
    else:
        assert bool(compare(*nets, data, steps=1)) is (reference is nn.BatchNorm)
    assert [state(net) for net in nets] == before
    for net, trainer in zip(nets, trainers):  # and they go on training
        net.collect_params().zero_grad()
        with autograd.record():
            loss = net(mx.nd.array(data)).sum()
        loss.backward()
        trainer.step(4)
        mx.nd.waitall()
        assert all(np.isfinite(p.data().asnumpy()).all() for p in net.collect_params().values())


def test_a_deferred_net_stays_deferred(x):
    layer, other = ScratchBatchNorm(), nn.BatchNorm()
    other.initialize()
    before = [state(net) for net in (layer, other)]
    assert compare(layer, other, x)
    assert [state(net) for net in (layer, other)] == before
    assert other(mx.nd.array(x)).shape == SHAPE


def test_it_may_be_called_while_recording(x):
    weight = mx.nd.ones((1,))
    weight.attach_grad()
    with autograd.record():
        y = 2 * weight
        assert compare(ScratchBatchNorm(), nn.BatchNorm(), x, steps=1)
    y.backward()
    assert weight.grad.asscalar() == 2


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": "net"}, TypeError, "a must be a gluon Block, got 'net'"),
        ({"b": None}, TypeError, "b must be a gluon Block, got None"),
        ({"inputs": [[1, 2]]}, TypeError, "inputs must be an array"),
        ({"inputs": []}, ValueError, "inputs must hold at least one array"),
        ({"inputs": ()}, ValueError, "inputs must hold at least one array"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"train": 1}, TypeError, "train must be True or False, got 1"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float64, float32, float16"),
        ({"rtol": -1}, ValueError, "rtol must be finite and not negative, got -1"),
        ({"statistics_atol": "1"}, TypeError, "statistics_atol must be a number, got '1'"),
        ({"learning_rate": np.nan}, ValueError, "learning_rate must be finite"),
        ({"loss": "mse"}, TypeError, "loss must be callable, got 'mse'"),
        ({"modes": ()}, ValueError, "modes must be a sequence of eager, hybrid, static"),
        ({"modes": "eager"}, ValueError, "modes must be a sequence of eager, hybrid, static"),
        ({"modes": ("fast",)}, ValueError, "modes must be a sequence of eager, hybrid, static"),
        ({"b": nn.Dense(3)}, ValueError, "but only a has 'beta'"),
        ({"b": ScratchBatchNorm(momentum=None)}, ValueError, "but only b has 'num_batches'"),
        (
            {"a": nn.BatchNorm(in_channels=4), "b": nn.BatchNorm(in_channels=5)},
            ValueError,
            r"'(beta|gamma)' has shape \(4,\) in a and \(5,\) in b",
        ),
    ],
)
def test_bad_arguments(x, change, error, message):
    arguments = {"a": ScratchBatchNorm(), "b": nn.BatchNorm(), "inputs": x, **change}
    with pytest.raises(error, match=message):
        compare(**arguments)


# --- the report -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed():
    data = np.random.default_rng(0).normal(1, 2, SHAPE)
    return compare(ScratchBatchNorm(), Nan(), data, steps=1)


def test_json_round_trip(failed, tmp_path):
    path = tmp_path / "new" / "report.json"
    text = failed.to_json(path)
    assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    document = json.loads(text)
    assert document["held"] is False
    assert document["settings"]["dtype"] == "float64"
    assert len(document["rows"]) == len(failed.rows)
    again = Report.from_json(text)
    assert again.to_json() == text
    assert str(again) == str(failed)
    assert [row.where for row in again.rows] == [row.where for row in failed.rows]


def plain(value):
    """Whether a value is made of JSON's types only."""
    if isinstance(value, dict):
        return all(type(name) is str and plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (str, int, float, bool, type(None))


def test_a_dict_of_plain_types(failed):
    found = failed.to_dict()
    assert set(found) == {"ok", "settings", "notes", "rows"}
    assert found["ok"] is False
    assert plain(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [row["ok"] for row in found["rows"]] == [row.ok for row in failed.rows]
    assert "nan" in {row["absolute"] for row in found["rows"]}
    document = json.loads(failed.to_json())
    assert document.pop("held") is found.pop("ok")
    assert document == found


def test_numbers_of_numpy_in_the_settings():
    row = Row("output", "y", "eager", "train", 1, 0.0, 0.0, 1.0, index=(1, 2))
    settings = {"steps": np.int64(3), "rtol": np.float64("inf"), "modes": ("eager",)}
    found = Report((row,), settings).to_dict()
    assert found["ok"] is True
    assert found["settings"] == {"steps": 3, "rtol": "inf", "modes": ["eager"]}
    assert plain(found)


@pytest.mark.parametrize("text", ["", "{}", '{"rows": [{}], "settings": {}, "notes": []}', "[1]"])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="text must be JSON from Report"):
        Report.from_json(text)


def test_html_is_complete_in_itself(failed, tmp_path):
    path = tmp_path / "report.html"
    text = failed.to_html(path, title="a < b")
    assert path.read_text() == text
    assert "a &lt; b" in text
    assert "Failures" in text
    assert "not finite" in text
    assert "http" not in text
    assert text.count("<table>") == text.count("</table>") == 2


def test_html_without_jinja2(failed, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'scratchbn\[report\]'"):
        failed.to_html()


def test_a_failed_write_leaves_the_old_file(failed, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        failed.to_json(path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


def test_an_empty_report_is_not_a_success():
    assert not Report(())
    assert "nothing was compared" in str(Report(()))


def test_a_long_table_shows_the_worst():
    rows = [
        Row("output", f"t{i}", "eager", "train", 1, float(i), float(i), 95.5) for i in range(100)
    ]
    report = Report(tuple(rows))
    header, lines, more = report.table(most=10)
    assert [line[0] for line in lines] == [f"t{i}" for i in range(99, 89, -1)]
    assert len(header) == len(lines[0])
    assert more == "and 90 more, none of them failed"
    assert report.table(most=2)[2] == "and 98 more, 2 of them failed"
    assert more not in str(report)
    assert len(report.failures) == 4


# --- the grid and the commands ----------------------------------------------------------------


def test_the_standard_grid_covers_what_it_says():
    quick, full = standard_grid(), standard_grid(full=True)
    for grid in (quick, full):
        names = [case.name for case in grid]
        assert len(set(names)) == len(names)
        assert {len(case.shape) for case in grid} == {2, 3, 4, 5}
        assert {case.dtype for case in grid} == {"float64", "float32", "float16"}
        assert {case.channels for case in grid} >= {1, 8, 64, 1024}
        assert {case.shape[0] for case in grid} >= {1}
        axes = {(len(case.shape), case.options.get("axis")) for case in grid}
        assert axes >= {(rank, axis) for rank in (2, 3, 4, 5) for axis in range(-rank, rank)}
        options = {name for case in grid for name in case.options}
        assert options >= {"center", "scale", "use_global_stats", "momentum", "epsilon"}
    assert {case.name for case in quick} < {case.name for case in full}


def test_a_grid_finds_a_fault_and_names_the_case():
    cases = [Case((4, 3), {"epsilon": e}) for e in (1e-5, 1e-3)]

    def forgetful(epsilon, **options):
        return ScratchBatchNorm(**options)

    report = run_grid(forgetful, ScratchBatchNorm, cases, modes=("eager",), steps=1)
    assert {row.case for row in report.failures} == {"4x3 float64 epsilon=0.001"}
    assert "4x3 float64 epsilon=0.001" in str(report)
    assert Report.from_json(report.to_json()).failures == report.failures


def few(full):
    return [Case((4, 3)), Case((4, 3), {"axis": 0}, "float32")]


def test_the_command_writes_and_reports(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(parity, "standard_grid", few)
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert cli.main(["parity", *files]) == 0
    assert "held: all" in capsys.readouterr().out
    report = Report.from_json((tmp_path / "r.json").read_text())
    assert {row.case for row in report.rows} == {"4x3 float64", "4x3 float32 axis=0"}
    assert "4x3 float32 axis=0" in (tmp_path / "r.html").read_text()


def test_the_command_takes_backends(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(parity, "standard_grid", few)
    path = tmp_path / "r.json"
    assert cli.main(["parity", "--json", str(path), "--backends", "auto", "portable", "auto"]) == 0
    report = Report.from_json(path.read_text())
    assert {row.backend for row in report.rows} == {"auto", "portable"}
    for text in (capsys.readouterr().out, str(report)):
        assert f"backend auto, portable; kernel {report.settings['kernel']}; scratchbn " in text
        assert f"mxnet {mx.__version__}; numpy {np.__version__}; Python {PYTHON}; CPU " in text
        assert text.splitlines()[1].endswith(time.strftime("; %Y-%m-%d"))
    assert cli.main(["parity", "--backends", "fastest"]) == 1
    assert "name must be one of auto, portable" in capsys.readouterr().err


def test_a_grid_names_the_backend_that_fails():
    class WrongWhenPortable(ScratchBatchNorm):
        def transform(self, F, view, batch, gamma, beta, epsilon):
            beta = beta + float(get_backend() == "portable")
            return super().transform(F, view, batch, gamma, beta, epsilon)

    report = run_grid(
        WrongWhenPortable, OracleLayer, [Case((4, 3))], backends=["portable", "auto"], steps=1
    )
    assert {row.backend for row in report.rows} == {"portable", "auto"}
    assert {row.backend for row in report.failures} == {"portable"}
    (line,) = (line for line in str(report).splitlines() if " FAIL " in line)
    assert "portable" in line


@pytest.mark.parametrize("backends", ["auto", [], ["auto", "fastest"]])
def test_backends_that_are_none(backends):
    with pytest.raises(ValueError, match=r"must be .* auto, portable, native"):
        run_grid(ScratchBatchNorm, OracleLayer, [], backends=backends)


def test_a_comparison_names_where_it_was_made(x):
    with use_backend("portable"):
        report = compare(ScratchBatchNorm(), nn.BatchNorm(), x, steps=1)
    assert report.settings["backend"] == "portable"
    assert {row.backend for row in report.rows} == {"portable"}
    made = {name: report.settings[name] for name in ("scratchbn", "mxnet", "numpy", "Python")}
    assert made == dict(zip(made, (__version__, mx.__version__, np.__version__, PYTHON)))
    assert report.settings["CPU"]
    assert report.settings["date"] == time.strftime("%Y-%m-%d")
    page = report.to_html()
    assert "backend portable" in page
    assert report.settings["CPU"] in page


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_grid_holds_on_every_backend(backend):
    """Some of every group and dtype, and every batch of one value per channel."""
    grid = standard_grid()
    groups = itertools.groupby(grid, lambda case: (case.dtype, case.group))
    part = {case.name: case for _, cases in groups for case in list(cases)[::12]}
    part.update({case.name: case for case in grid if case.shape == (1, 5)})
    try:
        report = run_grid(ScratchBatchNorm, OracleLayer, part.values(), backends=[backend], steps=1)
    except BackendError as error:
        pytest.skip(str(error))
    assert report, str(report)
    assert {row.backend for row in report.rows} == {backend}


def test_the_command_selects_dtypes_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(parity, "standard_grid", few)
    monkeypatch.setattr(parity.run_grid, "__defaults__", (Blind, nn.BatchNorm, None))
    assert cli.main(["parity", "--dtype", "float64"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "float32" not in out


def test_the_command_refuses_a_negative_seed(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["parity", "--seed", "-1"])
    assert exit.value.code == 2
    assert "must be at least 0, got '-1'" in capsys.readouterr().err


def test_the_command_prints_a_rich_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(parity, "standard_grid", few)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["parity"]) == 0
    assert "held: all" in capsys.readouterr().out


# --- the oracle as a layer --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": -1, "epsilon": 1e-3},
        {"scale": False},
        {"center": False, "beta_initializer": "ones"},
        {"momentum": None},
        {"unbiased_variance": True},
        {"use_global_stats": True},
    ],
)
def test_the_layer_holds_against_the_oracle(options):
    case = Case((4, 5, 3, 6), options)
    report = run_grid(ScratchBatchNorm, OracleLayer, [case], rtol=1e-12, atol=1e-12)
    assert report, str(report)


def test_the_layer_with_relu_holds_against_the_oracle():
    case = Case((4, 5, 3, 6))
    report = run_grid(ScratchBatchNormReLU, OracleReLU, [case], rtol=1e-12, atol=1e-12)
    assert report, str(report)
    assert not run_grid(ScratchBatchNorm, OracleReLU, [case])


def test_the_oracle_finds_the_faults(x):
    for wrong in (Blind, Detached, Stuck):
        assert not compare(wrong(), OracleLayer(in_channels=4), x)


# --- the script -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "parity_report.py"
    spec = importlib.util.spec_from_file_location("parity_report", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_its_page(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "standard_grid", few)
    known = {"center_false": script.DEFECTS["center_false"]}
    monkeypatch.setattr(script, "DEFECTS", known)
    monkeypatch.setattr(script, "nets", lambda full: [script.Net("LeNet", lenet, (2, 1, 28, 28))])
    path = tmp_path / "page" / "report.html"
    assert script.main(["--out", str(path), "--backends", "portable", "auto"]) == 0
    assert "held" in capsys.readouterr().out
    page = path.read_text()
    assert "backend portable, auto; kernel " in page
    assert page.count("<td>portable</td>") == page.count("<td>auto</td>") == 6  # a line for each
    assert "Everything held" in page
    assert page.count("data:image/png;base64,") == 2
    assert "<code>center=False</code> still adds beta" in page
    assert page.count("beta of 5 adds") == 2
    assert known["center_false"].cause in page
    assert "http" not in page


def test_the_script_fails_with_ours(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "standard_grid", few)
    monkeypatch.setattr(script, "DEFECTS", {})
    monkeypatch.setattr(script, "ScratchBatchNorm", Blind)
    path = tmp_path / "report.html"
    assert script.main(["--no-nets", "--out", str(path), "--backends", "auto"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert "out of tolerance" in path.read_text()


def test_the_script_fails_with_a_defect_of_ours(script, tmp_path, monkeypatch, capsys):
    wrong, right = Outcome(False, True, "off by <5>"), Outcome(True, False, "exact")

    def found(defects):
        for defect in defects:
            outcomes = {(norm, "eager"): wrong for norm in ("built-in", "ours")}
            outcomes.update({(norm, "graph"): right for norm in ("built-in", "ours")})
            yield Finding(defect, outcomes)

    monkeypatch.setattr(script, "standard_grid", few)
    monkeypatch.setattr(script, "DEFECTS", {"scale_false": script.DEFECTS["scale_false"]})
    monkeypatch.setattr(script, "survey", found)
    path = tmp_path / "report.html"
    assert script.main(["--no-nets", "--out", str(path), "--backends", "auto"]) == 1
    out = capsys.readouterr().out
    assert "scale_false, ours, eager: off by <5>" in out
    assert "built-in, graph" not in out  # what counts is ours
    assert path.read_text().count("off by &lt;5&gt;") == 3  # among the failures, and in two cells
