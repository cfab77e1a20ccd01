"""Two nets that are alike agree, in every mode, phase and step."""

from scratchbn import ScratchBatchNorm
from scratchbn.parity import compare

import helpers
import mxnet as mx
import numpy as np
import pytest
from compared_layers import SHAPE, Stuck, kinds
from mxnet import gluon
from mxnet.gluon import nn

from models.lenet import lenet


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
