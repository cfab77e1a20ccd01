"""What a layer keeps: its state in files and in copies, and no memory beyond that."""

import copy
import pickle

from scratchbn import ScratchBatchNorm

import mxnet as mx
import numpy as np
import pytest
from contract_cases import both_layers, every_block_mode
from helpers import (
    CLOSE,
    SANITIZED,
    STATE,
    array,
    check_step,
    in_mode,
    last_json,
    run_python,
    take_step,
    train_forward,
)
from mxnet import autograd

SHAPE = (6, 3, 4)


# Saving, copying


@every_block_mode
@pytest.mark.parametrize("momentum", [0.9, None])
def test_training_goes_on_from_a_file(build, device, rng, tmp_path, mode, momentum):
    """Every piece of state is in the file, the count of a cumulative average included."""
    subject = build(mode, SHAPE, momentum=momentum)
    for _ in range(3):
        x = rng.normal(size=SHAPE) + 2
        train_forward(subject, x)
        subject.oracle.train(x)
    subject.net.save_parameters(str(tmp_path / "net.params"))
    restored = build(mode, SHAPE, momentum=momentum)
    train_forward(restored, rng.normal(size=SHAPE))
    restored.net.load_parameters(str(tmp_path / "net.params"), ctx=device)
    restored.oracle = subject.oracle
    for _ in range(2):
        x, dy = rng.normal(size=SHAPE) - 1, rng.normal(size=SHAPE)
        check_step(take_step(restored, x, dy), restored.oracle.train_step(x, dy))
        restored.check_statistics(rtol=1e-12)


def test_only_a_cumulative_average_has_a_fifth_parameter():
    assert list(ScratchBatchNorm()._collect_params_with_prefix()) == list(STATE)
    extra = set(ScratchBatchNorm(momentum=None)._collect_params_with_prefix()) - set(STATE)
    assert len(extra) == 1
    parameter = ScratchBatchNorm(momentum=None)._collect_params_with_prefix()[extra.pop()]
    assert parameter.grad_req == "null"


@both_layers
def test_deep_copies_are_independent(build, rng, layer_class):
    subject = build("eager", SHAPE, layer_class=layer_class)
    duplicate = copy.deepcopy(subject.layer)
    assert type(duplicate) is layer_class
    assert repr(duplicate) == repr(subject.layer)
    before = subject.statistics()
    x = rng.normal(size=SHAPE)
    with autograd.train_mode():
        y = duplicate(subject.array(x))
    mx.nd.waitall()
    for a, b in zip(subject.statistics(), before):
        assert a.tobytes() == b.tobytes()
    np.testing.assert_allclose(y.asnumpy(), subject.oracle.train(x), **CLOSE["float64"])
    mean = duplicate.running_mean.data().asnumpy()
    np.testing.assert_allclose(mean, subject.oracle.running_mean, rtol=1e-12)
    duplicate._kwargs["momentum"] = 0.1
    assert subject.layer._kwargs["momentum"] == 0.9


@both_layers
def test_layers_pickle_before_they_are_initialized(device, layer_class):
    """As Gluon layers do; afterwards they hold device arrays, which MXNet cannot pickle."""
    layer = pickle.loads(pickle.dumps(layer_class(momentum=0.5, in_channels=3)))
    assert type(layer) is layer_class
    layer.initialize(ctx=device)
    with autograd.train_mode():
        layer(mx.nd.ones((2, 3), ctx=device) * 4)
    mx.nd.waitall()
    assert layer.running_mean.data().asnumpy().tolist() == [2, 2, 2]


# Memory

MEMORY_PROGRAM = """
import sys, json, gc, os
import scratchbn, mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn
kind, _, index = sys.argv[1].partition("(")
device = mx.Context(kind, int(index.rstrip(")")))
mode, momentum = sys.argv[2], None if sys.argv[3] == "None" else float(sys.argv[3])
layer = scratchbn.ScratchBatchNorm(in_channels=4096, momentum=momentum)
layer.initialize(ctx=device)
if mode != "eager":
    layer.hybridize(static_alloc=mode == "static_alloc")
trainer = gluon.Trainer(layer.collect_params(), "sgd", {"learning_rate": 0.01})
x = mx.nd.random.normal(shape=(4, 4096), ctx=device)

def resident():
    mx.nd.waitall()
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def train(steps):
    for step in range(steps):
        with autograd.record():
            y = layer(x)
        y.backward()
        trainer.step(4)
        if step % 50 == 0:
            mx.nd.waitall()
            layer(x).wait_to_read()

train(250)
sizes = [resident()]
for part in range(3):
    train(250)
    sizes.append(resident())
# A leak grows in every part; what the allocator takes once does not.
growth = 3 * min(after - before for before, after in zip(sizes, sizes[1:]))
print(json.dumps(growth / 2**20))
"""


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps what is freed: memory grows")
@pytest.mark.parametrize(
    ("mode", "momentum"), [("eager", 0.9), ("hybrid", None), ("static_alloc", 0.9)]
)
def test_memory_does_not_grow_with_training(device, mode, momentum):
    """One vector of 4,096 channels kept per step would cost 12 MiB, an autograd chain more."""
    growth = last_json(run_python(MEMORY_PROGRAM, device, mode, momentum))
    assert growth < 4, f"{growth:.1f} MiB"


@pytest.mark.parametrize("mode", ["eager", "hybrid", "static_alloc"])
def test_statistics_hold_no_autograd_history(device, rng, mode):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize(ctx=device)
    net = in_mode(layer, mode)
    for _ in range(3):
        with autograd.record():
            y = net(array(rng.normal(size=SHAPE), device, "float32"))
    y.backward()
    with autograd.record():
        total = layer.running_mean.data().sum() + layer.running_var.data().sum()
    with pytest.raises(mx.MXNetError):
        total.backward()
