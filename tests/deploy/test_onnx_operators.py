"""Operators that ONNX or MXNet's exporter means otherwise: the file computes what the net does."""

import itertools

from scratchbn import ScratchBatchNorm
from scratchbn.deploy import export_onnx

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import HybridBlock, nn

onnx = pytest.importorskip("onnx")
symbols = pytest.importorskip("onnx_symbols", reason="onnxruntime is not installed")

S = mx.sym
MAP = (2, 3, 9, 8)


@pytest.fixture
def check(rng, tmp_path):
    """Export a symbol of `data`, as it is and with nothing stated that is a default."""

    def checked(symbol, opset=13, dynamic_batch=True, **shapes):
        for form in (symbol, symbols.unstated(symbol)):
            net = symbols.as_net(form, rng, **shapes)
            examples = [[rng.normal(size=shape) for shape in shapes.values()] for _ in range(2)]
            options = {"opset": opset, "dynamic_batch": dynamic_batch}
            report = symbols.check_export(net, tmp_path / "net.onnx", *examples, **options)
        return report

    return checked


def normalized(x, **options):
    convolved = S.Convolution(x, kernel=(3, 3), num_filter=4, pad=(1, 1), name="conv")
    return S.BatchNorm(convolved, fix_gamma=False, name="norm", **options)


x = S.var("data")
POOLING = [
    (kind, convention, counted, pad, stride)
    for kind, convention, counted, pad, stride in itertools.product(
        ("max", "avg", "sum", "lp"), ("valid", "full"), (None, True, False), (0, 1), (None, 2)
    )
    if kind == "avg" or counted is None
]


@pytest.mark.parametrize("kind, convention, counted, pad, stride", POOLING)
def test_pooling(kind, convention, counted, pad, stride, check):
    options = {"pool_type": kind, "pooling_convention": convention, "pad": (pad, pad)}
    options |= {} if counted is None else {"count_include_pad": counted}
    options |= {} if stride is None else {"stride": (stride, stride)}
    options |= {"p_value": 2} if kind == "lp" else {}
    check(S.Pooling(normalized(x), kernel=(3, 2), **options), data=MAP)


@pytest.mark.parametrize("kind", ["max", "avg", "sum"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 7, 6), (2, 3, 5, 4, 6)])
def test_pooling_of_any_rank(kind, shape, check):
    axes = len(shape) - 2
    options = {"kernel": (4,) * axes, "stride": (3,) * axes, "pooling_convention": "full"}
    check(S.Pooling(x, pool_type=kind, **options), data=shape)
    check(S.Pooling(x, pool_type=kind, global_pool=True), data=shape)


def test_a_window_outside_its_input_is_refused(rng, tmp_path):
    outside = S.Pooling(x, kernel=(2,), stride=(5,), pooling_convention="full", name="p")
    net = symbols.as_net(outside, rng, data=(2, 3, 8))
    with pytest.raises(ValueError, match=r"node 'p' \(Pooling\) .*outside its input"):
        export_onnx(net, tmp_path / "net.onnx", mx.nd.ones((2, 3, 8)))


@pytest.mark.parametrize("size", [1, 2, 3, (2, 5)])
def test_adaptive_pooling(size, check):
    check(S.contrib.AdaptiveAvgPooling2D(normalized(x), output_size=size), data=MAP)


@pytest.mark.parametrize("kind", ["leaky", "prelu", "elu", "selu", "gelu"])
@pytest.mark.parametrize("width", [3, 4, 8])
def test_leaky_relu(kind, width, check):
    check(S.LeakyReLU(normalized(x), act_type=kind), data=(2, 3, 5, width))


def test_prelu_with_one_slope_and_of_dense_features(check, rng, tmp_path):
    check(S.LeakyReLU(S.FullyConnected(x, num_hidden=4), act_type="prelu"), data=MAP)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), ScratchBatchNorm(), nn.PReLU())
    net.initialize()
    image = rng.normal(size=MAP)
    net(mx.nd.array(image))
    symbols.check_export(net, tmp_path / "net.onnx", [image])


@pytest.mark.parametrize("opset", [12, 13])
@pytest.mark.parametrize(
    "head",
    [
        lambda y: S.softmax(y, axis=1),
        lambda y: S.softmax(y, axis=-1, temperature=3.0),
        lambda y: S.log_softmax(y, axis=2),
        lambda y: S.SoftmaxActivation(y, mode="channel"),
        lambda y: S.SoftmaxActivation(y),
        lambda y: S.SoftmaxActivation(S.Flatten(y)),
    ],
)
def test_softmax(head, opset, check):
    check(head(normalized(x)), opset, data=MAP)


