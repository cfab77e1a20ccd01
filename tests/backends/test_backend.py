"""Choosing what the layers compute with, and what becomes of the choice."""

import json
import threading

import scratchbn
from scratchbn import BackendError, ScratchBatchNorm, native, use_backend
from scratchbn.backends import choice
from scratchbn.native import cuda

# isort: split
import mxnet as mx
import numpy as np
import pytest
from helpers import load_kernel
from mxnet import autograd
from mxnet.gluon import nn

OPERATOR = "_scratchbn_batch_norm"


@pytest.fixture
def kernel(device):
    load_kernel(device)


@pytest.fixture
def unbuilt(monkeypatch):
    """A machine where the kernel has not been built and cannot be."""

    def fail(*args, **kwargs):
        raise BackendError("no compiler here")

    monkeypatch.setattr(native, "_kernel", native._Kernel("no compiler here"))
    monkeypatch.setattr(native, "build", fail)


@pytest.fixture
def unchosen(monkeypatch):
    monkeypatch.setattr(choice.CHOSEN, "_everywhere", None)
    monkeypatch.delenv("SCRATCHBN_BACKEND", raising=False)


def small_net(norm=ScratchBatchNorm, **options):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), norm(**options), nn.Activation("relu"), nn.Dense(3))
    net.initialize()
    return net


def executed(net, x):
    """Return the names of the outputs that the net's graph computes."""
    seen = []
    net.register_op_hook(lambda name, operator, array: seen.append(name))
    net(x).wait_to_read()
    net.register_op_hook(None)
    return seen


def runs_kernel(net, x):
    return any(OPERATOR in str(name) for name in executed(net, x))


# The choice


@pytest.mark.parametrize("name", ["cuda", "", None, 1])
def test_an_unknown_name_is_an_error_and_changes_nothing(name):
    before = scratchbn.get_backend()
    with pytest.raises(ValueError, match="must be one of auto, portable, native"):
        scratchbn.set_backend(name)
    with pytest.raises(ValueError, match="must be one of"), use_backend(name):
        pass
    assert scratchbn.get_backend() == before


