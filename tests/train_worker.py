"""Steps of a net on the workers of a job, as a program of its own: train_worker.py DIRECTORY."""

from __future__ import annotations

import sys
from pathlib import Path

from scratchbn.train import Run, join

import mxnet as mx
import numpy as np
from mxnet import gluon

from models.lenet import initialize, lenet


def steps(devices, workers):
    """Two steps, on 5 images, then on 1, which leaves one of two parts without any."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(size=(6, 1, 28, 28)).astype(np.float32)
    labels = np.arange(6, dtype=np.float32)
    mx.random.seed(3)
    net = lenet(prefix="lenet_")
    initialize(net, "xavier", devices)
    net(mx.nd.zeros((1, 1, 28, 28)))
    net.hybridize()
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    run = Run("scratch", net, loss, optimizer_params={"learning_rate": 0.01}, workers=workers)
    losses = [run.step(pixels[b], labels[b]) for b in ([4, 0, 5, 2, 1], [3])]
    statistics = run.statistics()
    return {"losses": losses, **run.averages()}, statistics


def main(directory):
    workers = join(90, 20)
    values, statistics = steps([mx.cpu()], workers)
    np.savez(directory / f"{workers.rank}", **values)
    np.savez(directory / f"statistics{workers.rank}", **statistics)
    return workers.leave(0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
