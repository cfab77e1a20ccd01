"""A model is run before it is written: what is wrong in it is refused, with the node's name."""

import os
import sys

from scratchbn import ScratchBatchNorm
from scratchbn.deploy import export_onnx

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

onnx = pytest.importorskip("onnx")
symbols = pytest.importorskip("onnx_symbols", reason="onnxruntime is not installed")
exporter = pytest.importorskip("mxnet.onnx.mx2onnx._export_onnx")
own = pytest.importorskip("scratchbn.deploy.onnx._ops")

REGISTRY = exporter.MXNetGraph.registry_
TRANSLATIONS = own.TRANSLATIONS

S = mx.sym


def small():
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Conv2D(4, 3), ScratchBatchNorm(), nn.Activation("tanh"), nn.AvgPool2D(2))
        net.add(nn.Flatten(), nn.Dense(3))
    mx.random.seed(0)
    net.initialize(mx.init.Xavier())
    return net


@pytest.fixture
def images(rng):
    return mx.nd.array(rng.normal(size=(2, 3, 8, 8)))


def one_node(op, **attrs):
    def translation(node, **kwargs):
        first = kwargs["outputs_lookup"][0][0].name
        return [onnx.helper.make_node(op, [first], [node["name"]], **attrs)]

    return translation


def refused(net, tmp_path, *arrays, match, **options):
    (tmp_path / "net.onnx").write_text("precious")
    net(*arrays)
    with pytest.raises(ValueError, match=match):
        export_onnx(net, tmp_path / "net.onnx", *arrays, **options)
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "precious"


@pytest.mark.parametrize("without_runtime", [False, True])
def test_a_wrong_translation_of_the_exporter_is_caught(
    without_runtime, images, tmp_path, monkeypatch
):
    if without_runtime:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(REGISTRY[12], "Activation", one_node("Sigmoid"))
    runtime = "onnx 1" if without_runtime else "onnxruntime 1"
    match = rf"node 'net_tanh0_fwd' \(Activation\) cannot be .* right: it differs .*in {runtime}"
    refused(small(), tmp_path, images, match=match)


def test_a_wrong_translation_of_ours_is_caught(images, tmp_path, monkeypatch):
    def maximum(t):
        return t.add("MaxPool", t.inputs[0], kernel_shape=[2, 2], strides=[2, 2])

    monkeypatch.setitem(TRANSLATIONS, "Pooling", maximum)
    refused(small(), tmp_path, images, match=r"node 'net_pool0_fwd' \(Pooling\) .* it differs by")


def test_a_result_of_another_shape_is_caught(images, tmp_path, monkeypatch):
    def transposed(t):
        return t.add("Transpose", t.inputs[0], perm=[1, 0, 2, 3])

    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(ScratchBatchNorm(), nn.Activation("relu"), nn.GlobalAvgPool2D())
    net.initialize()
    monkeypatch.setitem(REGISTRY[12], "Activation", one_node("Transpose"))
    match = r"node 'net_relu0_fwd' \(Activation\) .*its shape is \(8, 8, 3, 2\) instead of"
    refused(net, tmp_path, images, match=match)


def test_a_node_that_cannot_run_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setitem(REGISTRY[12], "Activation", one_node("NoSuchOperator"))
    match = r"node 'net_tanh0_fwd' \(Activation\) cannot be run as ONNX by onnxruntime"
    refused(small(), tmp_path, images, match=match)
    monkeypatch.setitem(REGISTRY[12], "Activation", one_node("Reshape"))
    refused(small(), tmp_path, images, match=match)


def test_only_another_batch_shows_it(images, tmp_path, monkeypatch):
    def of_two(t):
        return t.add("Reshape", t.inputs[0], t.integers([2, -1]))

    monkeypatch.setitem(TRANSLATIONS, "Flatten", of_two)
    symbols.check_export(
        small_run(images), tmp_path / "two.onnx", [images.asnumpy()], dynamic_batch=False
    )
    os.unlink(tmp_path / "two.onnx")
    refused(small(), tmp_path, images, match=r"node 'net_flatten0_\w+' \(Flatten\)")


def small_run(images):
    net = small()
    net(images)
    return net


@pytest.mark.parametrize("value", [0, 1])
def test_a_placeholder_shows_it_too(value, images, tmp_path, monkeypatch):
    # On zeros, and on ones, these agree: only random numbers tell them apart.
    monkeypatch.setitem(REGISTRY[12], "square", one_node("Abs"))
    net = nn.HybridLambda(lambda F, x: F.square(x, name="squared"))
    match = r"node '\S*squared' \(square\) .* it differs by"
    refused(net, tmp_path, mx.nd.full((2, 3), value), match=match, dynamic_batch=False)


def test_a_graph_that_is_not_the_net_is_caught(tmp_path, images):
    class Eager(HybridBlock):
        def hybrid_forward(self, F, x):
            return F.relu(x, name="last") if F is mx.sym else F.sigmoid(x)

    match = r"the inference graph is not the net, at node '\S*last' \(relu\)"
    refused(Eager(), tmp_path, images, match=match)