def test_the_environment_chooses_where_nothing_else_does(unchosen, monkeypatch):
    assert scratchbn.get_backend() == "auto"
    monkeypatch.setenv("SCRATCHBN_BACKEND", "portable")
    assert scratchbn.get_backend() == "portable"
    with use_backend("auto"):
        assert scratchbn.get_backend() == "auto"
    monkeypatch.setenv("SCRATCHBN_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"SCRATCHBN_BACKEND must be one of .*'fastest'"):
        scratchbn.get_backend()


def test_a_with_block_ends_with_what_was_before_also_after_an_error(unchosen):
    with use_backend("portable"):
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert scratchbn.get_backend() == "portable"
    assert scratchbn.get_backend() == "auto"


def test_a_with_block_is_of_its_thread_and_set_backend_of_all(unchosen):
    seen = []
    with use_backend("portable"):
        thread = threading.Thread(target=lambda: seen.append(scratchbn.get_backend()))
        thread.start()
        thread.join()
    scratchbn.set_backend("portable")
    thread = threading.Thread(target=lambda: seen.append(scratchbn.get_backend()))
    thread.start()
    thread.join()
    assert seen == ["auto", "portable"]


def test_without_a_kernel_auto_is_portable_and_native_an_error(unbuilt, unchosen, device):
    net = small_net()
    net.collect_params().reset_ctx(device)
    net.hybridize()
    x = mx.nd.ones((2, 3, 8, 8), ctx=device)
    assert not runs_kernel(net, x)
    with pytest.raises(BackendError, match="no compiler here"):
        scratchbn.set_backend("native")
    assert scratchbn.get_backend() == "auto"


CPU, GPU, REMOTE = mx.cpu(), mx.gpu(0), mx.gpu(1)


def test_a_kernel_on_every_device_or_none(kernel, monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda devices: devices == {0})
    with use_backend("auto"):
        assert choice.is_native({CPU}, "execute")
        assert choice.is_native({GPU}, "execute")
        assert not choice.is_native({REMOTE}, "execute")
        assert not choice.is_native({GPU, REMOTE}, "execute")
        assert not choice.is_native({GPU, CPU}, "execute")
        assert not choice.is_native({GPU}, "remember"), "files are portable"
        assert not choice.is_native(set(), "execute"), "no data that says where"
        assert choice.is_native({CPU}, "eager")
        assert choice.is_native({GPU}, "eager")


def test_native_says_why_a_gpu_cannot_be_had(kernel, monkeypatch):
    def refuse(devices):
        if devices:
            raise BackendError(f"no driver for {devices}")

    monkeypatch.setattr(cuda, "load", refuse)
    with use_backend("native"):
        assert choice.is_native({CPU}, "eager")
        with pytest.raises(BackendError, match=r"no driver for \{0\}"):
            choice.is_native({GPU}, "execute")


# Nets


def test_auto_runs_the_kernel_in_a_hybridized_net(kernel, unchosen):
    x = mx.nd.random.normal(shape=(2, 3, 8, 8))
    net = small_net()
    net.hybridize()
    assert runs_kernel(net, x)
    with use_backend("portable"):
        assert runs_kernel(net, x)  # what was traced stays
        net.hybridize()
        assert not runs_kernel(net, x)


@pytest.mark.parametrize("backend", ["auto", "native", "portable"])
def test_an_eager_net_uses_the_kernel_unless_told_not_to(kernel, monkeypatch, backend):
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return native.batch_norm(*args, **options)

    monkeypatch.setattr("scratchbn.backends.native.batch_norm", counted)
    with use_backend(backend):
        small_net()(mx.nd.random.normal(shape=(2, 3, 8, 8))).wait_to_read()
    assert len(calls) == (backend != "portable")


def test_an_eager_call_builds_nothing(unbuilt, unchosen):
    net = small_net()
    net(mx.nd.ones((2, 3, 8, 8))).wait_to_read()
    assert native.facts()["problem"]


def test_what_was_eager_on_the_kernel_is_exported_and_saved_portable(kernel, unchosen, tmp_path):
    net, x = small_net(), mx.nd.random.normal(shape=(4, 3, 8, 8))
    with autograd.record():  # eager, on the kernel
        loss = net(x).sum()
    loss.backward()
    y = net(x).asnumpy()
    net.hybridize()
    net(x)
    net.export(str(tmp_path / "net"))
    net.save(str(tmp_path / "whole"))
    for file in ("net-symbol.json", "whole-model.json"):
        assert OPERATOR not in (tmp_path / file).read_text()
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net-0000.params")]
    imported = mx.gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    np.testing.assert_allclose(imported(x).asnumpy(), y, rtol=1e-5, atol=1e-6)


def test_a_variant_is_portable(kernel):
    class Slow(ScratchBatchNorm):
        def update(self, F, running, batch, count):
            return super().update(F, running, batch, count)

    net = small_net(Slow)
    net.hybridize()
    with use_backend("native"):
        assert not runs_kernel(net, mx.nd.ones((2, 3, 8, 8)))


def test_backends_agree_over_training_steps_with_dropout(kernel):
    nets = []
    for name in ("portable", "native"):
        mx.random.seed(7)
        net = nn.HybridSequential()
        net.add(nn.Conv2D(4, 3, in_channels=3), ScratchBatchNorm(in_channels=4), nn.Dropout(0.5))
        net.add(nn.Dense(3, in_units=144), scratchbn.ScratchBatchNormReLU(in_channels=3))
        net.initialize(mx.init.Xavier())
        net.cast("float64")
        net.hybridize()
        trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
        with use_backend(name):
            for _ in range(5):
                x = mx.nd.random.normal(shape=(6, 3, 8, 8), dtype="float64")
                with autograd.record():
                    loss = (net(x) ** 2).sum()
                loss.backward()
                trainer.step(6)
        nets.append([p.data().asnumpy() for p in net.collect_params().values()])
    for portable, compiled in zip(*nets):
        np.testing.assert_allclose(compiled, portable, rtol=1e-9, atol=1e-11)


def test_the_same_graph_on_two_devices(kernel, device, second_device):
    net = small_net()
    net.initialize(ctx=[device, second_device], force_reinit=True)
    net.hybridize()
    with use_backend("native"), autograd.train_mode():
        for scale, context in ((1, device), (3, second_device)):
            net(scale * mx.nd.random.normal(shape=(4, 3, 8, 8), ctx=context)).wait_to_read()
    one, other = (v.asnumpy() for v in net[1].running_var.list_data())
    assert (one != other).all()


# Files


def test_what_is_exported_is_portable(kernel, tmp_path):
    x = mx.nd.random.normal(shape=(2, 3, 8, 8))
    net = small_net(momentum=None)
    net.hybridize()
    with use_backend("native"):
        assert runs_kernel(net, x)
        with autograd.train_mode():
            net(x).wait_to_read()
        y = net(x)
        net.export(str(tmp_path / "net"))
        net.save(str(tmp_path / "whole"))
    nodes = json.loads((tmp_path / "net-symbol.json").read_text())["nodes"]
    assert not [node for node in nodes if node["op"] == OPERATOR]
    assert OPERATOR not in (tmp_path / "whole-model.json").read_text()
    imported = mx.gluon.SymbolBlock.imports(
        str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    )
    np.testing.assert_allclose(imported(x).asnumpy(), y.asnumpy(), rtol=1e-5, atol=1e-6)
    assert runs_kernel(net, x)


def test_a_layer_called_on_symbols_is_portable_unless_asked_by_name(kernel, unchosen):
    def operators():
        symbol = ScratchBatchNorm(in_channels=3)(mx.sym.var("data"))
        return {node["op"] for node in json.loads(symbol.tojson())["nodes"]}

    assert OPERATOR not in operators()
    with use_backend("native"):
        assert OPERATOR in operators()
