"""What a conversion keeps: parameters, statistics, hybridize flags, hooks, a Trainer's state."""

import copy
import pickle

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet import autograd, gluon
from mxnet.gluon import nn
from norm_nets import SHAPE, Residual, layers, ready, train, ways


@ways
def test_parameters_are_the_same_objects(device, rng, convert, source, target):
    net = ready(Residual(source), device)
    net(array(rng.normal(size=SHAPE), device))
    before = dict(net.collect_params().items())
    data = {name: p.data().handle.value for name, p in before.items()}
    before_by_path = net._collect_params_with_prefix()
    convert(net)
    after = net.collect_params()
    assert list(after.keys()) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {name: p.data().handle.value for name, p in after.items()} == data
    assert net._collect_params_with_prefix() == before_by_path


@ways
def test_a_trainer_made_before_goes_on(device, rng, convert, source, target):
    x = [array(rng.normal(size=SHAPE), device) for _ in range(6)]
    results = []
    for switch in (False, True):
        net = Residual(source, prefix="net_")
        mx.random.seed(3)
        ready(net, device).hybridize()
        net(x[0])
        options = {"learning_rate": 0.01, "momentum": 0.9}
        trainer = gluon.Trainer(net.collect_params(), "sgd", options)
        for i, batch in enumerate(x):
            if switch and i == 3:
                convert(net)
            result = train(net, batch, trainer)
        results.append(result)
        assert (type(net.first) is target) == switch
    for a, e in zip(results[1], results[0]):
        for name in e if isinstance(e, dict) else [...]:
            np.testing.assert_allclose(a[name], e[name], rtol=1e-5, atol=1e-9)


@ways
@pytest.mark.parametrize(
    "flags", [{}, {"static_alloc": True}, {"static_alloc": True, "static_shape": True}], ids=str
)
def test_hybridize_flags_stay(device, rng, convert, source, target, flags):
    net = ready(Residual(source), device)
    net.hybridize(**flags)
    net.first.hybridize(False)
    before = [(layer._active, list(layer._flags)) for layer in [net, net.body, *layers(net)]]
    convert(net)
    after = [(layer._active, list(layer._flags)) for layer in [net, net.body, *layers(net)]]
    assert after == before
    assert [active for active, _ in after] == [True, True, False, True, True, True, True]
    assert net(array(rng.normal(size=SHAPE), device)).shape == SHAPE


@ways
def test_hooks_and_attributes_of_the_user_stay(device, rng, convert, source, target):
    layer = ready(source(in_channels=3), device)
    seen = []
    handle = layer.register_forward_hook(lambda block, _, y: seen.append((block, y.shape)))
    layer.register_forward_pre_hook(lambda block, _: seen.append(type(block)))
    layer.remark = {"stage": 3}
    convert(layer)
    x = array(rng.normal(size=SHAPE), device)
    layer(x)
    assert seen == [target, (layer, SHAPE)]
    assert layer.remark == {"stage": 3}
    handle.detach()
    layer(x)
    assert seen[2:] == [target]


@ways
def test_copies_and_pickles_of_a_converted_net(device, rng, convert, source, target):
    x = array(rng.normal(size=SHAPE), device, "float32")
    net = ready(nn.HybridSequential(), device, "float32")
    net.add(source(in_channels=3, epsilon=0.5))
    convert(net)
    net.initialize(ctx=device)
    loaded = pickle.loads(pickle.dumps(source(in_channels=3)))
    convert(loaded)
    copied = copy.deepcopy(net)
    assert type(copied[0]) is type(loaded) is target
    assert type(pickle.loads(pickle.dumps(loaded))) is target
    expected = net(x).asnumpy()
    net[0].running_mean.set_data(mx.nd.ones(3))
    np.testing.assert_array_equal(copied(x).asnumpy(), expected)
    assert np.abs(net(x).asnumpy() - expected).max() > 0.1


@ways
def test_each_device_keeps_its_statistics(device, second_device, convert, source, target):
    layer = source(in_channels=1)
    layer.initialize(ctx=[device, second_device])
    with autograd.train_mode():
        for value, context in ((1.0, device), (5.0, second_device)):
            with autograd.record():
                y = layer(mx.nd.full((2, 1, 3), value, ctx=context))
            y.backward()
    mx.nd.waitall()
    convert(layer)
    for value, context in ((1.0, device), (5.0, second_device)):
        mean = layer.running_mean.data(context)
        np.testing.assert_allclose(mean.asnumpy(), 0.1 * value, rtol=1e-6)
        expected = (value - 0.1 * value) / np.sqrt(0.9 + 1e-5)
        y = layer(mx.nd.full((2, 1, 3), value, ctx=context))
        np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-5)
