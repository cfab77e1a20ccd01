"""Norms that stay on their own in an inference export: every style, dtype and rank, and loops."""

from scratchbn import ScratchBatchNorm
from scratchbn.deploy import export_inference

import mxnet as mx
import numpy as np
import pytest
from inference_files import (
    EXACT,
    difference,
    exported,
    load,
    norms,
    operators,
    prepared,
    sequential,
)
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn


@pytest.mark.parametrize("fold_at_all", [True, False])
@pytest.mark.parametrize("style", ["dwconv", "affine", "batchnorm"])
@pytest.mark.parametrize(
    "shape, axis",
    [
        ((5, 3), 1),
        ((5, 3), 0),
        ((2, 3, 4), 1),
        ((2, 3, 4), -1),
        ((2, 3, 4, 5), -3),
        ((2, 3, 4, 5), 3),
        ((2, 3, 4, 2, 2), 1),
        ((2, 3, 2, 2, 2, 2), 1),
        ((2, 1, 4, 5), 1),
    ],
)
@norms
def test_styles(shape, axis, style, fold_at_all, norm, rng, tmp_path):
    net = sequential(norm(axis=axis))
    y, x = prepared(net, rng, shape)
    report, ops = exported(net, tmp_path / "net", y, x, style=style, fold=fold_at_all)
    if style == "batchnorm":
        assert ops == ["BatchNorm"]
    elif style == "dwconv" and axis % len(shape) == 1 and 3 <= len(shape) <= 5:
        assert ops == ["Convolution"]
    else:
        assert ops == ["broadcast_mul", "broadcast_add"]
    assert (report.kept[0].because == "fold=False") == (not fold_at_all)


@pytest.mark.parametrize("dtype, exact", [("float64", 1e-14), ("float16", 2e-3)])
@pytest.mark.parametrize("style", ["dwconv", "affine", "batchnorm"])
@norms
def test_dtypes(dtype, exact, style, norm, rng, tmp_path):
    net = sequential(norm(), nn.Activation("relu"), norm())
    y, x = prepared(net, rng, (3, 4, 5, 5), dtype=dtype)
    exported(net, tmp_path / "net", y, x, exact=exact, style=style)
    assert load(tmp_path / "net")(x).dtype == np.dtype(dtype)


@norms
def test_float64_folds_in_float64(norm, rng, tmp_path):
    net = sequential(nn.Conv2D(5, 3), norm())
    y, x = prepared(net, rng, (3, 4, 5, 5), dtype="float64")
    report, _ = exported(net, tmp_path / "net", y, x, exact=1e-14)
    assert len(report.folded) == 1


def test_a_channel_that_never_varies_gives_beta(rng, tmp_path):
    net = sequential(ScratchBatchNorm(epsilon=0, in_channels=3))
    _, x = prepared(net, rng, (4, 3, 5))
    net[0].running_var.set_data(mx.nd.array([0, 1, 2]))
    for style in ("dwconv", "affine", "batchnorm"):
        exported(net, tmp_path / "net", net(x), x, style=style)


@norms
def test_a_layer_called_twice_keeps_one_set_of_constants(norm, rng, tmp_path):
    layer = norm()
    net = sequential(layer, nn.Activation("relu"), layer)
    for style, constants in (("dwconv", 2), ("affine", 2), ("batchnorm", 4)):
        y, x = prepared(net, rng, (2, 3, 4, 4))
        exported(net, tmp_path / "net", y, x, style=style)
        assert len(mx.nd.load(str(tmp_path / "net-0000.params"))) == constants


def test_dropout_goes_unless_it_is_always_on(rng, tmp_path):
    class Always(HybridBlock):
        def hybrid_forward(self, F, x):
            return F.Dropout(x, p=0.5, mode="always", name="noise")

    net = sequential(
        nn.Dropout(0.5), nn.Dense(4), nn.Dropout(0.5), ScratchBatchNorm(), nn.Dropout(0.5)
    )
    y, x = prepared(net, rng, (2, 4))
    assert exported(net, tmp_path / "net", y, x)[1] == ["FullyConnected"]
    net = sequential(nn.Dense(4), Always())
    _, x = prepared(net, rng, (2, 4))
    report = export_inference(net, tmp_path / "net", x)
    assert operators(tmp_path / "net") == ["FullyConnected", "Dropout"]
    assert report.kept[0].because == "it has mode='always'"


def test_a_net_that_does_nothing_in_inference(tmp_path):
    net = sequential(nn.Dropout(0.5))
    net.initialize()
    x = mx.nd.ones((2, 3))
    exported(net, tmp_path / "net", x, x)


@norms
def test_running_statistics_do_not_move_when_the_export_is_trained(norm, rng, tmp_path):
    net = sequential(norm(), nn.Dropout(0.5))
    y, x = prepared(net, rng, (4, 3, 5))
    export_inference(net, tmp_path / "net", x, style="batchnorm")
    again = load(tmp_path / "net")
    with autograd.record():
        z = again(x)
    z.backward()
    assert difference(y, z) < EXACT
    assert difference(y, again(x)) < EXACT


class Normalized(ScratchBatchNorm):
    """A variant with a formula of its own: the output is squashed."""

    def transform(self, F, view, *arguments):
        return F.tanh(super().transform(F, view, *arguments))


def test_a_variant_keeps_its_formula_and_loses_its_training_branch(rng, tmp_path):
    net = sequential(nn.Conv2D(5, 3), Normalized())
    y, x = prepared(net, rng, (2, 4, 6, 6))
    report, ops = exported(net, tmp_path / "net", y, x)
    assert [row.because for row in report.kept] == ["the graph has no description of the layer"]
    assert "tanh" in ops
    assert not {"sgd_mom_update", "Dropout", "where"} & set(ops)


class Loop(HybridBlock):
    """A layer applied to each step of a sequence."""

    def __init__(self, layer):
        super().__init__()
        with self.name_scope():
            self.layer = layer

    def hybrid_forward(self, F, x):
        return F.contrib.foreach(lambda d, s: (self.layer(d), s), x, [])[0]


def test_what_stays_inside_a_loop_is_reported(rng, tmp_path):
    net = Loop(nn.BatchNorm(in_channels=3))
    y, x = prepared(net, rng, (2, 4, 3))
    report, _ = exported(net, tmp_path / "net", y, x)
    assert [(r.result, r.because) for r in report.kept] == [
        ("left with BatchNorm", "it is inside a loop")
    ]


def test_a_norm_inside_a_loop_is_refused(tmp_path):
    net = Loop(ScratchBatchNorm(in_channels=3))
    net.initialize()
    with pytest.raises(
        ValueError, match=r"inside loop '.*foreach0' .* take the batch normalization out"
    ):
        export_inference(net, tmp_path / "net", mx.nd.ones((2, 4, 3)))
