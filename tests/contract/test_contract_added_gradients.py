"""Clause 10 of the contract: gradients of grad_req='add' are added, in every mode."""

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU

import numpy as np
import pytest
from contract_cases import every_mode
from helpers import CLOSE
from mxnet import autograd

SHAPE = (6, 3, 4)


@every_mode
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer_class", [ScratchBatchNorm, ScratchBatchNormReLU])
def test_added_gradients_add(build, rng, mode, training, layer_class):
    subject = build(mode, SHAPE, layer_class=layer_class)
    for name in ("gamma", "beta"):
        subject.parameter(name).grad_req = "add"
    subject.net.collect_params().zero_grad()
    data = subject.array(np.zeros(SHAPE))
    data.attach_grad("add")
    totals = {"dx": 0, "dgamma": 0, "dbeta": 0}
    for _ in range(3):
        x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
        data[:] = subject.array(x)
        with autograd.record(train_mode=training):
            y = subject(data)
        y.backward(subject.array(dy))
        step = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        totals = {name: total + getattr(step, name) for name, total in totals.items()}
        np.testing.assert_allclose(data.grad.asnumpy(), totals["dx"], **CLOSE["float64"])
        np.testing.assert_allclose(subject.gradient("gamma"), totals["dgamma"], **CLOSE["float64"])
        np.testing.assert_allclose(subject.gradient("beta"), totals["dbeta"], **CLOSE["float64"])


@every_mode
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_added_gradients_add_in_every_dtype(build, rng, mode, dtype):
    subject = build(mode, SHAPE, dtype=dtype)
    for name in ("gamma", "beta"):
        subject.parameter(name).grad_req = "add"
    subject.net.collect_params().zero_grad()
    x, dy = rng.normal(size=SHAPE).astype(dtype), rng.normal(size=SHAPE).astype(dtype)
    data = subject.array(x)
    data.attach_grad("add")
    for _ in range(2):
        with autograd.record():
            y = subject(data)
        y.backward(subject.array(dy))
        step = subject.oracle.train_step(x, dy)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == "float16" else CLOSE["float32"]
    np.testing.assert_allclose(data.grad.asnumpy(), 2 * step.dx, **close)
    np.testing.assert_allclose(subject.gradient("gamma"), 2 * step.dgamma, **close)
    np.testing.assert_allclose(subject.gradient("beta"), 2 * step.dbeta, **close)


@every_mode
@pytest.mark.parametrize("added", ["data", "gamma", "beta"])
def test_added_beside_written_gradients(build, rng, mode, added):
    subject = build(mode, SHAPE)
    for name in ("gamma", "beta"):
        subject.parameter(name).grad_req = "add" if name == added else "write"
    subject.net.collect_params().zero_grad()
    x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    data = subject.array(x)
    data.attach_grad("add" if added == "data" else "write")
    for _ in range(2):
        with autograd.record():
            y = subject(data)
        y.backward(subject.array(dy))
        step = subject.oracle.train_step(x, dy)
    times = {name: 2 if name == added else 1 for name in ("data", "gamma", "beta")}
    np.testing.assert_allclose(data.grad.asnumpy(), times["data"] * step.dx, **CLOSE["float64"])
    for name in ("gamma", "beta"):
        expected = times[name] * getattr(step, "d" + name)
        np.testing.assert_allclose(subject.gradient(name), expected, **CLOSE["float64"])
