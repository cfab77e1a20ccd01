"""What the second graph of a live net computes: what its layers do, whatever changes."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, native, use_inference_graph
from scratchbn._graph.nodes import Graph
from scratchbn.variants import GhostBatchNorm

import helpers
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn
from two_graph_nets import (
    CLOSE,
    SHAPE,
    Wired,
    check,
    conv_net,
    eagerly,
    flags,
    layers,
    own_graph,
    ready,
    seconds,
)

pytestmark = pytest.mark.usefixtures("two_graphs")


@flags
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_computes_what_the_layers_do(rng, with_kernel, flags, dtype):
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


def test_float16_convolutions_aside(rng, with_kernel):
    net = nn.HybridSequential()
    net.add(nn.Flatten(), ScratchBatchNorm(), nn.Flatten(), ScratchBatchNormReLU())
    x = ready(net, rng, (4, 2, 4), "float16")
    net.hybridize()
    y = net(x)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y.asnumpy(), eagerly(net, x), **CLOSE["float16"])


@flags
def test_values_are_read_when_it_runs(rng, tmp_path, with_kernel, flags, second_device):
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


def test_inference_changes_no_parameter(rng, with_kernel):
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
def test_what_is_not_finite_comes_through(rng, with_kernel, value):
    net = conv_net()
    x = ready(net, rng)
    x[1] = value
    net.hybridize()
    second, own = net(x).asnumpy(), own_graph(net, x)
    assert seconds(net)
    np.testing.assert_allclose(second[[0, 2, 3]], own[[0, 2, 3]], **CLOSE["float32"])
    np.testing.assert_array_equal(np.isfinite(second), np.isfinite(own))


@flags
def test_gradients_of_inference_are_those_of_the_own_graph(rng, with_kernel, flags):
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


class Tanh(ScratchBatchNorm):
    """A variant that no description fits."""

    def transform(self, F, view, batch, gamma, beta, epsilon):
        return F.tanh(super().transform(F, view, batch, gamma, beta, epsilon))


@pytest.mark.parametrize(
    ("layer", "second"),
    [
        (lambda: ScratchBatchNorm(axis=-1), "kernel"),
        (lambda: ScratchBatchNorm(axis=2), "kernel"),
        (lambda: ScratchBatchNorm(axis=-3), True),
        (lambda: Tanh(), False),
        (lambda: GhostBatchNorm(ghost_size=2), True),
        (lambda: ScratchBatchNorm(use_global_stats=True), True),
        (lambda: ScratchBatchNorm(momentum=None), True),
    ],
    ids=["last", "third", "negative", "variant", "ghost", "global", "cumulative"],
)
def test_layers_of_all_kinds(rng, with_kernel, layer, second):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 1), layer())
    x = ready(net, rng)
    net.hybridize()
    check(net, x, second=second is True or second == with_kernel)
    mixed = conv_net(layer(), nn.Dense(3))
    x = ready(mixed, rng)
    mixed.hybridize()
    check(mixed, x)


def test_a_rank_that_depends_on_a_length_keeps_the_own_graph(rng, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)

    class Squeezed(HybridBlock):
        def __init__(self):
            super().__init__()
            self.norm, self.dense, self.last = ScratchBatchNorm(), nn.Dense(4), ScratchBatchNorm()

        def hybrid_forward(self, F, x):
            flat = F.flatten(self.norm(F.squeeze(x)))
            mean = F.mean(flat, axis=1, keepdims=True)
            return F.concat(flat, self.last(self.dense(mean)), dim=1)

    net = Squeezed()
    ready(net, rng, (2, 8, 1, 1))
    net.hybridize()
    for shape in ((2, 8, 1, 1), (2, 8, 8, 1), (2, 8, 8, 8)):  # what is (1, 8) fits all of these
        check(net, mx.nd.array(rng.normal(size=shape)))
    (_, became), *more = net._cached_op.inference()
    assert not more
    assert [name for _, name, _ in became] == [None, "affine"]
    assert became[0][2] == "the rank of its input depends on lengths"


def test_what_the_second_graph_cannot_run_is_run_by_the_own(rng, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(Graph, "without_rank", lambda graph: set())
    net = nn.HybridSequential()
    net.add(nn.HybridLambda("squeeze"), ScratchBatchNorm())
    x = ready(net, rng, (2, 8, 1, 3))
    net.hybridize()
    check(net, x)
    flat = mx.nd.array(rng.normal(size=(2, 8, 1, 1)))
    np.testing.assert_allclose(net(flat).asnumpy(), own_graph(net, flat), **CLOSE["float32"])


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
