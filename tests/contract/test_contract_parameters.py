"""Clause 5 of the contract: unused gamma and beta, initial values, and parameter files."""

import warnings

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import mxnet as mx
import numpy as np
import pytest
from contract_cases import every_mode, snapshot
from helpers import (
    BLOCK_MODES,
    CLOSE,
    STATE,
    array,
    check_step,
    in_mode,
    infer,
    random_values,
    set_values,
    take_step,
)
from mxnet import autograd, gluon
from mxnet.gluon import nn

SHAPE = (6, 3, 4, 5)


@every_mode
@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
def test_unused_scale_and_center_count_as_one_and_zero(
    build, rng, mode, scale, center, layer_class
):
    subject = build(mode, SHAPE, layer_class=layer_class, scale=scale, center=center)
    for training in (True, False, True):
        x, dy = rng.normal(size=SHAPE) + 1, rng.normal(size=SHAPE)
        expected = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        data = subject.array(x)
        data.attach_grad()
        with autograd.record(train_mode=training):
            y = subject(data)
        y.backward(subject.array(dy))
        np.testing.assert_allclose(y.asnumpy(), expected.y, **CLOSE["float64"])
        np.testing.assert_allclose(data.grad.asnumpy(), expected.dx, **CLOSE["float64"])
        if scale:
            np.testing.assert_allclose(
                subject.gradient("gamma"), expected.dgamma, **CLOSE["float64"]
            )
        if center:
            np.testing.assert_allclose(subject.gradient("beta"), expected.dbeta, **CLOSE["float64"])
        subject.check_statistics(rtol=1e-12)


@every_mode
def test_nothing_of_an_unused_parameter_shows(build, rng, mode):
    """Multiplying by 0 would let a NaN through."""
    values = {"gamma": [np.nan, np.inf, 0.0], "beta": [np.inf, 1.0, np.nan]}
    subject = build(mode, SHAPE, scale=False, center=False, values=values)
    x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    data = subject.array(x)
    data.attach_grad()
    with autograd.record():
        y = subject(data)
    y.backward(subject.array(dy))
    step = subject.oracle.train_step(x, dy)
    np.testing.assert_allclose(y.asnumpy(), step.y, **CLOSE["float64"])
    np.testing.assert_allclose(data.grad.asnumpy(), step.dx, **CLOSE["float64"])
    np.testing.assert_allclose(infer(subject, x), subject.oracle.infer(x), **CLOSE["float64"])


@pytest.mark.parametrize("mode", BLOCK_MODES)
@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
def test_unused_parameters_are_never_written(build, rng, mode, scale, center):
    subject = build(mode, SHAPE, scale=scale, center=center)
    before = snapshot(subject.layer)
    trainer = gluon.Trainer(subject.net.collect_params(), "sgd", {"learning_rate": 0.1, "wd": 0.1})
    for _ in range(3):
        take_step(subject, rng.normal(size=SHAPE), rng.normal(size=SHAPE))
        trainer.step(1)
        infer(subject, rng.normal(size=SHAPE))
    after = snapshot(subject.layer)
    assert (after["gamma"].tobytes() == before["gamma"].tobytes()) == (not scale)
    assert (after["beta"].tobytes() == before["beta"].tobytes()) == (not center)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_the_four_parameters_exist_in_every_combination(scale, center):
    layer = ScratchBatchNorm(scale=scale, center=center, in_channels=3)
    structural = layer._collect_params_with_prefix()
    assert list(structural) == list(STATE)
    assert [p.name for p in structural.values()] == [layer.prefix + name for name in STATE]
    requests = {name: structural[name].grad_req for name in STATE}
    assert requests == {
        "gamma": "write" if scale else "null",
        "beta": "write" if center else "null",
        "running_mean": "null",
        "running_var": "null",
    }
    assert all(p.shape == (3,) for p in structural.values())