@pytest.mark.parametrize(
    "head, label",
    [
        (lambda y, t: S.SoftmaxOutput(y, t, multi_output=True), (2, 9, 8)),
        (lambda y, t: S.SoftmaxOutput(y, t, preserve_shape=True), (2, 4, 9)),
        (lambda y, t: S.SoftmaxOutput(S.Flatten(y), t), (2,)),
        (lambda y, t: S.LogisticRegressionOutput(S.Flatten(y), t), (2, 288)),
        (lambda y, t: S.LinearRegressionOutput(S.Flatten(y), t), (2, 288)),
        (lambda y, t: S.MAERegressionOutput(S.Flatten(y), t), (2, 288)),
        (lambda y, t: S.SVMOutput(S.Flatten(y), t), (2,)),
    ],
)
def test_a_loss_needs_no_label(head, label, rng, tmp_path):
    net = symbols.as_net(
        head(normalized(S.var("data0")), S.var("data1")), rng, data0=MAP, data1=label
    )
    arrays = [rng.normal(size=MAP), np.zeros(label)]
    symbols.check_export(net, tmp_path / "net.onnx", arrays)
    running = symbols.session(tmp_path / "net.onnx")
    assert [entry.name for entry in running.get_inputs()] == ["data0"]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("no_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (2, 3, 1, 1), (2, 3, 4, 3)])
def test_dense(flatten, no_bias, shape, check):
    dense = S.FullyConnected(x, num_hidden=3, flatten=flatten, no_bias=no_bias)
    check(S.BatchNorm(dense, axis=-1, fix_gamma=False), data=shape)


@pytest.mark.parametrize("opset", [12, 13, 17])
@pytest.mark.parametrize("name", ["mean", "max", "min", "sum", "prod", "norm"])
def test_reductions(name, opset, check):
    for options in ({}, {"axis": 1}, {"axis": (2, 3), "keepdims": True}, {"axis": (-1, 0)}):
        if opset != 13 and "axis" not in options:
            continue
        reduce = getattr(S, name)
        # Along the batch, another batch has another result, which is no less right.
        check(reduce(normalized(x) * 0.3, **options), opset, data=(2, 3, 4, 3))
    if name != "norm":
        check(reduce(normalized(x) * 0.3, axis=1, exclude=True), opset, data=(2, 3, 4, 3))
    else:
        check(S.norm(normalized(x), ord=1, axis=1), opset, data=MAP)


@pytest.mark.parametrize(
    "norm",
    [
        lambda y: S.LayerNorm(y),
        lambda y: S.LayerNorm(y, axis=1, eps=0.1),
        lambda y: S.InstanceNorm(y),
        lambda y: S.GroupNorm(y, num_groups=2),
        lambda y: S.L2Normalization(y),
        lambda y: S.L2Normalization(y, mode="spatial"),
        lambda y: S.L2Normalization(y, mode="channel", eps=0.5),
        lambda y: S.LRN(y, nsize=3),
        lambda y: S.LRN(y, nsize=3, alpha=0.5, beta=0.5, knorm=1),
    ],
)
def test_other_norms_behind_a_folded_one(norm, check):
    assert len(check(norm(normalized(x)), data=MAP).folded) == 1


@pytest.mark.parametrize(
    "producer, shape",
    [
        (lambda: S.Convolution(x, kernel=(3,), dilate=(2,), num_filter=4), (2, 3, 9)),
        (lambda: S.Convolution(x, kernel=(3,), num_filter=6, num_group=3, pad=(1,)), (2, 3, 9)),
        (
            lambda: S.Convolution(x, kernel=(1, 2, 3), stride=(1, 2, 1), num_filter=4),
            (2, 3, 4, 5, 6),
        ),
        (lambda: S.Deconvolution(x, kernel=(3,), stride=(2,), adj=(1,), num_filter=4), (2, 3, 5)),
    ],
)
def test_convolutions(producer, shape, check):
    check(S.BatchNorm(producer(), fix_gamma=False), data=shape)


@pytest.mark.parametrize("opset", [12, 13])
def test_upsampling(opset, check):
    y = normalized(x)
    check(S.UpSampling(y, scale=2, sample_type="nearest"), opset, data=MAP)
    check(
        S.UpSampling(y, S.var("up_weight"), scale=3, sample_type="bilinear", num_filter=4),
        opset,
        data=MAP,
    )


def test_crop_and_reshape(check):
    y = normalized(x)
    check(S.Crop(y, h_w=(4, 3), num_args=1, center_crop=True), data=MAP)
    check(S.Crop(y, S.Pooling(y, kernel=(2, 2)), num_args=2, offset=(1, 0)), data=MAP)
    for shape in ((-3, -2), (0, -4, 2, 2, -2), (0, 0, -1), (0, -3, -2)):
        check(S.Reshape(y, shape=shape), data=MAP)


@pytest.mark.parametrize("mode", ["clip", "wrap"])
def test_numbers_out_of_range_take_what_mxnet_takes(mode, check):
    check(S.take(S.var("table_weight", shape=(4, 3)), x * 5, mode=mode), data=(2, 3))
    check(S.Embedding(x * 5, input_dim=4, output_dim=3), data=(2, 3))


def test_scalars_on_either_side_whatever_the_name(rng, tmp_path):
    for name in (None, "_rminusscalar0", "_rdivscalar", ""):
        symbol = (S.abs(S.var("data")) + 2) / 3
        symbol = 1 - 2 / symbol
        symbol = symbol if name is None else symbols.renamed(symbol, name)
        net = symbols.as_net(symbol, rng, data=(2, 3))
        symbols.check_export(net, tmp_path / "net.onnx", [rng.normal(size=(2, 3))])


def boxes(rng, *shape):
    corners = rng.uniform(0, 1, (*shape, 2))
    sizes = rng.uniform(0.1, 0.6, (*shape, 2))
    classes = rng.integers(-1, 3, (*shape, 1))
    return np.concatenate([classes, rng.uniform(0, 1, (*shape, 1)), corners, corners + sizes], -1)


@pytest.mark.parametrize("force_suppress", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 5},
        {"valid_thresh": 0.3, "background_id": 1},
        {"in_format": "center"},
        {"out_format": "center", "topk": 4},
        {"id_index": -1},
    ],
)
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 2, 12)])
def test_box_nms_class_by_class(options, force_suppress, shape, rng, tmp_path):
    options = {"id_index": 0, **options}
    symbol = S.contrib.box_nms(
        S.var("data"),
        overlap_thresh=0.2,
        coord_start=2,
        score_index=1,
        force_suppress=force_suppress,
        **options,
    )
    net = symbols.as_net(symbol, rng, data=(*shape, 6))
    example, other = boxes(rng, *shape), boxes(rng, *shape)
    kept = (symbols.outputs_of(net, other)[0][..., 1] >= 0).sum()
    assert 0 < kept < np.prod(shape)
    options = {"dynamic_batch": len(shape) > 1}
    symbols.check_export(net, tmp_path / "net.onnx", [example], [other], **options)


