"""The second graph of a live net: used in inference alone, and right at once whatever changes."""

import copy
import threading

import scratchbn
from scratchbn import (
    ScratchBatchNorm,
    ScratchBatchNormReLU,
    native,
    set_inference_graph,
    use_backend,
    use_inference_graph,
)
from scratchbn.backends import inference_graph
from scratchbn.backends.inference import switch
from scratchbn.backends.inference.two_graphs import TwoGraphs
from scratchbn.monitor import Monitor
from scratchbn.variants import GhostBatchNorm

import helpers
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, SymbolBlock, nn

SHAPE = (4, 3, 6, 6)
CLOSE = {
    "float16": {"rtol": 1e-2, "atol": 1e-2},
    "float32": {"rtol": 2e-5, "atol": 2e-5},
    "float64": {"rtol": 1e-10, "atol": 1e-10},
}
FLAGS = {
    "plain": {},
    "static_alloc": {"static_alloc": True},
    "static_shape": {"static_alloc": True, "static_shape": True},
}
flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


@pytest.fixture(autouse=True)
def chosen(device, monkeypatch):
    if device.device_type != "cpu":
        pytest.skip("the second graph is for CPUs")
    monkeypatch.setattr(switch, "_chosen", None)
    monkeypatch.delenv("SCRATCHBN_INFERENCE_GRAPH", raising=False)
    with use_backend("auto"):
        yield


@pytest.fixture(params=["kernel", "no kernel"])
def kernel(request, monkeypatch):
    """With the compiled operator in the block's own graph, and without."""
    if request.param == "no kernel":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("the kernel has not been built")


class Wired(HybridBlock):
    """Norms in places of all kinds: shared, behind a shared convolution, with a fused relu."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.first = nn.HybridSequential()
            self.first.add(ScratchBatchNorm(in_channels=3), nn.Conv2D(8, 1))
            self.more = nn.Conv2D(8, 3, padding=1, use_bias=False, in_channels=8)
            self.shared = ScratchBatchNorm(in_channels=8)
            self.own = ScratchBatchNormReLU(scale=False, epsilon=1e-2, in_channels=8)
            self.dense = nn.Dense(16)
            self.last = ScratchBatchNorm(center=False)

    def hybrid_forward(self, F, x):
        y = self.first(x)
        z = self.shared(self.more(self.shared(y)))
        return self.last(self.dense(z + self.own(y) + y))


def ready(net, rng, shape=SHAPE, dtype="float32", ctx=None):
    """Give a net random norms; returns an input of that shape."""
    net.initialize(mx.init.Xavier(magnitude=3), ctx=ctx)
    net.cast(dtype)
    x = mx.nd.array(rng.normal(size=shape), dtype=dtype)
    net(x)
    for layer in layers(net):
        helpers.set_values(layer, helpers.random_values(rng, layer.gamma.shape[0]))
    return x


def layers(net):
    found = []
    net.apply(lambda b: found.append(b) if isinstance(b, ScratchBatchNorm) else None)
    return found


def conv_net(*more):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3), ScratchBatchNorm(), nn.Activation("relu"), *more)
    return net


def seconds(net):
    """The second graphs of a net: those that its latest graph has built."""
    op = net._cached_op
    return [s for s in op._seconds.values() if s is not None] if isinstance(op, TwoGraphs) else []


def own_graph(net, x):
    with use_inference_graph(False):
        return net(x).asnumpy()


def eagerly(net, x):
    """What the layers compute one by one, from stock operators."""
    active = net._active
    net.hybridize(False, clear=False)
    y = net(x).asnumpy()
    assert active
    for block in (net, *_all(net)):
        block._active = True
    return y


def _all(net):
    found = []
    net.apply(found.append)
    return [block for block in found if isinstance(block, HybridBlock)]


def check(net, x, dtype="float32", second=True):
    """The net's own call, compared with the eager layers; it ran a second graph or none."""
    y = net(x)
    assert bool(seconds(net)) == second
    np.testing.assert_allclose(y.asnumpy(), eagerly(net, x), **CLOSE[dtype])
    return y.asnumpy()


@flags
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_computes_what_the_layers_do(rng, kernel, flags, dtype):
    net = Wired()
    x = ready(net, rng, dtype=dtype)
    net.hybridize(**flags)
    for _ in range(3):
        check(net, x, dtype)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("layer", [ScratchBatchNorm, ScratchBatchNormReLU])