def test_statistics_stay_untrainable_when_asked_for_gradients():
    """`collect_params().setattr('grad_req', 'write')` is a common way to unfreeze a net."""
    ours, built_in = ScratchBatchNorm(in_channels=3), nn.BatchNorm(in_channels=3)
    for layer in (ours, built_in):
        layer.collect_params().setattr("grad_req", "write")
    for name in ("running_mean", "running_var"):
        assert getattr(ours, name).grad_req == getattr(built_in, name).grad_req == "null"


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_trainer_leaves_the_statistics_alone(build, rng, mode):
    subject = build(mode, SHAPE)
    trainer = gluon.Trainer(
        subject.net.collect_params(), "sgd", {"learning_rate": 0.5, "wd": 0.5, "momentum": 0.9}
    )
    for _ in range(3):
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        expected = subject.oracle.train_step(x, dy)
        check_step(take_step(subject, x, dy), expected)
        trainer.step(1)
        subject.check_statistics(rtol=1e-12)
        subject.oracle.gamma = subject.value("gamma")
        subject.oracle.beta = subject.value("beta")


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, False)])
def test_initializers_are_respected_in_files(tmp_path, device, scale, center, deferred):
    layer = ScratchBatchNorm(
        scale=scale,
        center=center,
        gamma_initializer=mx.init.Constant(3),
        beta_initializer=mx.init.Constant(4),
        running_mean_initializer=mx.init.Constant(5),
        running_variance_initializer=mx.init.Constant(6),
        in_channels=0 if deferred else 2,
    )
    layer.initialize(mx.init.Normal(9), ctx=device)
    layer(mx.nd.ones((4, 2), ctx=device))
    layer.save_parameters(str(tmp_path / "file.params"))
    stored = {k: v.asnumpy() for k, v in mx.nd.load(str(tmp_path / "file.params")).items()}
    assert {k: v.tolist() for k, v in stored.items()} == {
        "gamma": [3, 3],
        "beta": [4, 4],
        "running_mean": [5, 5],
        "running_var": [6, 6],
    }


def test_default_initializers(device):
    layer = ScratchBatchNorm()
    layer.initialize(mx.init.Normal(9), ctx=device)
    layer(mx.nd.ones((4, 2), ctx=device))
    state = {name: value.tolist() for name, value in snapshot(layer).items()}
    assert state == {
        "gamma": [1, 1],
        "beta": [0, 0],
        "running_mean": [0, 0],
        "running_var": [1, 1],
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("via", ["save_parameters", "collect_params"])
def test_files_interchange_with_the_built_in(
    tmp_path, device, rng, dtype, scale, center, ours_first, via
):
    """Parameters of one net load into the other, by structural and by full names alike."""
    nets = []
    for norm in (
        (ScratchBatchNorm, nn.BatchNorm) if ours_first else (nn.BatchNorm, ScratchBatchNorm)
    ):
        net = nn.HybridSequential(prefix="net_")
        with net.name_scope():
            net.add(nn.Conv2D(4, 3, in_channels=3))
            net.add(norm(scale=scale, center=center, in_channels=4))
            net.add(norm(scale=scale, center=center, in_channels=4))
        net.initialize(ctx=device)
        net.cast(dtype)
        nets.append(net)
    source, target = nets
    for child in (source[1], source[2]):
        set_values(child, random_values(rng, 4))
    file = str(tmp_path / "net.params")
    if via == "save_parameters":
        source.save_parameters(file)
        target.load_parameters(file, ctx=device)
    else:
        source.collect_params().save(file)
        target.collect_params().load(file, ctx=device)
    x = array(rng.normal(size=(2, 3, 6, 6)), device, dtype)
    names = list(source.collect_params())
    assert names == list(target.collect_params())
    for name in names:
        stored, loaded = source.collect_params()[name].data(), target.collect_params()[name].data()
        assert stored.dtype == loaded.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(stored.asnumpy(), loaded.asnumpy())
    if center:
        np.testing.assert_allclose(source(x).asnumpy(), target(x).asnumpy(), rtol=1e-4, atol=1e-5)


def test_automatic_prefixes_equal_the_built_in():
    def build_net(norm):
        net = nn.HybridSequential(prefix="net_")
        with net.name_scope():
            net.add(norm(), nn.Dense(3), norm())
        return net

    ours, built_in = build_net(ScratchBatchNorm), build_net(nn.BatchNorm)
    assert ScratchBatchNorm()._alias() == "batchnorm"
    assert list(ours.collect_params()) == list(built_in.collect_params())
    assert ScratchBatchNorm(prefix="mine_").gamma.name == "mine_gamma"


@pytest.mark.parametrize("mode", BLOCK_MODES[1:])
def test_an_exported_file_holds_all_four_also_when_unused(tmp_path, device, rng, mode):
    layer = ScratchBatchNorm(scale=False, center=False, in_channels=3)
    layer.initialize(ctx=device)
    values = {k: v.astype("float32") for k, v in random_values(rng, 3).items()}
    set_values(layer, values)
    net = in_mode(layer, mode)
    net(mx.nd.ones((2, 3), ctx=device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.export(str(tmp_path / "net"))
    stored = mx.nd.load(str(tmp_path / "net-0000.params"))
    kinds = {"gamma": "arg:", "beta": "arg:", "running_mean": "aux:", "running_var": "aux:"}
    assert set(stored) == {kinds[name] + layer.prefix + name for name in STATE}
    for name in STATE:
        value = stored[kinds[name] + layer.prefix + name].asnumpy()
        np.testing.assert_array_equal(value, values[name])