class Twice(HybridBlock):
    """One block on two inputs, or on its own output."""

    def __init__(self, in_a_row):
        super().__init__(prefix="twice_")
        self._in_a_row = in_a_row
        with self.name_scope():
            self.conv = nn.Conv2D(3, 3, padding=1, in_channels=3)
            self.norm, self.relu = ScratchBatchNorm(in_channels=3), nn.Activation("relu")

    def hybrid_forward(self, F, x):
        y = self.relu(self.norm(self.conv(x)))
        if self._in_a_row:
            return self.relu(self.norm(self.conv(y)))
        return F.concat(y, self.relu(self.norm(self.conv(x * 2))), dim=1)


@pytest.mark.parametrize("in_a_row", [True, False])
def test_a_block_called_twice(in_a_row, rng, tmp_path):
    net = Twice(in_a_row)
    net.initialize(mx.init.Normal(0.5))
    images = [rng.normal(size=(2, 3, 8, 8)) for _ in range(2)]
    net(mx.nd.array(images[0]))
    symbols.check_export(net, tmp_path / "net.onnx", images[:1], images[1:])
    names = [node.name for node in onnx.load(str(tmp_path / "net.onnx")).graph.node]
    assert len(set(names)) == len(names)
    assert {"twice_relu0_fwd", "twice_relu0_fwd_1"} <= set(names)


@pytest.mark.parametrize("name", ["", "same", "data"])
def test_names_that_are_none(name, check):
    check(symbols.renamed(S.relu(normalized(x)) + S.sigmoid(x), name), data=(2, 4, 5, 5))


def test_one_output_given_twice(rng, tmp_path):
    y = S.relu(S.var("data"), name="y")
    net = symbols.as_net(S.Group([y, S.sigmoid(y, name="z"), y]), rng, data=(2, 3))
    symbols.check_export(net, tmp_path / "net.onnx", [rng.normal(size=(2, 3))])
    outputs = symbols.session(tmp_path / "net.onnx").get_outputs()
    assert [output.name for output in outputs] == ["y", "z", "y_output"]


def test_what_depends_on_nothing_is_a_constant(check):
    check(S.broadcast_add(x, S.arange(3) * 2), data=(2, 3))
    check(S.broadcast_mul(x, S.ones((3,)) + S.arange(0, 6, 2)), data=(2, 3))