@pytest.mark.parametrize("dtype", helpers.CLOSE)
def test_a_layer_alone(rng, monkeypatch, rank, layer, dtype):
    monkeypatch.setattr(native, "available", lambda: False)
    net = nn.HybridSequential()
    net.add(layer(epsilon=1e-3))
    x = ready(net, rng, (3, 8, 2, 4, 3)[:rank], dtype)
    net.hybridize()
    assert check(net, x, dtype).dtype == x.dtype


def test_one_block_has_a_graph_for_each_rank_and_type(rng, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    net = nn.HybridSequential()
    net.add(ScratchBatchNorm())
    x = ready(net, rng, (2, 8, 3, 3))
    net.hybridize()
    for count, data in enumerate((x, x[:, :, 0], x[:, :, 0, 0]), start=1):
        check(net, data)
        assert len(seconds(net)) == count
    check(net, x)
    assert len(seconds(net)) == 3


def test_float16_convolutions_aside(rng, kernel):
    net = nn.HybridSequential()
    net.add(nn.Flatten(), ScratchBatchNorm(), nn.Flatten(), ScratchBatchNormReLU())
    x = ready(net, rng, (4, 2, 4), "float16")
    net.hybridize()
    y = net(x)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y.asnumpy(), eagerly(net, x), **CLOSE["float16"])


@flags
def test_values_are_read_when_it_runs(rng, tmp_path, kernel, flags, second_device):
    net = Wired()
    x = ready(net, rng)
    net.hybridize(**flags)
    results = [check(net, x)]
    for layer in layers(net):
        helpers.set_values(layer, helpers.random_values(rng, layer.gamma.shape[0]))
    results.append(check(net, x))
    trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
    for _ in range(3):
        with autograd.record():
            loss = (net(x) ** 2).mean()
        loss.backward()
        trainer.step(1)
        results.append(check(net, x))
    with autograd.train_mode():
        net(x)
    results.append(check(net, x))
    net.save_parameters(str(tmp_path / "p"))
    net.dense.weight.set_data(mx.nd.ones(net.dense.weight.shape))
    results.append(check(net, x))
    net.load_parameters(str(tmp_path / "p"))
    results.append(check(net, x))
    np.testing.assert_array_equal(results.pop(), results[-2])
    for one, other in zip(results, results[1:]):
        assert np.abs(one - other).max() > 1e-4
    net.collect_params().reset_ctx(second_device)
    there = net(x.as_in_context(second_device))
    assert there.context == second_device
    np.testing.assert_allclose(there.asnumpy(), results[-2], **CLOSE["float32"])
    net.collect_params().reset_ctx(x.context)
    net.cast("float64")
    check(net, x.astype("float64"), "float64")
    net.cast("float32")
    for layer in layers(net):
        layer._kwargs["eps"] = 0.5
    net.hybridize(**flags)
    assert np.abs(check(net, x) - results[-2]).max() > 1e-3


@flags
def test_training_is_as_without_it(rng, flags):
    net = conv_net(nn.Dense(3))
    x = ready(net, rng)
    net.hybridize(**flags)
    start = {name: p.data().copy() for name, p in net.collect_params().items()}
    ends = []
    for on in (True, False):
        for name, p in net.collect_params().items():
            p.set_data(start[name])
        trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
        with use_inference_graph(on):
            for _ in range(3):
                net(x)
                with autograd.record():
                    loss = (net(x) ** 2).mean()
                loss.backward()
                trainer.step(1)
        mx.nd.waitall()
        ends.append({name: p.data().asnumpy() for name, p in net.collect_params().items()})
    assert seconds(net)
    for name, value in ends[0].items():
        np.testing.assert_array_equal(value, ends[1][name], err_msg=name)


def test_inference_changes_no_parameter(rng, kernel):
    net = Wired()
    x = ready(net, rng)
    net.hybridize()
    before = {name: p.data().asnumpy() for name, p in net.collect_params().items()}
    x[0, 0, 0, 0] = np.nan
    net(x).wait_to_read()
    assert seconds(net)
    for name, p in net.collect_params().items():
        np.testing.assert_array_equal(p.data().asnumpy(), before[name])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_comes_through(rng, kernel, value):
    net = conv_net()
    x = ready(net, rng)
    x[1] = value
    net.hybridize()
    second, own = net(x).asnumpy(), own_graph(net, x)
    assert seconds(net)
    np.testing.assert_allclose(second[[0, 2, 3]], own[[0, 2, 3]], **CLOSE["float32"])
    np.testing.assert_array_equal(np.isfinite(second), np.isfinite(own))


