"""Gradients: of another function, or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from mxnet.gluon import Block, nn

from ..parity.oracle import OracleBatchNorm
from .case import LAYERS, Bench, Outcome, defect
from .measuring import batch, complaint, percent


@defect("`record(train_mode=False)`, then a plain `backward()`: wrong input gradient", 9580)
def predict_mode_gradient(bench: Bench) -> Outcome:
    """The backward asks for the mode again, and a plain one is in training mode."""
    x, errors = batch(), []
    for dy in (batch(mean=0, std=1, seed=1), np.ones(x.shape)):
        dx = bench.step(bench.net(bench.layer(3)), x, dy, record_train=False)[1]
        exact = OracleBatchNorm.fresh(3).infer_step(x, dy).dx
        errors.append(float(np.linalg.norm(dx - exact) / np.linalg.norm(exact)))
    text = "gradient {} off for a random dy, {} for ones".format(*map(percent, errors))
    return Outcome(max(errors) < 1e-6, min(errors) > 0.1, text)


RANKS = {nn.Conv1D: 1, nn.Conv2D: 2, nn.Conv3D: 3}


def after_convolution(bench: Bench, convolution: Callable[..., Block], axis: int = 1) -> Outcome:
    """Differentiate a convolution and a batch norm with several numbers of channels."""
    errors = {}
    for channels in (7, 8, 16, 64):
        blocks = convolution(channels, 3, padding=1), LAYERS[bench.norm][0](axis=axis)
        net = bench.net(*map(bench.ready, blocks))
        x = batch((2, 3) + (8,) * RANKS[convolution])
        errors[channels] = complaint(partial(bench.step, net, x))
    failed = [channels for channels, error in errors.items() if error]
    text = f"{errors[8]} with {failed} channels" if failed else "runs with 7, 8, 16, 64 channels"
    return Outcome(not failed, failed == [8, 16, 64], text)


@defect("Conv1D, then batch norm: `backward()` fails with 8, 16, 64 channels", 20858, 19150)
def after_conv1d(bench: Bench) -> Outcome:
    """The operator's backward cannot view the blocked layout that oneDNN hands over."""
    return after_convolution(bench, nn.Conv1D)


@defect("Conv2D, then batch norm of another axis than 1: the same", 20858, 19150)
def after_conv2d_other_axis(bench: Bench) -> Outcome:
    """The operator's backward cannot view the blocked layout that oneDNN hands over."""
    return after_convolution(bench, nn.Conv2D, axis=-1)


@defect("Conv3D, then batch norm: the same", 20858, 19150)
def after_conv3d(bench: Bench) -> Outcome:
    """The operator's backward cannot view the blocked layout that oneDNN hands over."""
    return after_convolution(bench, nn.Conv3D)
