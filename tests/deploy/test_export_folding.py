"""Norms folded into the layer before them: exactly where it can be, and refused where it cannot."""

import re

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU
from scratchbn.deploy import export_inference

import mxnet as mx
import pytest
from inference_files import EXACT, difference, exported, load, norms, prepared, sequential
from mxnet.gluon import HybridBlock, nn

# --- exact folding ----------------------------------------------------------------------------

FOLDED = {
    "conv1d": (lambda: nn.Conv1D(6, 3), (2, 4, 9), 1),
    "conv2d": (lambda: nn.Conv2D(6, 3, padding=1), (2, 4, 7, 8), 1),
    "conv3d": (lambda: nn.Conv3D(6, 2), (2, 4, 4, 5, 6), 1),
    "grouped": (lambda: nn.Conv2D(6, 3, groups=2), (2, 4, 7, 8), 1),
    "depthwise": (lambda: nn.Conv2D(4, 3, groups=4), (2, 4, 7, 8), 1),
    "no bias": (lambda: nn.Conv2D(6, 3, use_bias=False), (2, 4, 7, 8), 1),
    "negative axis": (lambda: nn.Conv2D(6, 3), (2, 4, 7, 8), -3),
    "transposed 1d": (lambda: nn.Conv1DTranspose(6, 3, strides=2), (2, 4, 9), 1),
    "transposed 2d": (lambda: nn.Conv2DTranspose(6, 3, strides=2), (2, 4, 5, 4), 1),
    "transposed 3d": (lambda: nn.Conv3DTranspose(6, 2), (2, 4, 3, 4, 5), 1),
    "transposed grouped": (
        lambda: nn.Conv2DTranspose(6, 3, groups=2, in_channels=4),
        (2, 4, 5, 4),
        1,
    ),
    "transposed no bias": (lambda: nn.Conv2DTranspose(6, 3, use_bias=False), (2, 4, 5, 4), 1),
    "dense": (lambda: nn.Dense(6), (5, 4, 3), 1),
    "dense no bias": (lambda: nn.Dense(6, use_bias=False), (5, 4), -1),
    "dense last axis": (lambda: nn.Dense(6, flatten=False), (5, 4, 3), 2),
    "dense negative axis": (lambda: nn.Dense(6, flatten=False), (5, 4, 3), -1),
}


@pytest.mark.parametrize("case", FOLDED)
@norms
def test_folds_exactly(case, norm, rng, tmp_path):
    producer, shape, axis = FOLDED[case]
    net = sequential(producer(), norm(axis=axis))
    y, x = prepared(net, rng, shape)
    report, ops = exported(net, tmp_path / "net", y, x)
    assert (len(report.folded), len(report.kept)) == (1, 0)
    assert len(ops) == 1


@pytest.mark.parametrize("options", [{"center": False}, {"scale": False}, {"epsilon": 0.1}])
@norms
def test_options_of_the_layer_are_folded(options, norm, rng, tmp_path):
    if norm is nn.BatchNorm and options == {"center": False}:
        pytest.skip("the built-in adds a beta that is not zero all the same")
    net = sequential(nn.Conv2D(6, 3), norm(**options), nn.Activation("relu"))
    y, x = prepared(net, rng, (2, 4, 6, 6))
    assert len(exported(net, tmp_path / "net", y, x)[0].folded) == 1


@norms
def test_norms_in_a_row_become_one(norm, rng, tmp_path):
    net = sequential(norm(), norm(), norm(), nn.Activation("relu"))
    y, x = prepared(net, rng, (2, 4, 6, 6))
    report, ops = exported(net, tmp_path / "net", y, x)
    assert ops == ["Convolution", "Activation"]
    assert ["merged" in row.result for row in report.folded] == [True, True]

    net = sequential(nn.Conv2D(5, 3), norm(), norm())
    y, x = prepared(net, rng, (2, 4, 6, 6))
    report, ops = exported(net, tmp_path / "net", y, x)
    assert ops == ["Convolution"]
    assert len(report.folded) == 2


@norms
def test_merged_norms_as_batchnorm(norm, rng, tmp_path):
    net = sequential(norm(), norm())
    y, x = prepared(net, rng, (2, 4, 6, 6))
    assert exported(net, tmp_path / "net", y, x, style="batchnorm")[1] == ["BatchNorm"]


@norms
def test_norms_of_different_axes_stay_apart(norm, rng, tmp_path):
    net = sequential(norm(axis=1), norm(axis=2))
    y, x = prepared(net, rng, (2, 4, 6, 6))
    report, _ = exported(net, tmp_path / "net", y, x)
    assert [row.because for row in report.kept][1].endswith("axis 1 and it has axis 2")


@pytest.mark.parametrize("layer", [ScratchBatchNormReLU, nn.BatchNormReLU])
def test_relu_stays_behind_its_norm(layer, rng, tmp_path):
    net = sequential(nn.Conv2D(5, 3), layer(), ScratchBatchNorm(), layer(), ScratchBatchNorm())
    y, x = prepared(net, rng, (2, 4, 6, 6))
    report, ops = exported(net, tmp_path / "net", y, x)
    relu = ops[1]
    assert relu in ("relu", "Activation")
    assert ops == ["Convolution", relu, "Convolution", relu, "Convolution"]
    assert [len(report.folded), len(report.kept)] == [2, 2]