@flags
def test_gradients_of_inference_are_those_of_the_own_graph(rng, kernel, flags):
    net = Wired()
    x = ready(net, rng, dtype="float64")
    net.hybridize(**flags)
    net(x)
    gradients = []
    for on in (True, False):
        data = x.copy()
        data.attach_grad()
        with use_inference_graph(on), autograd.record(train_mode=False):
            loss = mx.nd.sin(net(data)).sum()
        loss.backward()
        gradients.append([data.grad.asnumpy(), net.dense.weight.grad().asnumpy()])
    for one, other in zip(*gradients):
        assert np.abs(one).max() > 1e-3
        np.testing.assert_allclose(one, other, **CLOSE["float64"])


def test_it_goes_with_the_cache(rng):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    check(net, x)
    op = net._cached_op
    assert isinstance(op, TwoGraphs)
    net.hybridize()
    assert net._cached_op is None
    copy.deepcopy(net)  # nothing is left that cannot be copied
    check(net, x)
    assert net._cached_op is not op


def test_the_file_of_a_net_in_use_is_that_of_training(rng, tmp_path):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    y = check(net, x)
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    imported = SymbolBlock.imports(*files)
    assert len(imported.collect_params(".*running").keys()) == 2
    imported.hybridize()
    again = imported(x).asnumpy()
    assert seconds(imported)  # also a net that was only imported has two graphs
    np.testing.assert_allclose(again, y, **CLOSE["float32"])
    with autograd.train_mode():
        imported(x)
    mx.nd.waitall()
    moved = imported(x).asnumpy()
    assert np.abs(moved - again).max() > 1e-3
    np.testing.assert_allclose(moved, own_graph(imported, x), **CLOSE["float32"])


def test_nested_and_on_several_devices(rng, kernel, device, second_device):
    inner, net = conv_net(), nn.HybridSequential()
    net.add(inner, nn.Dense(3))
    net.initialize(ctx=[device, second_device])
    net.hybridize()
    x = mx.nd.array(rng.normal(size=SHAPE), ctx=device)
    with autograd.train_mode():
        net(x)
    for where in (device, second_device):
        data = x.as_in_context(where)
        y = net(data)
        assert y.context == where
        np.testing.assert_allclose(y.asnumpy(), own_graph(net, data), **CLOSE["float32"])
    assert seconds(net)
    assert inner._cached_op is None
    one, other = (net(x.as_in_context(c)).asnumpy() for c in (device, second_device))
    assert np.abs(one - other).max() > 1e-3  # the statistics moved on one of them


def test_threads(rng, kernel):
    net = Wired()
    data = [ready(net, rng), *(mx.nd.array(rng.normal(size=SHAPE)) for _ in range(3))]
    net.hybridize()
    with use_inference_graph(False):
        expected = [net(x).asnumpy() for x in data]
    found = [[] for _ in data]

    def work(i):
        with use_backend("auto"):
            for _ in range(10):
                found[i].append(net(data[i]).asnumpy())

    # What runs both graphs is built; the second one is by whichever thread comes first.
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seconds(net)) == 1
    for results, wanted in zip(found, expected):
        assert len(results) == 10
        for y in results:
            np.testing.assert_allclose(y, wanted, **CLOSE["float32"])


class Tanh(ScratchBatchNorm):
    """A variant that no description fits."""

    def transform(self, F, view, batch, gamma, beta, epsilon):
        return F.tanh(super().transform(F, view, batch, gamma, beta, epsilon))


@pytest.mark.parametrize(
    ("layer", "second"),
    [
        (lambda: ScratchBatchNorm(axis=-1), False),
        (lambda: ScratchBatchNorm(axis=2), False),
        (lambda: ScratchBatchNorm(axis=-3), True),
        (lambda: Tanh(), False),
        (lambda: GhostBatchNorm(ghost_size=2), True),
        (lambda: ScratchBatchNorm(use_global_stats=True), True),
        (lambda: ScratchBatchNorm(momentum=None), True),
    ],
    ids=["last", "third", "negative", "variant", "ghost", "global", "cumulative"],
)
def test_layers_of_all_kinds(rng, kernel, layer, second):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 1), layer())
    x = ready(net, rng)
    net.hybridize()
    check(net, x, second=second)
    mixed = conv_net(layer(), nn.Dense(3))
    x = ready(mixed, rng)
    mixed.hybridize()
    check(mixed, x)


