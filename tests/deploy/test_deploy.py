"""Inference export and folding: exact where it folds, honest where it does not, safe on disk."""

import json
import os
import re
from pathlib import Path

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, cli
from scratchbn.backends.marker import KEY as MARKER
from scratchbn.deploy import export_inference, fold

import helpers
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn

from models.lenet import initialize, lenet

EXACT = 2e-6
NORMS = {"scratch": ScratchBatchNorm, "builtin": nn.BatchNorm}
STATEFUL = {
    "BatchNorm",
    "Dropout",
    "sgd_mom_update",
    "_contrib_BatchNormWithReLU",
    "_contrib_SyncBatchNorm",
    "mean",
    "sum",
    "arange_like",
    "dot",
}


@pytest.fixture(params=list(NORMS))
def norm(request):
    """Each norm layer class: ours, and MXNet's."""
    return NORMS[request.param]


def sequential(*layers):
    net = nn.HybridSequential()
    net.add(*layers)
    return net


def randomize(net, rng):
    """Give the norms parameters and statistics that no default could be mistaken for."""
    for name, parameter in net.collect_params().items():
        values = helpers.random_values(rng, parameter.shape[0])
        key = next((key for key in values if name.endswith("_" + key)), None)
        if key is not None:
            parameter.set_data(mx.nd.array(values[key], dtype=parameter.dtype))


def prepared(net, rng, *inputs, dtype="float32"):
    """Initialize, run and randomize a net; returns its outputs in inference, and the inputs."""
    net.initialize(mx.init.Xavier(magnitude=3))
    net.cast(dtype)
    arrays = [mx.nd.array(rng.normal(size=shape), dtype=dtype) for shape in inputs]
    net(*arrays)
    randomize(net, rng)
    return net(*arrays), *arrays


def load(prefix, *names):
    return SymbolBlock.imports(
        f"{prefix}-symbol.json", list(names) or ["data"], f"{prefix}-0000.params"
    )


def operators(prefix):
    nodes = json.loads(Path(f"{prefix}-symbol.json").read_text())["nodes"]
    return [node["op"] for node in nodes if node["op"] != "null"]


def difference(y, z):
    """The largest difference, relative to the largest value."""
    y, z = (v.asnumpy().astype(np.float64) for v in (y, z))
    assert y.shape == z.shape
    return np.abs(y - z).max() / np.abs(y).max()


def exported(net, prefix, y, *inputs, names=(), exact=EXACT, **options):
    """Export a net, check what the files compute, and return the report and the operators."""
    report = export_inference(net, prefix, *inputs, **options)
    assert difference(y, load(prefix, *names)(*inputs)) < exact
    return report, operators(prefix)


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
def test_folds_exactly(case, norm, rng, tmp_path):
    producer, shape, axis = FOLDED[case]
    net = sequential(producer(), norm(axis=axis))
    y, x = prepared(net, rng, shape)
    report, ops = exported(net, tmp_path / "net", y, x)
    assert (len(report.folded), len(report.kept)) == (1, 0)
    assert len(ops) == 1


@pytest.mark.parametrize("options", [{"center": False}, {"scale": False}, {"epsilon": 0.1}])
def test_options_of_the_layer_are_folded(options, norm, rng, tmp_path):
    if norm is nn.BatchNorm and options == {"center": False}:
        pytest.skip("the built-in adds a beta that is not zero all the same")
    net = sequential(nn.Conv2D(6, 3), norm(**options), nn.Activation("relu"))
    y, x = prepared(net, rng, (2, 4, 6, 6))
    assert len(exported(net, tmp_path / "net", y, x)[0].folded) == 1


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


def test_merged_norms_as_batchnorm(norm, rng, tmp_path):
    net = sequential(norm(), norm())
    y, x = prepared(net, rng, (2, 4, 6, 6))
    assert exported(net, tmp_path / "net", y, x, style="batchnorm")[1] == ["BatchNorm"]


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
ONE_BY_ONE = {"kernel": (1, 1), "num_filter": 4, "no_bias": True}


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


