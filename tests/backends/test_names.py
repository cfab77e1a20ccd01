"""The names of nodes: a layer is found in its graph by its name, once, on every backend."""

import ctypes
from collections import Counter

import scratchbn
from scratchbn import BackendError, ScratchBatchNorm, ScratchBatchNormReLU, use_backend

# isort: split
from scratchbn.backends.marker import inference_markers, marking

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import SymbolBlock, nn


class Sigmoid(ScratchBatchNorm):
    def activate(self, F, y):
        return F.sigmoid(y * 2)


@pytest.fixture(params=["portable", "native", "marker"])
def way(request):
    if request.param == "marker":
        with inference_markers():
            yield
        return
    try:
        with use_backend(request.param):
            yield
    except BackendError as error:
        pytest.skip(str(error))


def names_of(symbol):
    return Counter(node.name for node in set(symbol.get_internals()))


def outputs_of(symbol):
    return [name for name in symbol.get_internals().list_outputs() if "_fwd" in name]


@pytest.mark.parametrize("layer", [ScratchBatchNorm, ScratchBatchNormReLU, Sigmoid])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_last_node_has_the_name_of_the_layer(way, layer, dtype):
    norm = layer(prefix="bn_", in_channels=2)
    norm.cast(dtype)
    y = norm(mx.sym.var("data"))
    assert y.list_outputs() == ["bn_fwd_output"]
    assert outputs_of(y) == ["bn_fwd_output"]


def test_calls_of_one_layer_have_names_apart(way):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(ScratchBatchNorm(in_channels=2))
    net.add(net[0], net[0])
    y = net(mx.sym.var("data"))
    fwd = "net_batchnorm0_fwd"
    assert outputs_of(y) == [f"{fwd}_output", f"{fwd}1_output", f"{fwd}2_output"]
    outputs = y.get_internals().list_outputs()
    assert len(set(outputs)) == len(outputs)


def test_calls_by_hand_have_names_apart(way):
    norm = ScratchBatchNorm(prefix="bn_", in_channels=2)
    y = norm(norm(mx.sym.var("data")))
    outputs = y.get_internals().list_outputs()
    assert outputs_of(y) == ["bn_fwd_output", "bn_fwd1_output"]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("shape", [(4, 2), (0, 2), (2, 2, 3, 3), (2, 2, 3, 3, 3)])
def test_a_hook_sees_the_output_of_a_compiled_layer(shape):
    if not scratchbn.native.available():
        pytest.skip("the kernel is not built")
    norm = ScratchBatchNorm(prefix="bn_", in_channels=2)
    norm.initialize()
    norm.hybridize()
    seen = []
    norm.register_op_hook(lambda name, op, array: seen.append(name))
    with use_backend("native"), mx.util.np_shape(True):
        with mx.autograd.record():
            y = norm(mx.nd.ones(shape))
        y.backward()
        mx.nd.waitall()
    assert y.shape == shape
    assert "bn_fwd_output" in [mx.base.py_str(name) for name in seen]


def hooked(block, x, monitor_all=False):
    """Return the outputs that a hook sees in one call, by name."""
    seen = []

    def hook(name, operator, handle):
        array = mx.nd.NDArray(ctypes.cast(handle, mx.base.NDArrayHandle))
        seen.append((mx.base.py_str(name), array.asnumpy()))

    block.register_op_hook(hook, monitor_all)
    block(x)
    mx.nd.waitall()
    assert len(dict(seen)) == len(seen)
    return dict(seen)


@pytest.mark.parametrize("monitor_all", [False, True])
@pytest.mark.parametrize("layer", [ScratchBatchNorm, ScratchBatchNormReLU, Sigmoid])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_hook_sees_what_layers_return_by_their_names(way, layer, dtype, monitor_all):
    if marking():
        pytest.skip("a marker is not run")
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Flatten(), layer(in_channels=2))
    net.add(net[1])
    net.initialize()
    net.cast(dtype)
    x = mx.nd.random.normal(shape=(4, 2)).astype(dtype)
    once, twice = net[1](x).asnumpy(), net(x).asnumpy()
    net.hybridize()
    seen = hooked(net, x, monitor_all)
    fwd = net[1].name + "_fwd"
    np.testing.assert_allclose(seen[f"{fwd}_output"], once, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(seen[f"{fwd}1_output"], twice, rtol=1e-2, atol=1e-2)
    assert f"{fwd}_0" not in seen
    # The others keep the names that MXNet gives them.
    assert "net_flatten0_flatten0_0" in seen


@pytest.mark.parametrize("operator", ["BatchNorm", "BatchNormWithReLU"])
def test_a_hook_of_a_converted_file_sees_the_names_of_its_nodes(operator, tmp_path):
    make = getattr(mx.sym, operator, getattr(mx.sym.contrib, operator, None))
    symbol = mx.sym.relu(make(mx.sym.var("data"), name="any", fix_gamma=False))
    roles = ("gamma", "beta", "moving_mean", "moving_var")
    params = {f"any_{role}": mx.nd.random.uniform(1, 2, 2) for role in roles}
    ours, params, _ = scratchbn.convert_files(symbol, params, to="scratch")
    net = SymbolBlock(ours, mx.sym.var("data", dtype="float32"))
    net.collect_params().load_dict(params)
    net.hybridize()
    assert "any_output" in hooked(net, mx.nd.ones((4, 2, 3, 3)))


def test_features_are_cut_out_of_an_exported_net(tmp_path):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Dense(3, in_units=2), ScratchBatchNormReLU(in_channels=3), nn.Dense(1))
    net.initialize()
    net.hybridize()
    x = mx.nd.random.normal(shape=(5, 2))
    with mx.autograd.record():
        net(x)
    net.export(str(tmp_path / "net"))
    symbol, values, more = mx.model.load_checkpoint(str(tmp_path / "net"), 0)
    cut = symbol.get_internals()["net_batchnormrelu0_fwd_output"]
    features = SymbolBlock(cut, mx.sym.var("data", dtype="float32"))
    features.collect_params().load_dict({**values, **more}, ignore_extra=True)
    expected = net[1](net[0](x)).asnumpy()
    np.testing.assert_allclose(features(x).asnumpy(), expected, rtol=1e-6, atol=1e-6)
    assert (expected >= 0).all()
