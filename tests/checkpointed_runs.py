"""Short runs of the training script, and what they left."""

from __future__ import annotations

import json
import os

from scratchbn.train import Run

import mxnet as mx
import numpy as np

from models.lenet import initialize, lenet
from scripts import train_lenet

FEW = ["--data", "sample", "--limit", "240", "--batch-size", "16", "--device", "cpu"]
TWO_EPOCHS = [*FEW, "--epochs", "2"]


def run(out, *options):
    return train_lenet.main([*TWO_EPOCHS, "--out", str(out), *options])


def parameters(out):
    return {n: v.asnumpy() for n, v in mx.nd.load(str(out / "lenet.params")).items()}


def metrics_without_seconds(out):
    metrics = json.loads((out / "metrics.json").read_text())
    for epoch in metrics["epochs"]:
        del epoch["seconds"]
    return metrics["epochs"], metrics["crosscheck"]


def assert_same_result(out, expected):
    ours, theirs = parameters(out), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert metrics_without_seconds(out) == metrics_without_seconds(expected)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def listed(folder):
    try:
        return sorted(name for name in os.listdir(folder) if name.startswith("step-"))
    except FileNotFoundError:
        return []


def build(norm, devices, dtype="float32"):
    net = lenet(train_lenet.NORMS[norm], prefix="lenet_")
    net.cast(dtype)
    initialize(net, "xavier", devices)
    net(mx.nd.zeros((1, 1, 28, 28), ctx=devices[0], dtype=dtype))
    return net


def run_of(name, net, lr):
    loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    return Run(name, net, loss, optimizer_params={"learning_rate": lr})