def test_refuses_a_weight_that_is_no_parameter(rng):
    data, weight = mx.sym.var("data"), mx.sym.var("kernels")
    symbol = mx.sym.BatchNorm(mx.sym.Convolution(data, weight, **ONE_BY_ONE), name="bn")
    params = batchnorm_params(rng, "bn", 4)
    _, _, report = fold(symbol, params)
    assert "kernels is not a parameter" in report.kept[0].because


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


# --- what is not folded -----------------------------------------------------------------------


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
def test_dtypes(dtype, exact, style, norm, rng, tmp_path):
    net = sequential(norm(), nn.Activation("relu"), norm())
    y, x = prepared(net, rng, (3, 4, 5, 5), dtype=dtype)
    exported(net, tmp_path / "net", y, x, exact=exact, style=style)
    assert load(tmp_path / "net")(x).dtype == np.dtype(dtype)


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


# --- whole nets -------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["dwconv", "affine"])
def test_lenet(style, norm, rng, tmp_path):
    net = lenet(norm_layer=norm)
    initialize(net, "xavier")
    x = mx.nd.array(rng.normal(size=(4, 1, 28, 28)))
    net(x)
    randomize(net, rng)
    report, ops = exported(net, tmp_path / "net", net(x), x, style=style)
    assert (len(report.folded), report.kept) == (3, ())
    assert len(ops) == len(["conv", "relu", "pool"] * 2 + ["flatten", "dense", "relu", "dense"])


@pytest.mark.parametrize(
    "name, size, folded, kept",
    [
        ("cifar_resnet20_v1", 32, 21, 0),
        ("mobilenet0.5", 64, 27, 0),
        ("densenet121", 224, 59, 62),
    ],
)
def test_gluoncv_nets(name, size, folded, kept, norm, rng, tmp_path):
    model_zoo = pytest.importorskip("gluoncv.model_zoo")
    options = {} if norm is nn.BatchNorm else {"norm_layer": norm}
    net = model_zoo.get_model(name, **options)
    y, x = prepared(net, rng, (1, 3, size, size))
    report, ops = exported(net, tmp_path / "net", y, x)
    assert (len(report.folded), len(report.kept)) == (folded, kept)
    assert not STATEFUL & set(ops)


class Inputs(HybridBlock):
    """Two inputs in a list and one beside it; two outputs."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.norm, self.dense = ScratchBatchNorm(), nn.Dense(3)

    def hybrid_forward(self, F, pair, x):
        return self.dense(pair[0] + pair[1]), self.norm(self.dense(x))


def test_several_inputs_and_outputs(rng, tmp_path):
    net = Inputs()
    net.initialize()
    a, b, c = (mx.nd.array(rng.normal(size=(2, 4))) for _ in range(3))
    net([a, b], c)
    randomize(net, rng)
    export_inference(net, tmp_path / "net", [a, b], c)
    again = load(tmp_path / "net", "data0", "data1", "data2")(a, b, c)
    for y, z in zip(net([a, b], c), again):
        assert difference(y, z) < EXACT


def test_the_same_array_may_be_given_twice(rng, tmp_path):
    net = Inputs()
    net.initialize()
    x = mx.nd.array(rng.normal(size=(2, 4)))
    y = net([x, x], x)
    export_inference(net, tmp_path / "net", [x, x], x)
    assert difference(y[0], load(tmp_path / "net", "data0", "data1", "data2")(x, x, x)[0]) < EXACT


def test_a_block_that_is_not_hybrid(rng, tmp_path):
    net = nn.Sequential()
    net.add(nn.Dense(4), ScratchBatchNorm())
    y, x = prepared(net, rng, (2, 4))
    assert len(exported(net, tmp_path / "net", y, x)[0].folded) == 1


def test_numpy_semantics(norm, rng, tmp_path):
    mx.npx.set_np()
    layers = [nn.Conv2D(4, 3), norm(), nn.Activation("relu"), norm(), nn.Activation("tanh")]
    net = sequential(*layers, nn.Dense(3), norm())
    net.initialize()
    x = mx.np.array(rng.normal(size=(2, 3, 6, 6)), dtype="float32")
    net(x)
    y = net(x)
    report = export_inference(net, tmp_path / "net", x)
    assert (len(report.folded), len(report.kept)) == (2, 1)
    assert difference(y, load(tmp_path / "net")(x)) < EXACT


def test_an_imported_training_export_is_exported_again(rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), nn.BatchNorm())
    net.hybridize()
    y, x = prepared(net, rng, (2, 3, 6, 6))
    net.export(str(tmp_path / "trained"))
    again = load(tmp_path / "trained")
    assert len(exported(again, tmp_path / "net", y, x)[0].folded) == 1


FRESH = """
import sys, json, numpy as np
for old, new in (("bool", bool), ("int", int), ("float", float), ("object", object)):
    if old not in np.__dict__:
        setattr(np, old, new)
