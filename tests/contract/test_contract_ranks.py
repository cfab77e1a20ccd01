"""Clause 8 of the contract: data of any rank, with the channels on any axis."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.parity.oracle import OracleBatchNorm

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from contract_cases import every_mode
from helpers import BLOCK_MODES, CLOSE, MODES, array, check_step, in_mode, infer, take_step
from mxnet import autograd

SHAPES = {2: (5, 3), 3: (4, 3, 2), 4: (3, 2, 4, 5), 5: (2, 3, 2, 4, 2), 6: (2, 3, 2, 1, 3, 2)}
AXES = [(rank, axis) for rank in SHAPES for axis in range(-rank, rank)]


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
