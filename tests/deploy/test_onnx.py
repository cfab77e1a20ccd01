"""ONNX export: what onnxruntime computes is what the net computes."""

import os
import re
import sys

from scratchbn import ScratchBatchNorm
from scratchbn.deploy import export_onnx
from scratchbn.environment.install import install_command

import helpers
import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import HybridBlock, nn
from mxnet.gluon.nn import HybridLambda

from models.lenet import initialize, lenet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CLOSE = 5e-6


def session(path):
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def infer(running, *arrays):
    names = [entry.name for entry in running.get_inputs()]
    return running.run(None, dict(zip(names, (array.asnumpy() for array in arrays))))


def difference(y, z):
    y = y.asnumpy()
    assert (y.shape, y.dtype) == (z.shape, z.dtype)
    return np.abs(y - z).max() / np.abs(y).max()


def ready(net, rng, *shapes, dtype="float32"):
    net.initialize(mx.init.Xavier())
    net.cast(dtype)
    arrays = [mx.nd.array(rng.normal(size=shape), dtype=dtype) for shape in shapes]
    net(*arrays)
    for name, parameter in net.collect_params().items():
        values = helpers.random_values(rng, parameter.shape[0])
        key = next((key for key in values if name.endswith("_" + key)), None)
        if key is not None:
            parameter.set_data(mx.nd.array(values[key], dtype=parameter.dtype))
    return arrays


def sequential(*layers):
    net = nn.HybridSequential()
    net.add(*layers)
    return net


@pytest.mark.parametrize("norm", [ScratchBatchNorm, nn.BatchNorm])
@pytest.mark.parametrize(
    "name, size", [("lenet", 28), ("cifar_resnet20_v1", 32), ("mobilenet0.5", 64)]
)
def test_nets(name, size, norm, rng, tmp_path):
    if name == "lenet":
        net, channels = lenet(norm_layer=norm), 1
        initialize(net, "xavier")
    else:
        model_zoo = pytest.importorskip("gluoncv.model_zoo")
        options = {} if norm is nn.BatchNorm else {"norm_layer": norm}
        net, channels = model_zoo.get_model(name, **options), 3

    (x,) = ready(net, rng, (2, channels, size, size))
    report = export_onnx(net, tmp_path / "net.onnx", x)
    assert report.kept == ()
    running = session(tmp_path / "net.onnx")
    for batch in (1, 5):
        x = mx.nd.array(rng.normal(size=(batch, channels, size, size)))
        assert difference(net(x), infer(running, x)[0]) < CLOSE
    assert os.listdir(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize(
    "shape, axis", [((4, 3), 1), ((2, 3, 4), 1), ((2, 3, 4, 5), -1), ((2, 3, 4), 0)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_of_any_rank_and_axis(shape, axis, dtype, rng, tmp_path):
    net = sequential(
        ScratchBatchNorm(axis=axis), nn.Activation("relu"), ScratchBatchNorm(axis=axis)
    )
    (x,) = ready(net, rng, shape, dtype=dtype)
    export_onnx(net, tmp_path / "net.onnx", x, dynamic_batch=axis != 0)
    assert difference(net(x), infer(session(tmp_path / "net.onnx"), x)[0]) < CLOSE


@pytest.mark.parametrize(
    "layer, shape",
    [
        (lambda: nn.Conv1D(4, 2, strides=2, padding=1), (2, 3, 7)),
        (lambda: nn.Conv1DTranspose(4, 3, strides=2), (2, 3, 7)),
        (lambda: nn.Conv3D(4, 2), (2, 3, 4, 4, 4)),
        (lambda: nn.Conv2DTranspose(4, 3, strides=2, use_bias=False), (2, 3, 5, 5)),
        (lambda: nn.Conv2D(6, 3, groups=3), (2, 3, 5, 5)),
        (lambda: nn.Dense(4, flatten=False), (2, 3, 5)),
    ],
)
def test_folded_layers(layer, shape, rng, tmp_path):
    producer = layer()
    axis = -1 if isinstance(producer, nn.Dense) else 1
    net = sequential(producer, ScratchBatchNorm(axis=axis))
    (x,) = ready(net, rng, shape)
    assert len(export_onnx(net, tmp_path / "net.onnx", x).folded) == 1
    assert difference(net(x), infer(session(tmp_path / "net.onnx"), x)[0]) < CLOSE


def test_file_states_its_versions_and_its_inputs_only(rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), ScratchBatchNorm())
    (x,) = ready(net, rng, (2, 3, 6, 6))
    for dynamic, batch in ((True, "batch"), (False, 2)):
        export_onnx(net, tmp_path / "net.onnx", x, dynamic_batch=dynamic)
        model = onnx.load(str(tmp_path / "net.onnx"))
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
        assert model.ir_version == 7
        (entry,) = session(tmp_path / "net.onnx").get_inputs()
        assert (entry.name, entry.shape) == ("data", [batch, 3, 6, 6])


class Two(HybridBlock):
    """Two inputs of unlike shapes; outputs in an order that is not that of computation."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.dense, self.norm = nn.Dense(4), ScratchBatchNorm()

    def hybrid_forward(self, F, a, b):
        first = self.norm(b)
        return F.relu(self.dense(a) + first), first


def test_inputs_and_outputs_keep_their_order(rng, tmp_path):
    net = Two()
    a, b = ready(net, rng, (2, 3), (2, 4))
    export_onnx(net, tmp_path / "net.onnx", a, b)
    running = session(tmp_path / "net.onnx")
    assert [entry.name for entry in running.get_inputs()] == ["data0", "data1"]
    for y, z in zip(net(a, b), infer(running, a, b)):
        assert difference(y, z) < CLOSE


def always_dropped(F, x):
    return F.Dropout(x, mode="always", name="dropped")


def test_the_node_that_cannot_be_translated_is_named(rng, tmp_path):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Conv1D(4, 3), ScratchBatchNorm(), HybridLambda(always_dropped))
    (x,) = ready(net, rng, (2, 3, 6))
    (tmp_path / "net.onnx").write_text("precious")
    with pytest.raises(
        ValueError, match=r"node '\S*dropped' \(Dropout\) cannot be trans.*at random"
    ):
        export_onnx(net, tmp_path / "net.onnx", x)

    class Unusual(HybridBlock):
        def hybrid_forward(self, F, x):
            return F.arctanh(x, name="unusual")

    with pytest.raises(ValueError, match=r"node '\S*unusual' \(arctanh\).*No conversion function"):
        export_onnx(sequential(Unusual()), tmp_path / "net.onnx", x)
    assert (tmp_path / "net.onnx").read_text() == "precious"


def test_an_example_need_not_be_where_the_net_is(second_device, tmp_path):
    net = ScratchBatchNorm(in_channels=3)
    net.initialize(ctx=second_device)
    export_onnx(net, tmp_path / "net.onnx", mx.nd.ones((2, 3)))
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_bad_input(tmp_path, monkeypatch):
    net = ScratchBatchNorm(in_channels=3)
    net.initialize()
    x = mx.nd.ones((2, 3))
    with pytest.raises(FileNotFoundError, match=r"the directory of .* does not exist"):
        export_onnx(net, tmp_path / "nowhere" / "net.onnx", x)
    with pytest.raises(TypeError, match="path must be a str or a path, got NDArray"):
        export_onnx(net, x)
    with pytest.raises(TypeError, match="net must be a gluon Block"):
        export_onnx(None, tmp_path / "net.onnx", x)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=re.escape(f"needs onnx: {install_command('onnx')}")):
        export_onnx(net, tmp_path / "net.onnx", x)
    assert os.listdir(tmp_path) == []
