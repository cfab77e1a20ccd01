"""Errors planted in a layer are found, where they are and as large as they are."""

from scratchbn import ScratchBatchNorm
from scratchbn.parity import compare

import mxnet as mx
import numpy as np
import pytest
from compared_layers import SHAPE, Blind, Detached, Nan, Stuck, kinds
from mxnet.gluon import nn


class Reversed(ScratchBatchNorm):
    """Applies gamma to the channels in reverse order."""

    def transform(self, F, view, batch, gamma, beta, epsilon):
        gamma = F.reverse(gamma, axis=0)
        return super().transform(F, view, batch, gamma, beta, epsilon)


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