def test_report_prints_a_table(rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), ScratchBatchNorm(), nn.Activation("relu"), ScratchBatchNorm())
    _, x = prepared(net, rng, (2, 3, 6, 6))
    lines = str(export_inference(net, tmp_path / "net", x)).splitlines()
    assert lines[0].split() == ["layer", "result", "because"]
    assert re.fullmatch(r"\S*batchnorm\d+_fwd +folded into \S*conv\d+_fwd", lines[1])
    assert re.fullmatch(r"\S+ +1x1 depthwise Convolution +it follows \S+ \(Activation\)", lines[2])
    assert lines[3] == "1 folded, 1 kept"


# --- refusals ---------------------------------------------------------------------------------


class Wired(HybridBlock):
    """Layers `a`, `b` and two norms, wired by a function of this block and x."""

    def __init__(self, wiring, axis=1):
        super().__init__()
        self.wiring = wiring
        with self.name_scope():
            self.a, self.b = nn.Conv2D(4, 1), nn.Conv2D(4, 1)
            self.first, self.second = (ScratchBatchNorm(axis=axis) for _ in range(2))

    def hybrid_forward(self, F, x):
        return self.wiring(self, x)


class Tied(HybridBlock):
    """Two convolutions with one weight, a norm after each."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.a = nn.Conv2D(4, 1, in_channels=4, use_bias=False)
            self.b = nn.Conv2D(4, 1, in_channels=4, use_bias=False, params=self.a.params)
            self.first, self.second = ScratchBatchNorm(), ScratchBatchNorm()

    def hybrid_forward(self, F, x):
        return self.second(self.b(self.first(self.a(x))))


def conv_used_twice(net, x):
    y = net.a(x)
    return net.first(y) + y


def two_norms_of_one_conv(net, x):
    y = net.a(x)
    return net.first(y) + net.second(y)


REFUSED = {
    "shared conv": (lambda: Wired(lambda n, x: n.second(n.a(n.first(n.a(x))))), "several layers"),
    "tied weight": (Tied, "several layers"),
    "conv used twice": (lambda: Wired(conv_used_twice), "used 2 times"),
    "two norms of one conv": (lambda: Wired(two_norms_of_one_conv), "used 2 times"),
    "relu between": (lambda: Wired(lambda n, x: n.first(n.a(x).relu())), "(relu)"),
    "channels last": (lambda: Wired(lambda n, x: n.first(n.a(x)), axis=-1), "not the channel axis"),
    "no producer": (lambda: Wired(lambda n, x: n.first(x)), "its input is data"),
}


@pytest.mark.parametrize("style", ["dwconv", "affine", "batchnorm"])
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_to_fold(case, style, rng, tmp_path):
    build, because = REFUSED[case]
    net = build()
    y, x = prepared(net, rng, (2, 4, 5, 4))
    report, ops = exported(net, tmp_path / "net", y, x, style=style)
    assert report.folded == ()
    assert all(because in row.because for row in report.kept), report
    assert ("BatchNorm" in ops) == (style == "batchnorm")


def test_refuses_an_output_of_the_graph(rng, tmp_path):
    class Both(HybridBlock):
        def __init__(self):
            super().__init__()
            with self.name_scope():
                self.conv, self.norm = nn.Conv2D(4, 1), ScratchBatchNorm()

        def hybrid_forward(self, F, x):
            y = self.conv(x)
            return [y, self.norm(y)]

    net = Both()
    (conv, normed), x = prepared(net, rng, (2, 4, 5, 4))
    report = export_inference(net, tmp_path / "net", x)
    assert "is an output of the graph" in report.kept[0].because
    again = load(tmp_path / "net")(x)
    assert difference(conv, again[0]) < EXACT
    assert difference(normed, again[1]) < EXACT


def test_weights_that_overflow_float16_stay_apart(tmp_path):
    net = sequential(nn.Dense(1, in_units=1, use_bias=False), ScratchBatchNorm(in_channels=1))
    net.initialize(mx.init.Constant(60000))
    net.cast("float16")
    net[1].gamma.set_data(mx.nd.array([2]))
    net[1].running_mean.set_data(mx.nd.zeros(1))
    net[1].running_var.set_data(mx.nd.ones(1))
    net[1].beta.set_data(mx.nd.zeros(1))
    report = export_inference(net, tmp_path / "net", mx.nd.ones((1, 1), dtype="float16"))
    assert "do not fit float16" in report.kept[0].because

    net[1].gamma.set_data(mx.nd.array([1e6]))
    with pytest.raises(
        ValueError, match=r"constants of .*_fwd' do not fit float16: the largest is 999995"
    ):
        export_inference(net, tmp_path / "net", mx.nd.ones((1, 1), dtype="float16"))