import mxnet as mx
prefix, = sys.argv[1:]
x = mx.nd.load(prefix + "-x")[0]
block = mx.gluon.SymbolBlock.imports(prefix + "-symbol.json", ["data"], prefix + "-0000.params")
module = mx.mod.Module(*mx.model.load_checkpoint(prefix, 0)[:1], label_names=None)
module.bind([("data", x.shape)], for_training=False)
module.set_params(*mx.model.load_checkpoint(prefix, 0)[1:])
module.forward(mx.io.DataBatch([x]), is_train=False)
assert "scratchbn" not in sys.modules
print(json.dumps([block(x).asnumpy().tolist(), module.get_outputs()[0].asnumpy().tolist()]))
"""


@pytest.mark.parametrize("style", ["dwconv", "affine", "batchnorm"])
def test_files_load_where_only_mxnet_is(style, rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), ScratchBatchNorm(), nn.Activation("relu"), ScratchBatchNorm())
    y, x = prepared(net, rng, (2, 3, 6, 6))
    export_inference(net, tmp_path / "net", x, style=style)
    mx.nd.save(str(tmp_path / "net-x"), [x])
    process = helpers.run_python(FRESH, tmp_path / "net", env=helpers.without_scratchbn())
    for z in helpers.last_json(process):
        assert difference(y, mx.nd.array(z)) < EXACT


# --- the net is left as it was ----------------------------------------------------------------


def test_the_net_is_left_as_it_was(norm, rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), norm(), nn.Dropout(0.5))
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append("after"))
    net[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    y, x = prepared(net, rng, (2, 3, 6, 6))
    net.hybridize(static_alloc=True)
    net(x)
    before = {k: p.data().asnumpy() for k, p in net.collect_params().items()}
    state = net._cached_op, net._cached_graph, list(net._flags), net._active
    calls.clear()
    with autograd.record():
        export_inference(net, tmp_path / "net", x)
        assert autograd.is_training()
    assert calls == []
    assert state == (net._cached_op, net._cached_graph, list(net._flags), net._active)
    for name, parameter in net.collect_params().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name], err_msg=name)
    net.hybridize(False)
    np.testing.assert_array_equal(net(x).asnumpy(), y.asnumpy())
    assert calls == ["before", "after"]


def test_an_error_leaves_hooks_and_files_alone(rng, tmp_path):
    class Python(Block):
        def forward(self, x):
            return mx.nd.array(x.asnumpy())

    net = nn.Sequential()
    net.add(nn.Dense(4), Python())
    net[0].register_forward_hook(lambda *_: None)
    _, x = prepared(net, rng, (2, 4))
    with pytest.raises(ValueError, match="Sequential cannot be traced"):
        export_inference(net, tmp_path / "net", x)
    assert len(net[0]._forward_hooks) == 1
    assert os.listdir(tmp_path) == []


def test_the_same_net_gives_the_same_bytes(norm, rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), norm(), nn.Activation("relu"), norm())
    _, x = prepared(net, rng, (2, 3, 6, 6))

    def contents():
        export_inference(net, tmp_path / "net", x)
        return [(tmp_path / f"net-{end}").read_bytes() for end in ("symbol.json", "0000.params")]

    first = contents()
    mx.sym.relu(mx.sym.var("x")), nn.Dense(3), net(x)
    net.hybridize()
    net(x)
    assert contents() == first


# --- fold: models that exist as files ---------------------------------------------------------


def batchnorm_params(rng, name, channels):
    v = {k: mx.nd.array(a) for k, a in helpers.random_values(rng, channels).items()}
    return {
        f"arg:{name}_gamma": v["gamma"],
        f"arg:{name}_beta": v["beta"],
        f"aux:{name}_moving_mean": v["running_mean"],
        f"aux:{name}_moving_var": v["running_var"],
    }


def module_model(rng):
    """A model as Module users write it, with the operator's default options and a label."""
    x = mx.sym.var("data")
    x = mx.sym.Convolution(x, kernel=(3, 3), num_filter=4, name="conv")
    x = mx.sym.BatchNorm(x, name="bn1")
    x = mx.sym.BatchNorm(mx.sym.Activation(x, act_type="relu", name="relu"), name="bn2", eps=1e-4)
    x = mx.sym.Activation(x, act_type="relu", name="relu2")
    x = mx.sym.FullyConnected(x, num_hidden=3, name="fc")
    symbol = mx.sym.SoftmaxOutput(x, name="softmax")
    params = {
        "arg:conv_weight": mx.nd.array(rng.normal(size=(4, 2, 3, 3))),
        "arg:conv_bias": mx.nd.array(rng.normal(size=4)),
        "arg:fc_weight": mx.nd.array(rng.normal(size=(3, 36))),
        "arg:fc_bias": mx.nd.array(rng.normal(size=3)),
        **batchnorm_params(rng, "bn1", 4),
        **batchnorm_params(rng, "bn2", 4),
    }
    return symbol, params