def noisy(F, x):
    return F.broadcast_add(x, F.random.normal(shape=(1, 1, 1, 1), name="noise"))


@pytest.mark.parametrize(
    "draw, match",
    [
        (lambda F, x: F.Dropout(x, mode="always", name="drop"), r"drop' \(Dropout\).*at random"),
        (noisy, r"noise' .*random numbers"),
    ],
)
def test_what_draws_at_random_is_refused(draw, match, images, tmp_path):
    refused(nn.HybridLambda(draw), tmp_path, images, match=match)


def test_dynamic_batch_is_refused_where_the_net_takes_no_other(images, tmp_path):
    net = nn.HybridSequential()
    net.add(nn.HybridLambda(lambda F, x: F.Reshape(x, shape=(2, 3, 64))), nn.Conv1D(2, 1))
    net.initialize()
    refused(net, tmp_path, images, match="dynamic_batch must be False: the net runs on no other")
    (tmp_path / "net.onnx").unlink()
    symbols.check_export(net, tmp_path / "net.onnx", [images.asnumpy()], dynamic_batch=False)


def test_a_graph_that_does_not_fit_is_refused_before_it_is_run(tmp_path, rng):
    # MXNet would read and write beyond the array.
    bad = symbols.as_net(S.Reshape(S.var("data0"), shape=(-1, 2), name="odd"), rng, data0=(2, 4))
    with pytest.raises(ValueError, match=r"node 'odd' \(Reshape\) cannot give \(3, 5\) the shape"):
        export_onnx(bad, tmp_path / "net.onnx", mx.nd.ones((3, 5)))


def test_a_rank_that_depends_on_the_batch_is_refused(tmp_path, images):
    net = nn.HybridLambda(lambda F, x: F.squeeze(F.mean(x, axis=(2, 3), keepdims=True)))
    refused(
        net, tmp_path, images, match=r"node '\S*squeeze0' \(squeeze\) has another number of axes"
    )
    (tmp_path / "net.onnx").unlink()
    symbols.check_export(net, tmp_path / "net.onnx", [images.asnumpy()], dynamic_batch=False)


def test_what_follows_the_batch_has_no_stated_length(images, tmp_path):
    export_onnx(small_run(images), tmp_path / "net.onnx", images)
    running = symbols.session(tmp_path / "net.onnx")
    assert [entry.shape for entry in running.get_inputs()] == [["batch", 3, 8, 8]]
    assert [entry.shape for entry in running.get_outputs()] == [["batch", 3]]


@pytest.mark.parametrize("opset", range(12, 18))
def test_opsets(opset, images, tmp_path):
    net = small_run(images)
    symbols.check_export(net, tmp_path / "net.onnx", [images.asnumpy()], opset=opset)
    model = onnx.load(str(tmp_path / "net.onnx"))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]


def test_bad_options(images, tmp_path):
    net = small_run(images)
    for opset in (11, 18):
        with pytest.raises(ValueError, match=f"opset must be between 12 and 17, got {opset}"):
            export_onnx(net, tmp_path / "net.onnx", images, opset=opset)
    with pytest.raises(TypeError, match=r"opset must be an integer, got '13'"):
        export_onnx(net, tmp_path / "net.onnx", images, opset="13")
    with pytest.raises(TypeError, match="dynamic_batch must be True or False, got 'no'"):
        export_onnx(net, tmp_path / "net.onnx", images, dynamic_batch="no")
    assert os.listdir(tmp_path) == []


def test_export_leaves_all_as_it_was(images, tmp_path):
    net = small()
    net.hybridize()
    called = []
    net[0].register_forward_hook(lambda *_: called.append(1))
    net(images)
    before = {name: p.data().asnumpy() for name, p in net.collect_params().items()}
    registry = {version: dict(ops) for version, ops in REGISTRY.items()}
    del called[:]
    with autograd.record():
        export_onnx(net, tmp_path / "net.onnx", images)
    assert not called
    assert registry == REGISTRY
    for name, parameter in net.collect_params().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name])


def test_float16_is_compared_where_it_can_run(rng, tmp_path):
    net = small()
    net.cast("float16")
    images = mx.nd.array(rng.normal(size=(2, 3, 8, 8)), dtype="float16")
    for name, parameter in net.collect_params().items():
        if 0 in parameter.shape:
            shape = {"net_conv0_weight": (4, 3, 3, 3), "net_dense0_weight": (3, 36)}.get(name, (4,))
            parameter.shape = shape
            parameter._finish_deferred_init()
    export_onnx(net, tmp_path / "net.onnx", images)
    (y,) = symbols.session(tmp_path / "net.onnx").run(None, {"data": images.asnumpy()})
    net.cast("float32")
    expected = net(images.astype("float32")).asnumpy()
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, expected, rtol=2e-2, atol=2e-2)


def test_nan_and_infinity_have_to_be_the_same(tmp_path, rng):
    net = symbols.as_net(S.log(S.var("data0"), name="log"), rng, data0=(2, 3))
    symbols.check_export(net, tmp_path / "net.onnx", [np.array([[1.0, 0, -1], [2, 3, 4]])])
