"""Single steps of the layer, over any data and options, against the oracle and differences."""

from scratchbn.parity.oracle import as_channels, batch_moments

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import (
    BLOCK_MODES,
    build_subject,
    infer,
    numeric_gradient,
    set_values,
    take_step,
    train_forward,
)
from oracle_tolerances import LAYERS, Reference, check, kappa, rounded

# Beyond this the spread of a channel drowns in rounding and there is no value to compare with.
WORST_KAPPA = 10


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