def run(symbol, params, **inputs):
    values = {re.sub("^(arg|aux):", "", k): v for k, v in {**params, **inputs}.items()}
    args, aux = symbol.list_arguments(), symbol.list_auxiliary_states()
    executor = symbol.bind(
        mx.cpu(), {k: values[k] for k in args}, aux_states={k: values[k] for k in aux}
    )
    return executor.forward(is_train=False)[0]


def test_fold_a_module_model(rng):
    symbol, params = module_model(rng)
    before = {name: value.asnumpy() for name, value in params.items()}
    inputs = {"data": mx.nd.array(rng.normal(size=(2, 2, 5, 5))), "softmax_label": mx.nd.zeros(2)}
    folded, values, report = fold(symbol, params)
    assert difference(run(symbol, params, **inputs), run(folded, values, **inputs)) < EXACT
    assert [row.node for row in report.folded] == ["bn1"]
    assert [(row.node, row.result) for row in report.kept] == [("bn2", "1x1 depthwise Convolution")]
    assert "BatchNorm" not in folded.tojson()
    assert all(name.startswith("arg:") for name in values)
    for name, value in params.items():
        np.testing.assert_array_equal(value.asnumpy(), before[name])


def test_fold_keeps_the_kind_of_names(rng):
    symbol, params = module_model(rng)
    plain = {name[4:]: value for name, value in params.items()}
    _, values, _ = fold(symbol, plain)
    assert "conv_weight" in values
    assert not any(":" in name for name in values)


def test_fold_without_knowing_the_rank(rng):
    symbol = mx.sym.BatchNorm(mx.sym.var("data"), name="bn", fix_gamma=False)
    params = batchnorm_params(rng, "bn", 3)
    x = mx.nd.array(rng.normal(size=(2, 3, 4)))
    unknown, values, report = fold(symbol, params)
    assert "give the input shapes" in report.kept[0].because
    assert "BatchNorm" in unknown.tojson()
    assert difference(run(symbol, params, data=x), run(unknown, values, data=x)) < EXACT
    for shapes, stated in (({"data": x.shape}, None), (None, (0, 3, 0)), (None, x.shape)):
        data = mx.sym.var("data", shape=stated)
        known, values, _ = fold(
            mx.sym.BatchNorm(data, name="bn", fix_gamma=False), params, shapes=shapes
        )
        assert ("BatchNorm" in known.tojson()) == (stated == (0, 3, 0))
        assert difference(run(symbol, params, data=x), run(known, values, data=x)) < EXACT