def test_a_rank_that_depends_on_a_length_runs_the_own_graph(rng, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)

    class Squeezed(HybridBlock):
        def __init__(self):
            super().__init__()
            self.norm = ScratchBatchNorm()

        def hybrid_forward(self, F, x):
            return self.norm(F.squeeze(x))

    net = Squeezed()
    x = ready(net, rng, (2, 8, 1, 3))
    net.hybridize()
    check(net, x)
    flat = mx.nd.array(rng.normal(size=(2, 8, 1, 1)))
    np.testing.assert_allclose(net(flat).asnumpy(), own_graph(net, flat), **CLOSE["float32"])


def test_a_wrong_input_is_an_error_and_the_next_call_right(rng, kernel):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    wrong = mx.nd.ones((2, 5, 6, 6))
    with pytest.raises(mx.MXNetError, match=r"conv.*Shape inconsistent"):
        net(wrong)  # before there is a second graph
    check(net, x)
    for _ in range(2):
        with pytest.raises(mx.MXNetError, match=r"conv.*Shape inconsistent|attribute shape"):
            net(wrong)
        check(net, x)


def test_numpy_arrays(rng):
    mx.npx.set_np()
    net = conv_net()
    net.initialize()
    net.hybridize()
    x = mx.np.array(rng.normal(size=SHAPE), dtype="float32")
    y = net(x)
    assert isinstance(y, mx.np.ndarray)
    assert seconds(net)
    np.testing.assert_allclose(y.asnumpy(), own_graph(net, x), **CLOSE["float32"])
    layer = ScratchBatchNorm(in_channels=8)
    layer.initialize()
    layer.hybridize()
    assert layer(mx.np.zeros((0, 8, 2, 2))).shape == (0, 8, 2, 2)


def test_hooks_see_the_own_graph(rng):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    y = net(x)
    seen = []
    net.register_op_hook(lambda name, operator, array: seen.append(str(name)))
    own = net(x)
    own.wait_to_read()
    assert seen
    assert not any("norms_" in name for name in seen)
    np.testing.assert_allclose(own.asnumpy(), y.asnumpy(), **CLOSE["float32"])
    net.register_op_hook(None)
    np.testing.assert_array_equal(net(x).asnumpy(), y.asnumpy())


def test_a_monitor_watches_on(rng):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    y = net(x).asnumpy()
    with Monitor(net) as monitor:
        with autograd.record():
            loss = net(x).sum()
        loss.backward()
        monitor.step()
    assert len(monitor.records) == 1
    assert isinstance(net._cached_op, TwoGraphs)
    assert np.abs(net(x).asnumpy() - y).max() > 1e-3


@pytest.mark.parametrize("name", ["portable", "native"])
def test_a_backend_chosen_by_name_is_what_runs(rng, name):
    if name == "native" and not native.available():
        pytest.skip("the kernel has not been built")
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    with use_backend(name):
        y = net(x)
    assert not isinstance(net._cached_op, TwoGraphs)
    np.testing.assert_array_equal(net(x).asnumpy(), y.asnumpy())  # it keeps what was chosen
    net.hybridize()
    check(net, x)
    arrays = [x if data else parameter.data() for data, parameter in net._cached_op_args]
    assert net._cached_op._infers(arrays)
    with use_backend(name):
        assert not net._cached_op._infers(arrays)


def test_the_switch(rng, monkeypatch):
    net = conv_net()
    x = ready(net, rng)
    net.hybridize()
    with use_inference_graph(False):
        net(x)
        assert not seconds(net)
        with use_inference_graph(True):
            assert inference_graph()
        assert not inference_graph()
    set_inference_graph(False)
    net(x)
    assert not seconds(net)
    set_inference_graph(True)
    monkeypatch.setenv("SCRATCHBN_INFERENCE_GRAPH", "0")
    check(net, x)
    monkeypatch.setattr(switch, "_chosen", None)
    assert not inference_graph()
    monkeypatch.setenv("SCRATCHBN_INFERENCE_GRAPH", "1")
    assert inference_graph()
    monkeypatch.setenv("SCRATCHBN_INFERENCE_GRAPH", "yes")
    with pytest.raises(ValueError, match="SCRATCHBN_INFERENCE_GRAPH must be 0 or 1, got 'yes'"):
        inference_graph()


@pytest.mark.parametrize("value", [1, None, "off"])
def test_the_switch_takes_a_bool(value):
    with pytest.raises(TypeError, match="on must be True or False"):
        set_inference_graph(value)
    with pytest.raises(TypeError, match="on must be True or False"), use_inference_graph(value):
        pass
    assert inference_graph()
    assert scratchbn.set_inference_graph is set_inference_graph
