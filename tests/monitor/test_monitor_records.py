"""What the monitor reports of each step equals NumPy."""

import json
import math

from scratchbn import (
    ScratchBatchNorm,
    ScratchBatchNormReLU,
    freeze,
    recalibrate,
)
from scratchbn.monitor import FIELDS, SATURATION, Monitor

import mxnet as mx
import numpy as np
import pytest
from helpers import BLOCK_MODES, array, in_mode, untrained
from monitored_nets import deep_net, kinds, modes, one_layer, train_step
from mxnet import autograd, gluon
from mxnet.gluon import nn

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@kinds
@modes
@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3, 2)])
def test_records_equal_numpy(layer_class, mode, shape, device, rng):
    layer, net = one_layer(layer_class, device, mode, momentum=0.7, epsilon=1e-3)
    gamma, beta = np.array([1, -2, 0.5, 0]), np.array([0.5, 1, 20, -1])
    layer.gamma.set_data(array(gamma, device, "float32"))
    layer.beta.set_data(array(beta, device, "float32"))
    x = rng.normal(2, 3, shape).astype(np.float32)
    with Monitor(net, channels=True) as monitor:
        train_step(net, None, array(x, device, "float32"))
        monitor.step()
    (record,) = monitor.records
    assert set(FIELDS) < set(record)

    axes = (0, *range(2, x.ndim))
    column = (1, 4) + (1,) * (x.ndim - 2)
    mean, var = x.mean(axis=axes, dtype=np.float64), x.var(axis=axes, dtype=np.float64)
    running_mean, running_var = 0.3 * mean, 0.7 + 0.3 * var
    normalized = (x - mean.reshape(column)) / np.sqrt(var.reshape(column) + 1e-3)
    y = normalized * gamma.reshape(column) + beta.reshape(column)
    expected = {
        "batch_mean": mean,
        "batch_var": var,
        "running_mean": running_mean,
        "running_var": running_var,
        "mean_distance": abs(mean - running_mean) / np.sqrt(running_var + 1e-3),
        "var_ratio": (var + 1e-3) / (running_var + 1e-3),
        "gamma": gamma,
        "beta": beta,
    }
    for name, per_channel in expected.items():
        np.testing.assert_allclose(record[name], per_channel, err_msg=name, **CLOSE)
        for summary in ("mean", "min", "max"):
            np.testing.assert_allclose(
                record[f"{name}_{summary}"], getattr(per_channel, summary)(), **CLOSE
            )
    assert (record["step"], record["layer"], record["calls"]) == (1, layer.name, 1)
    assert record["dead"] == (y <= 0).all(axis=axes).mean() == 0.25
    np.testing.assert_allclose(record["saturated"], (abs(y) > SATURATION).mean(), **CLOSE)
    assert record["saturated"] >= 0.25
    assert record["nonfinite_batches"] == 0


@kinds
def test_hybridized_nets_report_what_eager_ones_do(layer_class, device, rng):
    batches = [array(rng.normal(size=(6, 3, 8, 8)), device, "float32") for _ in range(3)]
    found = {}
    for mode in BLOCK_MODES:
        mx.random.seed(1)
        net = deep_net(layer_class, device)
        outer = in_mode(net, mode)
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01})
        with Monitor(outer) as monitor:
            for x in batches:
                train_step(outer, trainer, x)
                monitor.step()
        found[mode] = monitor.records
    names = ["net_body_batchnorm0", "net_body_batchnorm1", "net_batchnorm0"]
    assert [(r["step"], r["layer"]) for r in found["eager"]] == [
        (step, name) for step in (1, 2, 3) for name in names
    ]
    for mode in BLOCK_MODES[1:]:
        for eager, graph in zip(found["eager"], found[mode]):
            for name in FIELDS:
                if name == "layer":
                    assert graph[name] == eager[name]
                else:
                    np.testing.assert_allclose(
                        graph[name], eager[name], rtol=1e-3, atol=1e-4, err_msg=name
                    )
    assert len({r["batch_mean_mean"] for r in found["hybrid"]}) == 9