def test_fold_leaves_a_norm_with_computed_parameters(rng):
    x, gamma = mx.sym.var("data"), mx.sym.var("gamma_of_condition") * 2
    symbol = mx.sym.BatchNorm(x, gamma, name="bn", fix_gamma=False)
    params = {k: v for k, v in batchnorm_params(rng, "bn", 3).items() if "gamma" not in k}
    folded, _, report = fold(symbol, params)
    assert "computed in the graph" in report.kept[0].because
    assert '"use_global_stats": "True"' in folded.tojson()


def test_fold_leaves_a_norm_whose_statistics_are_outputs(rng):
    symbol = mx.sym.BatchNorm(mx.sym.var("data"), name="bn", output_mean_var=True)
    folded, values, report = fold(symbol, batchnorm_params(rng, "bn", 3))
    assert report.kept[0].because == "its statistics are outputs too"
    assert folded.list_outputs() == symbol.list_outputs()
    assert len(values) == 4


def trained_export(tmp_path, rng):
    net = sequential(nn.Conv2D(4, 3), ScratchBatchNorm(epsilon=1e-3), nn.Dropout(0.5))
    net.hybridize()
    y, x = prepared(net, rng, (2, 3, 6, 6))
    net.export(str(tmp_path / "net"))
    return y, x


def test_fold_reduces_our_training_graph_to_inference(rng, tmp_path):
    y, x = trained_export(tmp_path, rng)
    folded, values, report = fold(tmp_path / "net-symbol.json", tmp_path / "net-0000.params")
    assert difference(y, run(folded, values, data=x)) < EXACT
    ops = {node["op"] for node in json.loads(folded.tojson())["nodes"]}
    assert not {"Dropout", "sgd_mom_update", "where"} & ops
    assert len(report.folded) + len(report.kept) == 1


def test_fold_folds_our_training_graph_if_it_describes_its_layers(rng, tmp_path):
    y, x = trained_export(tmp_path, rng)
    symbol = json.loads((tmp_path / "net-symbol.json").read_text())
    last = [n for n in symbol["nodes"] if n["op"] == "reshape_like"][-1]
    layer = last["name"].removesuffix("_fwd")
    names = {name: f"{layer}_{name}" for name in helpers.STATE}
    options = {"axis": 1, "epsilon": 1e-3, "fix_gamma": False, "center": True}
    last["attrs"] = {MARKER: json.dumps({**options, **names})}
    (tmp_path / "net-symbol.json").write_text(json.dumps(symbol))
    folded, values, report = fold(tmp_path / "net-symbol.json", tmp_path / "net-0000.params")
    assert [row.result.split()[0] for row in report.folded] == ["folded"]
    assert difference(y, run(folded, values, data=x)) < EXACT
    assert [n["op"] for n in json.loads(folded.tojson())["nodes"]].count("Convolution") == 1

    last["attrs"] = {MARKER: "{}"}
    (tmp_path / "net-symbol.json").write_text(json.dumps(symbol))
    with pytest.raises(ValueError, match=f"{MARKER} of node '{last['name']}' is damaged"):
        fold(tmp_path / "net-symbol.json", tmp_path / "net-0000.params")


# --- bad input --------------------------------------------------------------------------------


def ready(rng=None):
    net = sequential(nn.Dense(4, in_units=3), ScratchBatchNorm(in_channels=4))
    net.initialize()
    return net


