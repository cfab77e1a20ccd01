"""The training script on a few digits of the sample."""

from __future__ import annotations

import json

from scratchbn.train import Run, Session

import mxnet as mx
import numpy as np
from mxnet import gluon

from models.lenet import initialize, lenet
from scripts import train_lenet

SYMBOLS = ["lenet-infer-symbol.json", "lenet-symbol.json"]
FILES = sorted(["curves.png", "lenet-0000.params", *SYMBOLS, "lenet.params", "metrics.json"])
FEW = ["--data", "sample", "--limit", "200", "--batch-size", "48", "--device", "cpu"]
KINDS = {"output", "input gradient", "parameter gradient", "statistic"}


def run_main(out, *options):
    """Run on 200 digits; return the exit status and the metrics."""
    status = train_lenet.main([*FEW, "--out", str(out), *options])
    return status, json.loads((out / "metrics.json").read_text())


def twenty_images(rng):
    """Noise, two images for each label: pixels and labels."""
    return rng.uniform(size=(20, 1, 28, 28)).astype("f4"), np.arange(20, dtype="f4") % 10


def build(norm, init, device):
    net = lenet(train_lenet.NORMS[norm], prefix="lenet_")
    initialize(net, init, device)
    net(mx.nd.zeros((1, 1, 28, 28), ctx=device))
    return net


def start(norm, net, lr):
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    return Run(norm, net, loss, optimizer_params={"learning_rate": lr})


def train(run, images, orders, batch_size, folder):
    """Train as the script does; return what each epoch gave."""
    with Session([run], orders, batch_size, folder, {}, progress=False) as session:
        for _, _, batches in session.epochs():
            for batch in batches:
                run.step(images[0][batch], images[1][batch])
            run.end_epoch()
    return run.epochs