def test_unused_scale_and_shift(device, rng):
    layer, net = one_layer(ScratchBatchNorm, device, scale=False, center=False)
    layer.gamma.set_data(mx.nd.full((4,), 7))
    with Monitor(net) as monitor:
        train_step(net, None, array(rng.normal(size=(5, 4)), device, "float32"))
        monitor.step()
    assert (monitor.records[0]["gamma_max"], monitor.records[0]["beta_max"]) == (1, 0)


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_and_a_fused_relu(mode, dtype, device, rng):
    net = nn.HybridSequential()
    net.add(ScratchBatchNormReLU(in_channels=4))
    net.initialize(ctx=device)
    net.cast(dtype)
    layer, net = net[0], in_mode(net, mode)
    layer.beta.set_data(array([0, 0, -30, 0], device))
    x = rng.normal(3, 1, (8, 4)).astype(dtype)
    with Monitor(net, channels=True) as monitor:
        train_step(net, None, array(x, device, dtype))
        monitor.step()
    expected = x.astype(np.float64).var(axis=0)
    rtol = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(monitor.records[0]["batch_var"], expected, rtol=rtol)
    assert monitor.records[0]["dead"] == 0.25


@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_numpy_semantics(mode, device, rng):
    mx.npx.set_np()
    _, net = one_layer(ScratchBatchNorm, device, mode)
    x = rng.normal(3, 1, (8, 4)).astype(np.float32)
    with Monitor(net, channels=True) as monitor:
        train_step(net, None, array(x, device, "float32"))
        monitor.step()
    np.testing.assert_allclose(monitor.records[0]["batch_mean"], x.mean(axis=0), rtol=1e-6)


@kinds
@pytest.mark.parametrize("mode", ["eager", "hybrid", "static_shape"])
def test_nonfinite_batches_are_reported(layer_class, mode, device, rng, tmp_path):
    _, net = one_layer(layer_class, device, mode)
    good = rng.normal(size=(6, 4))
    bad = good.copy()
    bad[2, 1] = np.inf
    path = tmp_path / "out.jsonl"
    with Monitor(net, path=path) as monitor:
        for x in (good, bad, good):
            train_step(net, None, array(x, device, "float32"))
            monitor.step()
    assert [r["nonfinite_batches"] for r in monitor.records] == [0, 1, 1]
    assert [math.isnan(r["dead"]) for r in monitor.records] == [False, True, False]
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert (lines[1]["batch_mean_max"], lines[1]["saturated"]) == (None, None)
    if layer_class is ScratchBatchNorm:
        assert np.isfinite(monitor.records[2]["running_mean_max"])


@kinds
@pytest.mark.parametrize("mode", ["eager", "hybrid"])
def test_batches_on_several_devices_are_taken_together(
    layer_class, mode, device, second_device, rng
):
    _, net = one_layer(layer_class, [device, second_device], mode)
    x = rng.normal(2, 1, (9, 4)).astype(np.float32)
    with Monitor(net, channels=True) as monitor:
        with autograd.record():
            losses = [
                (net(array(part, on, "float32")) ** 2).sum()
                for part, on in ((x[:3], device), (x[3:], second_device))
            ]
        autograd.backward(losses)
        monitor.step()
    (record,) = monitor.records
    assert record["calls"] == 2
    np.testing.assert_allclose(record["batch_mean"], x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(record["batch_var"], x.var(axis=0), rtol=1e-5)
    average = 0.1 * (x[:3].mean(axis=0) + x[3:].mean(axis=0)) / 2
    np.testing.assert_allclose(record["running_mean"], average, rtol=1e-5)


def test_only_training_steps_are_observed(device, rng):
    _, net = one_layer(ScratchBatchNorm, device, "hybrid")
    x = array(rng.normal(size=(6, 4)), device, "float32")
    with Monitor(net, every=3) as monitor:
        for _ in range(7):
            train_step(net, None, x)
            net(x)
            with autograd.record(train_mode=False):
                net(x * 2)
            recalibrate(net, [x, x])
            monitor.step()
    assert [(r["step"], r["calls"]) for r in monitor.records] == [(1, 1), (4, 1), (7, 1)]


def test_frozen_layers_are_observed(device, rng):
    _, net = one_layer(ScratchBatchNorm, device, "hybrid")
    with untrained():
        freeze(net)
    x = rng.normal(3, 1, (6, 4))
    with Monitor(net) as monitor:
        train_step(net, None, array(x, device, "float32"))
        monitor.step()
    np.testing.assert_allclose(monitor.records[0]["batch_mean_mean"], x.mean(), rtol=1e-6)
    assert monitor.records[0]["running_mean_max"] == 0