@pytest.mark.parametrize(
    "arguments, options, error, match",
    [
        ([mx.nd.ones((2, 3))], {"style": "fast"}, ValueError, "style must be one of .*got 'fast'"),
        (
            [mx.nd.ones((2, 3))],
            {"epoch": -1},
            ValueError,
            "epoch must be between 0 and 9999, got -1",
        ),
        ([mx.nd.ones((2, 3))], {"epoch": 1.5}, TypeError, "epoch must be an integer, got 1.5"),
        ([], {}, ValueError, "example_inputs must have the inputs the net takes, got none"),
        ([np.ones((2, 3))], {}, TypeError, "example_inputs must be NDArrays"),
        ([None], {}, TypeError, "example_inputs must be NDArrays"),
        ([mx.nd.ones((2, 7))], {}, ValueError, "do not match the symbol.*dense"),
        ([mx.nd.ones((2, 3))] * 2, {}, ValueError, "HybridSequential cannot be traced"),
    ],
)
def test_bad_arguments(arguments, options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        export_inference(ready(), tmp_path / "net", *arguments, **options)
    assert os.listdir(tmp_path) == []


def test_bad_net(tmp_path):
    x = mx.nd.ones((2, 3))
    with pytest.raises(TypeError, match="net must be a gluon Block, got str"):
        export_inference("net", tmp_path / "net", x)
    for net in (sequential(nn.Dense(4, in_units=3)), sequential(nn.Dense(4))):
        with pytest.raises(ValueError, match=r"dense.*_weight' has no value yet"):
            export_inference(net, tmp_path / "net", x)
        net.initialize()
    with pytest.raises(ValueError, match="channels"):
        net = ScratchBatchNorm(in_channels=4)
        net.initialize()
        export_inference(net, tmp_path / "net", x)
    with pytest.raises(ValueError, match=r"axis=5 of 'batchnorm.*' is out of range.*2 axes"):
        net = ScratchBatchNorm(in_channels=3, axis=5)
        net.initialize()
        export_inference(net, tmp_path / "net", x)


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


def test_bad_files(rng, tmp_path):
    symbol, params = module_model(rng)
    text, garbage = tmp_path / "net-symbol.json", tmp_path / "garbage"
    symbol.save(str(text))
    garbage.write_text("garbage")
    with pytest.raises(ValueError, match="garbage' is not an MXNet symbol file"):
        fold(garbage, params)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fold(tmp_path / "nowhere", params)
    with pytest.raises(ValueError, match="garbage' is not an MXNet parameter file"):
        fold(text, garbage)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fold(text, tmp_path / "nowhere")
    mx.nd.save(str(garbage), [mx.nd.ones(3)])
    with pytest.raises(ValueError, match="1 arrays without names"):
        fold(text, garbage)
    text.write_text(text.read_text().replace('"Convolution"', '"Convolved"'))
    with pytest.raises(ValueError, match=r"operator 'Convolved' of node 'conv' in .* is unknown"):
        fold(text, params)
    for symbol_like in (3, None):
        with pytest.raises(TypeError, match="symbol must be a Symbol or a path"):
            fold(symbol_like, params)
    with pytest.raises(TypeError, match="params must be a dict or a path, got list"):
        fold(symbol, [])
    with pytest.raises(TypeError, match="got 'conv_weight': ndarray"):
        fold(symbol, {"conv_weight": np.ones(3)})


@pytest.mark.parametrize(
    "name", ["arg:conv_weight", "arg:bn1_gamma", "aux:bn2_moving_var", "arg:fc_bias"]
)
def test_a_missing_parameter_is_named(name, rng):
    symbol, params = module_model(rng)
    del params[name]
    with pytest.raises(ValueError, match=f"'{name[4:]}' of the symbol is missing"):
        fold(symbol, params)


def test_parameters_that_do_not_match(rng):
    symbol, params = module_model(rng)
    with pytest.raises(ValueError, match="must have one shape"):
        fold(symbol, {**params, "arg:bn1_beta": mx.nd.ones(5)})
    with pytest.raises(
        ValueError, match=r"'conv_weight' of shape .* has 5 output channels.* has 4"
    ):
        fold(symbol, {**params, "arg:conv_weight": mx.nd.ones((5, 2, 3, 3))})
    with pytest.raises(ValueError, match="bn1_moving_var' must not be negative, got -1"):
        fold(symbol, {**params, "aux:bn1_moving_var": -mx.nd.ones(4)})
    with pytest.raises(ValueError, match=r"shapes must name inputs .data, softmax_label., got 'x'"):
        fold(symbol, params, shapes={"x": (1, 2)})
    shapes = {"data": (2, 9, 5, 5), "softmax_label": (2,)}
    with pytest.raises(ValueError, match="do not match the symbol: Error in operator conv"):
        fold(symbol, params, shapes=shapes)


def test_files_are_replaced_both_or_none(rng, tmp_path, monkeypatch):
    net, x = ready(), mx.nd.ones((2, 3))
    with pytest.raises(FileNotFoundError, match=r"the directory of .* does not exist"):
        export_inference(net, tmp_path / "nowhere" / "net", x)

    old = tmp_path / "net-symbol.json"
    blocked = tmp_path / "net-0000.params"
    blocked.mkdir()
    with pytest.raises(OSError, match=r"net-0000.params"):
        export_inference(net, tmp_path / "net", x)
    assert os.listdir(tmp_path) == [blocked.name]
    old.write_text("precious")
    with pytest.raises(OSError, match=r"net-0000.params"):
        export_inference(net, tmp_path / "net", x)
    assert sorted(os.listdir(tmp_path)) == sorted([blocked.name, old.name])
    assert old.read_text() == "precious"

    blocked.rmdir()
    blocked.write_text("precious too")

    def full(file, data):
        raise mx.MXNetError("Check failed: no space left on device")

    monkeypatch.setattr(mx.nd, "save", full)
    with pytest.raises(OSError, match=r"net-0000.params.*no space left on device"):
        export_inference(net, tmp_path / "net", x)
    assert (old.read_text(), blocked.read_text()) == ("precious", "precious too")
    monkeypatch.undo()
    export_inference(net, tmp_path / "net", x)
    assert difference(net(x) + 1, load(tmp_path / "net")(x) + 1) < EXACT
    assert len(os.listdir(tmp_path)) == 2


# --- report and command -----------------------------------------------------------------------


def test_report_prints_a_table(rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), ScratchBatchNorm(), nn.Activation("relu"), ScratchBatchNorm())
    _, x = prepared(net, rng, (2, 3, 6, 6))
    lines = str(export_inference(net, tmp_path / "net", x)).splitlines()
    assert lines[0].split() == ["layer", "result", "because"]
    assert re.fullmatch(r"\S*batchnorm\d+_fwd +folded into \S*conv\d+_fwd", lines[1])
    assert re.fullmatch(r"\S+ +1x1 depthwise Convolution +it follows \S+ \(Activation\)", lines[2])
    assert lines[3] == "1 folded, 1 kept"


