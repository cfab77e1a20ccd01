"""Nets of any rank under MXNet's executors, which fuse what Gluon's graphs leave apart."""

import ctypes
from pathlib import Path

from scratchbn import ScratchBatchNorm, convert_files
from scratchbn.deploy import export_inference, fold

# isort: split
import mxnet as mx
import numpy as np
import pytest
from inference_files import inferring
from mxnet.gluon import nn

from models.lenet import lenet


def residual(rank, channels):
    kernel, pad = (3,) * (rank - 2), (1,) * (rank - 2)

    def part(x, i):
        options = {"kernel": kernel, "pad": pad, "num_filter": channels, "no_bias": True}
        return mx.sym.BatchNorm(
            mx.sym.Convolution(x, name=f"conv{i}", **options), name=f"bn{i}", fix_gamma=False
        )

    shortcut = mx.sym.relu(part(mx.sym.var("data"), 0))
    return part(shortcut, 1) + shortcut


def values_for(symbol, shape, rng):
    shapes, _, more = symbol.infer_shape(data=shape)
    named = [*zip(symbol.list_arguments(), shapes), *zip(symbol.list_auxiliary_states(), more)]
    return {n: mx.nd.array(rng.uniform(0.5, 1.5, s) / 4) for n, s in named if n != "data"}


def run(symbol, values, x, is_train):
    held = {**values, "data": x}
    arguments = {name: held[name] for name in symbol.list_arguments()}
    executor = symbol.bind(
        mx.cpu(),
        arguments,
        # Without gradients MXNet fuses as for inference, whatever is_train says.
        args_grad={n: v.zeros_like() for n, v in arguments.items()} if is_train else None,
        aux_states={name: held[name].copy() for name in symbol.list_auxiliary_states()},
        grad_req="write" if is_train else "null",
    )
    return executor.forward(is_train=is_train)[0].asnumpy()


@pytest.mark.parametrize("is_train", [False, True])
@pytest.mark.parametrize("channels", [4, 8, 16, 64])
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_a_converted_net_runs_in_an_executor(rank, channels, is_train, tmp_path):
    rng = np.random.default_rng(0)
    shape = (2, 3, *(4, 6, 6)[: rank - 2])
    symbol, x = residual(rank, channels), mx.nd.array(rng.normal(size=shape))
    values = values_for(symbol, shape, rng)
    expected = run(symbol, values, x, is_train)
    ours = convert_files(symbol, values, to="scratch")[0]
    np.testing.assert_allclose(
        run(ours, values, x, is_train), expected, rtol=1e-3, atol=1e-3 * abs(expected).max()
    )
    for model in () if is_train else (symbol, ours):
        infers, _ = inferring(model, values, tmp_path, verify=False)
        y = run(infers, values, x, is_train=False)
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())
    for style in () if is_train else ("dwconv", "affine", "batchnorm"):
        folded, constants, _ = fold(symbol, values, shapes={"data": shape}, style=style)
        y = run(folded, constants, x, is_train=False)
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())


@pytest.mark.parametrize("channels", [8, 16, 64])
def test_an_exported_net_runs_in_a_module(channels, tmp_path):
    net = nn.HybridSequential()
    net.add(nn.Conv3D(channels, 3, in_channels=3), ScratchBatchNorm(), nn.Activation("relu"))
    net.add(nn.Conv3D(channels, 3, padding=1), ScratchBatchNorm())
    net.initialize()
    net.hybridize()
    x = mx.nd.random.normal(shape=(2, 3, 4, 6, 6))
    expected = net(x).asnumpy()
    net.export(str(tmp_path / "net"))
    symbol, values, states = mx.model.load_checkpoint(str(tmp_path / "net"), 0)
    module = mx.mod.Module(symbol, label_names=None)
    module.bind([("data", x.shape)], for_training=False)
    module.set_params(values, states)
    module.forward(mx.io.DataBatch([x]), is_train=False)
    (y,) = module.get_outputs()
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-4, atol=1e-5)


def predicted(prefix, x):
    """Run an exported net by MXNet's C predict API, as programs in C and C++ do."""
    library, handle = mx.base._LIB, ctypes.c_void_p()

    def call(name, *arguments):
        assert getattr(library, name)(*arguments) == 0, library.MXGetLastError()

    library.MXGetLastError.restype = ctypes.c_char_p
    symbol = Path(f"{prefix}-symbol.json").read_bytes()
    params = Path(f"{prefix}-0000.params").read_bytes()
    key, numbers = (ctypes.c_char_p * 1)(b"data"), ctypes.c_uint * x.ndim
    about = (1, key, (ctypes.c_uint * 2)(0, x.ndim), numbers(*x.shape))
    call("MXPredCreate", symbol, params, len(params), 1, 0, *about, ctypes.byref(handle))
    floats = ctypes.POINTER(ctypes.c_float)
    data = np.ascontiguousarray(x.asnumpy())
    call("MXPredSetInput", handle, b"data", data.ctypes.data_as(floats), data.size)
    call("MXPredForward", handle)
    lengths, rank = ctypes.POINTER(ctypes.c_uint)(), ctypes.c_uint()
    call("MXPredGetOutputShape", handle, 0, ctypes.byref(lengths), ctypes.byref(rank))
    y = np.empty(lengths[: rank.value], "float32")
    call("MXPredGetOutput", handle, 0, y.ctypes.data_as(floats), y.size)
    call("MXPredFree", handle)
    return y


@pytest.mark.skipif(not hasattr(mx.base._LIB, "MXPredCreate"), reason="a build without that API")
@pytest.mark.parametrize("name", ["LeNet", "Conv3D 8", "Conv3D 16", "Conv3D 64"])
def test_an_exported_net_runs_in_the_c_predict_api(name, tmp_path):
    x = mx.nd.random.normal(shape=(2, 1, 28, 28) if name == "LeNet" else (2, 3, 4, 6, 6))
    if name == "LeNet":
        net = lenet(ScratchBatchNorm)
    else:
        net, channels = nn.HybridSequential(), int(name.split()[1])
        net.add(nn.Conv3D(channels, 3, in_channels=3), ScratchBatchNorm(), nn.Activation("relu"))
        net.add(nn.Conv3D(channels, 3, padding=1), ScratchBatchNorm())
    net.initialize(mx.init.Xavier())
    with mx.autograd.train_mode():
        net(x)
    net.hybridize()
    expected = net(x).asnumpy()
    net.export(str(tmp_path / "net"))
    export_inference(net, tmp_path / "infer", x)
    for prefix in ("net", "infer"):
        y = predicted(tmp_path / prefix, x)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())
