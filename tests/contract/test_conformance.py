"""The layer against the oracle over everything hypothesis can think of: data, options, histories.

How far a result may be off is derived, not guessed. Let u be the unit roundoff of the arithmetic
and M the largest magnitude in a channel. A mean is known to some u M before it is refined, so the
normalized value of an element is known to about u (1 + kappa)^2 (1 + |xhat|), where
kappa = 4 u M / sqrt(variance + epsilon) compares that error with the unit it is measured in. The
tolerance is this with 1e-12 (float64) or 2e-6 (float32) for u, times what it is multiplied by in
each result. In float64 kappa is at most 1e-5 here: the promise of 1e-10 is tested with a margin.
"""

import dataclasses
import tempfile
from pathlib import Path

import scratchbn
from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm, as_channels, batch_moments, reduced_axes

import hypothesis
import hypothesis.strategies as st
import mxnet as mx
import numpy as np
import pytest
from helpers import (
    BLOCK_MODES,
    Subject,
    build_subject,
    in_mode,
    infer,
    numeric_gradient,
    random_values,
    set_values,
    take_step,
    train_forward,
)
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mxnet.gluon import SymbolBlock, nn

LAYERS = (ScratchBatchNorm, ScratchBatchNormReLU)
RESULT = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-6}
STATISTIC = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-6}
# Data of float16 are computed with in float32.
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-24}
# Beyond this the spread of a channel drowns in rounding and there is no value to compare with.
WORST_KAPPA = 10


