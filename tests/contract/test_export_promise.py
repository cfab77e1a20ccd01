"""What a net writes consists of stock operators, whatever was called before (clause 14)."""

import json
import threading

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, use_backend
from scratchbn.backends import choose
from scratchbn.variants import BatchRenorm

# isort: split
import mxnet as mx
import numpy as np
import pytest
from helpers import load_kernel
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn

OURS = "_scratchbn_batch_norm"


@pytest.fixture(autouse=True)
def kernel(device):
    load_kernel(device)


def a_net(norm=ScratchBatchNorm, hybridize=True):
    net = nn.HybridSequential()
    inner = nn.HybridSequential()
    inner.add(nn.Dense(4), norm())
    net.add(nn.Conv2D(4, 3), norm(), nn.Activation("relu"), inner)
    net.initialize()
    if hybridize:
        net.hybridize()
    return net


def train(net, x):
    with autograd.record():
        y = net(x)
    y.backward()
    mx.nd.waitall()


def operators(net, prefix):
    net.export(str(prefix))
    nodes = json.loads((prefix.parent / f"{prefix.name}-symbol.json").read_text())["nodes"]
    return {node["op"] for node in nodes}


def runs_kernel(net, x):
    seen = []
    net.register_op_hook(lambda name, operator, array: seen.append(str(name)))
    net(x).wait_to_read()
    net.register_op_hook(None)
    net.hybridize()
    return any(OURS in name for name in seen)


def infer_shape(net, x):
    net.infer_shape(x)


def infer_type(net, x):
    net.infer_shape(x)
    net.infer_type(x)


def summary(net, x):
    net.hybridize(active=False)
    net(x)
    net.summary(x)
    net.hybridize()


def nested_infer_shape(net, x):
    net[3].hybridize()
    net[3].infer_shape(mx.nd.zeros((2, 4 * 36)))


def other_backend_before(net, x):
    with use_backend("native"):
        train(net, x)
    with use_backend("portable"):
        net(x)


def other_backend_after(net, x):
    with use_backend("portable"):
        train(net, x)
        net.hybridize()
    with use_backend("native"):
        train(net, x)


def by_name(net, x):
    with use_backend("native"):
        net.infer_shape(x)
        train(net, x)


def called_on_symbols(net, x):
    with use_backend("native"):
        net(mx.sym.var("data"))


def an_error_in_between(net, x):
    net(x)
    with pytest.raises(mx.MXNetError):
        net(mx.nd.zeros((2, 5, 8, 8))).wait_to_read()


def optimized_by_mxnet(net, x):
    """What fuses operators remembers the graph that it has rewritten."""
    net.optimize_for(x, backend="MKLDNN")


BEFORE = (
    optimized_by_mxnet,
    infer_shape,
    infer_type,
    summary,
    nested_infer_shape,
    other_backend_before,
    other_backend_after,
    by_name,
    called_on_symbols,
    an_error_in_between,
)


@pytest.mark.parametrize("norm", [ScratchBatchNorm, ScratchBatchNormReLU, BatchRenorm])
@pytest.mark.parametrize("before", BEFORE)
def test_a_file_holds_stock_operators(before, norm, tmp_path, capsys):
    net, x = a_net(norm), mx.nd.random.normal(shape=(2, 3, 8, 8))
    before(net, x)
    train(net, x)
    expected = net(x).asnumpy()
    assert OURS not in operators(net, tmp_path / "net")
    net.save(str(tmp_path / "saved"))
    assert all(OURS not in file.read_text(errors="ignore") for file in tmp_path.glob("saved*"))
    files = (str(tmp_path / name) for name in ("net-symbol.json", "net-0000.params"))
    symbol, params = files
    imported = SymbolBlock.imports(symbol, ["data"], params)
    np.testing.assert_allclose(imported(x).asnumpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("before", [infer_shape, infer_type, nested_infer_shape])
def test_the_kernel_still_runs(before):
    """What a block remembers is portable; what it executes need not be."""
    net, x = a_net(), mx.nd.random.normal(shape=(2, 3, 8, 8))
    before(net, x)
    assert runs_kernel(net, x)


@pytest.mark.parametrize("name", ["auto", "native"])
def test_a_file_written_without_a_call(name, tmp_path):
    net, x = a_net(), mx.nd.random.normal(shape=(2, 3, 8, 8))
    with use_backend(name):
        net.infer_shape(x)
        for parameter in net.collect_params().values():
            parameter._finish_deferred_init()
        assert OURS not in operators(net, tmp_path / "net")


def test_an_imported_net_keeps_its_graph(tmp_path):
    net, x = a_net(), mx.nd.random.normal(shape=(2, 3, 8, 8))
    train(net, x)
    first = operators(net, tmp_path / "first")
    files = (str(tmp_path / name) for name in ("first-symbol.json", "first-0000.params"))
    symbol, params = files
    imported = SymbolBlock.imports(symbol, ["data"], params)
    imported.hybridize()
    train(imported, x)
    assert operators(imported, tmp_path / "second") == first


def test_a_trace_that_fails_leaves_what_was_remembered(tmp_path):
    net, x = a_net(), mx.nd.random.normal(shape=(2, 3, 8, 8))
    net.infer_shape(x)
    net[1].hybrid_forward = None
    with pytest.raises(TypeError):
        net(x)
    del net[1].hybrid_forward
    train(net, x)
    assert OURS not in operators(net, tmp_path / "net")


def test_threads_trace_for_themselves(tmp_path):
    """One thread builds nets to execute while others only infer shapes."""
    problems = []

    def work(number):
        try:
            for i in range(5):
                net, x = a_net(), mx.nd.random.normal(shape=(2, 3, 8, 8))
                if number % 2:
                    net.infer_shape(x)
                train(net, x)
                found = operators(net, tmp_path / f"net{number}-{i}")
                if OURS in found:
                    problems.append(f"thread {number}, net {i}")
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_eager_code_and_layers_on_symbols_are_outside_of_any_trace():
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize()
    x = mx.nd.zeros((2, 3))
    with use_backend("auto"):
        assert choose(layer, x).__name__ == "native"
        assert choose(layer, mx.sym.var("data")).__name__ == "portable", "it may be exported"
    with use_backend("native"):
        assert choose(layer, x).__name__ == "native"
        assert choose(layer, mx.sym.var("data")).__name__ == "native"
