"""The gradient that a comparison follows: of a loss, or a random one."""

from scratchbn import ScratchBatchNorm
from scratchbn.parity import Case, Report, compare, run_grid
from scratchbn.parity.oracle_layer import OracleLayer

import mxnet as mx
import numpy as np
import pytest
from compared_layers import SHAPE, Detached, kinds
from mxnet import autograd, gluon
from mxnet.gluon import nn


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