class Reference(OracleBatchNorm):
    """The oracle, on data shifted by the first element of each channel.

    Batch normalization does not notice a shift, and the difference of close numbers is exact. The
    oracle alone loses 1e-6 to a mean of 1e5 with a standard deviation of 1e-5, in float64.
    """

    def moments(self, x):
        """Mean and variance of each channel, and the shifted data with the mean they have."""
        first = tuple(slice(None if i == self.axis % x.ndim else 1) for i in range(x.ndim))
        shifted = x - x[first]
        mean, var = batch_moments(shifted, self.axis)
        return x[first].reshape(-1) + mean, var, shifted, mean

    def train_step(self, x, dy):
        if self.use_global_stats:
            return self.infer_step(x, dy)
        mean, var, shifted, shifted_mean = self.moments(x)
        self._update(mean, var, x.size // x.shape[self.axis])
        return self._step(shifted, dy, shifted_mean, var, through_statistics=True)


def rounded(values, dtype):
    return np.asarray(values).astype(dtype).astype(np.float64)


def rounding_of_mean(x, axis, dtype):
    """The error of a mean before it is refined, per channel."""
    return 4 * ROUNDOFF[dtype] * np.abs(x).max(axis=reduced_axes(x.ndim, axis))


def kappa(x, var, axis, epsilon, dtype):
    lost, scale = rounding_of_mean(x, axis, dtype), np.sqrt(var + epsilon)
    return np.divide(lost, scale, out=np.full_like(lost, np.inf), where=scale > 0)


def tolerances(oracle, x, dy, dtype, training):
    """Tolerances of y, dx, dgamma and dbeta, of the shapes of these."""
    axes = reduced_axes(x.ndim, oracle.axis)

    def wide(vector):
        return as_channels(vector, x.ndim, oracle.axis)

    learning = training and not oracle.use_global_stats
    mean, var = oracle.moments(x)[:2] if learning else (oracle.running_mean, oracle.running_var)
    lost = kappa(x, var, oracle.axis, oracle.epsilon, dtype) if learning else np.zeros_like(var)
    unit = wide(RESULT[dtype] * (1 + lost) ** 2)
    inverse_std = 1 / np.sqrt(var + oracle.epsilon)
    gamma = np.abs(oracle.gamma) if oracle.scale else np.ones_like(oracle.gamma)
    x_hat = np.abs(x - wide(mean)) * wide(inverse_std)
    largest = np.abs(dy).max(axis=axes, keepdims=True)
    return {
        "y": unit * wide(gamma) * (1 + x_hat) + RESULT[dtype] * wide(np.abs(oracle.beta)),
        "dx": unit * wide(gamma * inverse_std) * largest * (1 + x_hat),
        "dgamma": (unit * np.abs(dy) * (1 + x_hat)).sum(axis=axes),
        "dbeta": RESULT[dtype] * np.abs(dy).sum(axis=axes),
    }


def away_from_the_kink(oracle, x, dy, dtype, training):
    """Let no gradient come from elements where rounding decides whether a ReLU lets it pass."""
    if not oracle.relu:
        return dy
    linear = Reference(**{**vars(oracle), "relu": False})
    z = linear.train(x) if training else linear.infer(x)
    return np.where(np.abs(z) <= tolerances(oracle, x, dy, dtype, training)["y"], 0, dy)


def check(subject, x, dy, training, take):
    """Compare one step, `take(x, dy)`, with the oracle's; the largest error over tolerance."""
    oracle, dtype = subject.oracle, subject.dtype
    x = rounded(x, dtype)
    dy = away_from_the_kink(oracle, x, rounded(dy, dtype), dtype, training)
    allowed = tolerances(oracle, x, dy, dtype, training)
    before = oracle.running_mean
    expected = (oracle.train_step if training else oracle.infer_step)(x, dy)
    actual = take(x, dy)
    worst = 0.0
    for name, tolerance in allowed.items():
        e, a = getattr(expected, name), getattr(actual, name)
        if a is None:
            continue
        if dtype == "float16" and name in ("y", "dx"):
            tolerance = tolerance + 2.0**-10 * np.abs(e) + 2.0**-24
        assert a.shape == e.shape, name
        error = np.abs(a - e)
        assert (error <= tolerance).all(), (
            f"{name}: off by {error.max()}, {(error / tolerance).max()} times what is allowed"
        )
        worst = max(worst, (error[tolerance > 0] / tolerance[tolerance > 0]).max(initial=0))
    if training and not oracle.use_global_stats:
        check_moved_statistics(subject, x, before)
    return worst


def check_moved_statistics(subject, x, before):
    """Compare the statistics after a training step, then let the oracle go on from the layer's.

    So no step inherits the rounding of an earlier one, and what does not train must keep each bit.
    """
    oracle, unit = subject.oracle, STATISTIC[subject.dtype]
    lost = rounding_of_mean(x, oracle.axis, subject.dtype)
    axes = reduced_axes(x.ndim, oracle.axis)
    allowed = unit * (np.abs(x).max(axis=axes) + np.abs(before))
    mean, var = subject.statistics()
    assert (np.abs(mean - oracle.running_mean) <= allowed).all(), (mean, oracle.running_mean)
    allowed = 10 * unit * lost**2 + unit * oracle.running_var * (1 if unit < 1e-9 else 10)
    assert (np.abs(var - oracle.running_var) <= allowed).all(), (var, oracle.running_var)
    oracle.running_mean, oracle.running_var = mean.astype(np.float64), var.astype(np.float64)


# Data and options


def powers_of_ten(least, most):
    return st.floats(least, most).map(lambda exponent: 10.0**exponent)


@st.composite
def problems(draw):
    """A layer's options, and what to generate its parameters and its data from."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=5), "shape"))
    dtype = draw(st.sampled_from(("float64", "float32", "float16")))
    # Of float16, 1e5 is out of range, and gradients are where the standard deviation is 1e-5.
    size, least, most = (4, -2, 2) if dtype == "float16" else (5, -5, 3)
    return {
        "shape": shape,
        "dtype": dtype,
        "layer_class": draw(st.sampled_from(LAYERS)),
        "mean": draw(st.just(0.0) | powers_of_ten(-size, size)),
        "deviation": draw(powers_of_ten(least, most)),
        "seed": draw(st.integers(0, 2**16)),
        "axis": draw(st.integers(-len(shape), len(shape) - 1)),
        # Subnormal numbers are refused: MXNet's operators cannot read them.
        "momentum": draw(
            st.sampled_from([None, 0.0, 0.9, 1.0]) | st.floats(0, 1, allow_subnormal=False)
        ),
        "epsilon": draw(st.sampled_from([0.0, 1e-8, 1e-5, 1e-3, 1.0])),
        "center": draw(st.booleans()),
        "scale": draw(st.booleans()),
        "use_global_stats": draw(st.integers(0, 4).map(lambda n: n == 4)),
        "unbiased_variance": draw(st.booleans()),
    }


@hypothesis.settings(max_examples=300)
@hypothesis.given(problem=problems(), mode=st.sampled_from(BLOCK_MODES))
def test_any_data_and_options(device, problem, mode):
    options = dict(problem)
    shape, dtype = options.pop("shape"), options["dtype"]
    mean, deviation = options.pop("mean"), options.pop("deviation")
    rng = np.random.default_rng(options.pop("seed"))
    channels, axis = shape[options["axis"]], options["axis"]
    means = mean * rng.uniform(0.5, 1, channels) * rng.choice([-1, 1], channels)
    deviations = deviation * rng.uniform(0.5, 2, channels)

    def data():
        noise = rng.normal(size=shape) * as_channels(deviations, len(shape), axis)
        return rounded(noise + as_channels(means, len(shape), axis), dtype)

    x = data()
    var = batch_moments(x - as_channels(means, len(shape), axis), axis)[1]
    if kappa(x, var, axis, options["epsilon"], dtype).max() > WORST_KAPPA:
        options["epsilon"] = 1e-5
    values = {
        "running_mean": means + deviations * rng.normal(size=channels),
        "running_var": deviations**2 * rng.uniform(0.5, 2, channels),
    }
    subject = build_subject(
        mode, shape, rng=rng, device=device, directory=None, values=values, **options
    )
    subject.oracle = Reference(**vars(subject.oracle))

    worst = check(subject, x, rng.normal(size=shape), True, lambda *a: take_step(subject, *a))
    statistics = subject.statistics()
    worst_of_inference = check(
        subject,
        data(),
        rng.normal(size=shape),
        False,
        lambda *a: take_step(subject, *a, record_train=False),
    )
    for before, after in zip(statistics, subject.statistics()):
        np.testing.assert_array_equal(before, after)
    # Hypothesis looks for examples that make these larger.
    hypothesis.target(float(worst), label=f"training in {dtype}: error / tolerance")
    hypothesis.target(float(worst_of_inference), label=f"inference in {dtype}: error / tolerance")


# Histories

KINDS = ("eager", "hybrid", "static_alloc", "static_shape")
seeds = st.integers(0, 2**16)
OTHER = {"float32": "float64", "float64": "float32"}


class History(RuleBasedStateMachine):
    """A net of one norm layer, used in any order of ways; `subject.oracle` is what it should be."""

    def __init__(self, device, directory):
        super().__init__()
        self.device = device
        self.directory = Path(tempfile.mkdtemp(dir=directory))

    def new_net(self):
        net = nn.HybridSequential()
        net.add(self.layer_class(**self.options))
        return net

    @property
    def layer(self):
        return self.subject.net[0]

    @property
    def oracle(self):
        return self.subject.oracle

    @initialize(
        shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
        data=st.data(),
        dtype=st.sampled_from(("float64", "float32")),
        kind=st.sampled_from(KINDS),
        layer_class=st.sampled_from(LAYERS),
        momentum=st.sampled_from((0.9, 0.5, None, 0.0, 1.0)),
        flags=st.tuples(*[st.booleans()] * 3),
        seed=seeds,
    )
    def start(self, shape, data, dtype, kind, layer_class, momentum, flags, seed):
        axis = data.draw(st.integers(-len(shape), len(shape) - 1), "axis")
        self.shape, self.axis, self.channels = shape, axis, shape[axis]
        self.layer_class = layer_class
        self.options = {
            "axis": axis,
            "momentum": momentum,
            "epsilon": 1e-3,
            **dict(zip(("center", "scale", "unbiased_variance"), flags)),
        }
        values = random_values(np.random.default_rng(seed), self.channels)
        values = {name: rounded(value, dtype) for name, value in values.items()}
        oracle = Reference(**values, relu=layer_class is ScratchBatchNormReLU, **self.options)
        net = self.new_net()
        net.initialize(ctx=self.device)
        net[0].infer_shape(mx.nd.zeros(shape, ctx=self.device))
        net.cast(dtype)
        for parameter in net.collect_params().values():
            parameter._finish_deferred_init()
        set_values(net[0], values)
        self.subject = Subject(kind, net[0], in_mode(net, kind), oracle, self.device, dtype)
        self.before_freeze = None

    def batch(self, seed, offset=0.0):
        """Data and head gradient; every length but the channel's changes with the seed."""
        rng = np.random.default_rng(seed)
        shape = [n + rng.integers(0, 3) for n in self.shape]
        shape[self.axis] = self.channels
        return rng.normal(size=shape) * rng.uniform(0.1, 10) + offset, rng.normal(size=shape)

    @rule(seed=seeds, offset=st.sampled_from((0.0, 1.0, -30.0)), backwards=st.integers(1, 2))
    def train(self, seed, offset, backwards):
        def take(x, dy):
            return take_step(self.subject, x, dy, backwards=backwards)

        check(self.subject, *self.batch(seed, offset), True, take)

    @rule(seed=seeds)
    def train_without_recording(self, seed):
        self.forward_only(self.subject, seed, True, train_forward)

    @rule(seed=seeds)
    def infer(self, seed):
        self.forward_only(self.subject, seed, False, infer)

    def forward_only(self, subject, seed, training, run):
        def take(x, dy):
            return Output(run(subject, x).astype(np.float64))

        check(subject, *self.batch(seed), training, take)

    @rule(seed=seeds)
    def record_inference(self, seed):
        def take(x, dy):
            return take_step(self.subject, x, dy, record_train=False)

        check(self.subject, *self.batch(seed), False, take)

    @rule(seed=seeds)
    def write_parameters(self, seed):
        values = random_values(np.random.default_rng(seed), self.channels)
        for name in ("gamma", "beta"):
            value = rounded(values[name], self.subject.dtype)
            set_values(self.layer, {name: value})
            setattr(self.oracle, name, value)

    @rule()
    def freeze(self):
        scratchbn.freeze(self.subject.net)
        if self.before_freeze is None:
            self.before_freeze = self.oracle.use_global_stats
        self.oracle.use_global_stats = True

    @rule()
    def unfreeze(self):
        scratchbn.unfreeze(self.subject.net)
        if self.before_freeze is not None:
            self.oracle.use_global_stats = self.before_freeze
        self.before_freeze = None

    @rule(value=st.booleans())
    def edit_options(self, value):
        self.layer._kwargs["use_global_stats"] = value
        self.layer._clear_cached_op()
        self.subject.net._clear_cached_op()
        self.oracle.use_global_stats = value

    @rule()
    def cast(self):
        self.subject.dtype = OTHER[self.subject.dtype]
        self.subject.net.cast(self.subject.dtype)
        for name in ("gamma", "beta", "running_mean", "running_var"):
            setattr(self.oracle, name, rounded(getattr(self.oracle, name), self.subject.dtype))

    @rule(kind=st.sampled_from(KINDS))
    def hybridize(self, kind):
        self.subject.net.hybridize(False)
        self.subject.net = in_mode(self.subject.net, kind)
        self.subject.mode = kind

    @rule()
    def save_and_go_on_in_another_net(self):
        path = str(self.directory / "net.params")
        self.subject.net.save_parameters(path)
        net = self.new_net()
        net.cast(self.subject.dtype)
        net.load_parameters(path, ctx=self.device)
        net[0]._kwargs["use_global_stats"] = self.oracle.use_global_stats
        self.subject.layer = net[0]
        self.subject.net = in_mode(net, self.subject.mode)
        self.before_freeze = None

    @precondition(lambda self: self.subject.mode != "eager")
    @rule(seed=seeds)
    def export_and_train_the_copy(self, seed):
        self.infer(seed)
        prefix = str(self.directory / "exported")
        self.subject.net.export(prefix)
        net = SymbolBlock.imports(
            f"{prefix}-symbol.json", ["data"], f"{prefix}-0000.params", ctx=self.device
        )
        copy = dataclasses.replace(
            self.subject, mode="exported", net=net, oracle=Reference(**vars(self.oracle))
        )
        self.forward_only(copy, seed + 1, False, infer)
        check(copy, *self.batch(seed + 2), True, lambda *a: take_step(copy, *a))
        self.forward_only(copy, seed + 3, False, infer)

    @precondition(
        lambda self: self.options["momentum"] is not None and not self.options["unbiased_variance"]
    )
    @rule(seed=seeds)
    def be_built_in_for_a_while(self, seed):
        _, report = scratchbn.to_builtin(self.subject.net)
        assert len(report.converted) == 1
        assert not isinstance(self.layer, ScratchBatchNorm)
        # The built-in overwrites gamma without scale, adds beta without center, and its layer with
        # ReLU takes one kind of input only.
        if self.options["center"] and self.options["scale"] and not self.oracle.relu:
            self.forward_only(self.subject, seed, False, infer)
        scratchbn.to_scratch(self.subject.net)
        self.subject.layer = self.layer
        assert type(self.layer) is self.layer_class

    @invariant()
    def state_is_the_oracles_to_the_bit(self):
        for name in ("gamma", "beta", "running_mean", "running_var"):
            value = self.subject.value(name)
            assert value.dtype == self.subject.dtype
            np.testing.assert_array_equal(value, getattr(self.oracle, name), err_msg=name)
        if self.options["momentum"] is None:
            assert self.subject.value("num_batches") == [self.oracle.batches]
        assert self.layer._kwargs["use_global_stats"] == self.oracle.use_global_stats


@dataclasses.dataclass(frozen=True)
class Output:
    """A step without a backward."""

    y: np.ndarray
    dx: None = None
    dgamma: None = None
    dbeta: None = None


def test_any_sequence_of_calls(device, tmp_path):
    run_state_machine_as_test(
        lambda: History(device, tmp_path),
        settings=hypothesis.settings(max_examples=100, stateful_step_count=20, deadline=None),
    )


# Gradients


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", range(-4, 4))
def test_gradients_equal_central_differences(build, rng, device, axis, training, mode):
    """Of the layer itself: the oracle's formulas take no part in this."""
    shape = (2, 3, 4, 2)
    subject = build(mode, shape, axis=axis)
    x, dy = rng.normal(size=shape) * 2 + 1, rng.normal(size=shape)
    state = {name: subject.value(name).copy() for name in ("gamma", "beta")}
    # The statistics would move between the evaluations of a function that is to be the same.
    kept = dict(zip(("running_mean", "running_var"), subject.statistics()))

    def loss():
        set_values(subject.layer, state)
        run = train_forward if training else infer
        return (run(subject, x) * dy).sum()

    expected = {"dx": numeric_gradient(loss, x, step=1e-5)}
    for name, values in state.items():
        expected[f"d{name}"] = numeric_gradient(loss, values, step=1e-5)
    set_values(subject.layer, {**state, **kept})
    actual = take_step(subject, x, dy, record_train=training)
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            getattr(actual, name), gradient, rtol=1e-7, atol=2e-9, err_msg=name
        )