@pytest.fixture
def model_files(rng, tmp_path):
    symbol, params = module_model(rng)
    symbol.save(str(tmp_path / "model-symbol.json"))
    mx.nd.save(str(tmp_path / "model-0000.params"), params)
    return [str(tmp_path / f"model-{end}") for end in ("symbol.json", "0000.params")]


def test_command(model_files, tmp_path, capsys):
    out = str(tmp_path / "folded")
    shapes = ["--shape", "data=2,2,5,5", "--shape", "softmax_label=2"]
    assert cli.main(["fold", *model_files, "--out", out, *shapes]) == 0
    printed = capsys.readouterr().out
    assert re.search("bn1 +folded into conv", printed)
    assert re.search(r"bn2 +1x1 depthwise Convolution +it follows relu \(Activation\)", printed)
    value, size = map(float, re.search(r"random input: (\S+), of (\S+)", printed).groups())
    assert 0 <= value < EXACT
    assert 0.3 < size <= 1  # of a softmax over three classes
    assert set(operators(out)) == {"Convolution", "Activation", "FullyConnected", "SoftmaxOutput"}


def test_command_without_shapes(model_files, tmp_path, capsys):
    out = str(tmp_path / "folded")
    assert cli.main(["fold", *model_files, "--out", out, "--style", "affine"]) == 0
    assert "not measured, give --shape data=N,C,..." in capsys.readouterr().out
    assert "broadcast_mul" in operators(out)


def test_command_with_bad_input(model_files, tmp_path, capsys):
    out = ["--out", str(tmp_path / "folded")]
    assert cli.main(["fold", model_files[1], model_files[1], *out]) == 1
    assert "is not an MXNet symbol file" in capsys.readouterr().err
    assert cli.main(["fold", *model_files, "--out", str(tmp_path / "nowhere" / "x")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["fold", *model_files, *out, "--shape", "x=1,2"]) == 1
    assert "shapes must name inputs" in capsys.readouterr().err
    for bad in ("data", "data=", "=1,2", "data=1,x", "data=0,1"):
        with pytest.raises(SystemExit):
            cli.main(["fold", *model_files, *out, "--shape", bad])
        assert "expected NAME=N,C" in capsys.readouterr().err
    assert not (tmp_path / "folded-symbol.json").exists()
