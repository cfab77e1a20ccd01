"""Clause 10 of the contract: MXNet recomputes operators (mirroring) and merges common ones."""

import json

from scratchbn import ScratchBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import array, forward_backward, last_json, run_python
from mxnet.gluon import HybridBlock, nn

SHAPE = (6, 3, 4)


# Recomputation in the backward pass

MIRROR_PROGRAM = """
import sys, json
import numpy as np, scratchbn, mxnet as mx
from mxnet.gluon import nn

kind, _, index = sys.argv[1].partition("(")
device = mx.Context(kind, int(index.rstrip(")")))
record = {}

def build(case, options):
    net = nn.HybridSequential(prefix="net_")
    shared = scratchbn.ScratchBatchNorm(in_channels=4, prefix="shared_", **options)
    if case == "net":
        for k in range(3):
            net.add(nn.Conv2D(4, 3, padding=1, in_channels=4, prefix=f"conv{k}_"))
            net.add(scratchbn.ScratchBatchNorm(in_channels=4, prefix=f"bn{k}_", **options))
            net.add(nn.Activation("relu"))
            net.add(scratchbn.ScratchBatchNormReLU(in_channels=4, prefix=f"relu{k}_", **options))
    elif case == "chain":
        net.add(shared, nn.Activation("tanh"), shared, nn.Activation("sigmoid"), shared)
    else:
        both = lambda F, a, b: F.tanh(b) * a
        net.add(nn.HybridLambda(lambda F, x: both(F, shared(x), shared(x * x))))
    return net

for case, momentum, unbiased in json.loads(sys.argv[2]):
    options = {"momentum": momentum, "unbiased_variance": unbiased}
    symbol = build(case, options)(mx.sym.var("data"))
    executor = symbol.simple_bind(device, data=(8, 4, 6, 6))
    stream = np.random.default_rng(1)
    for name, value in [*sorted(executor.arg_dict.items()), *sorted(executor.aux_dict.items())]:
        drawn = np.abs(stream.normal(size=value.shape)) * 0.3
        value[:] = mx.nd.array(np.zeros(value.shape) if name.endswith("batches") else drawn)
    for step in range(3):
        x, head = (mx.nd.array(stream.normal(size=(8, 4, 6, 6)), ctx=device) for _ in range(2))
        y = executor.forward(is_train=step != 1, data=x)[0]
        record[f"{case} {momentum} {step} y"] = y.asnumpy().tolist()
        if step != 1:
            executor.backward(head)
        mx.nd.waitall()
        for kind, group in (("grad", executor.grad_dict), ("aux", executor.aux_dict)):
            for name, value in group.items():
                record[f"{case} {momentum} {step} {kind} {name}"] = value.asnumpy().tolist()
print(json.dumps(record))
"""
MIRROR_CASES = [
    (case, *options)
    for case in ("net", "chain", "siamese")
    for options in ((0.9, False), (None, True))
]


@pytest.fixture(scope="module")
def mirror_runs(device):
    """What each case computes without mirroring and with it, in a process each."""
    programs = [MIRROR_PROGRAM, device, json.dumps(MIRROR_CASES)]
    return [
        last_json(run_python(*programs, env={"MXNET_BACKWARD_DO_MIRROR": mirror}))
        for mirror in "01"
    ]


@pytest.mark.parametrize("case", MIRROR_CASES, ids=str)
def test_mirroring_does_not_move_statistics_again(mirror_runs, case):
    """`MXNET_BACKWARD_DO_MIRROR=1` makes executors of symbols recompute forward operators.

    Gluon's own graphs do not look at the variable in MXNet 1.9.1; a `Module` or `simple_bind` does.
    """
    label = f"{case[0]} {case[1]} "
    plain, mirrored = ({k: v for k, v in run.items() if k.startswith(label)} for run in mirror_runs)
    assert plain.keys() == mirrored.keys()
    assert sum("aux" in name for name in plain) >= 6
    for name, value in plain.items():
        np.testing.assert_allclose(mirrored[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


GLUON_MIRROR_PROGRAM = """
import sys, json, tempfile
import numpy as np, scratchbn, mxnet as mx
from pathlib import Path
from helpers import MODES, build_subject, check_step, take_step

kind, _, index = sys.argv[1].partition("(")
device = mx.Context(kind, int(index.rstrip(")")))
rng, shape = np.random.default_rng(3), (6, 3, 4, 5)
for mode in MODES:
    with tempfile.TemporaryDirectory() as folder:
        subject = build_subject(mode, shape, rng=rng, device=device, directory=Path(folder))
    for training in (True, False, True, True):
        x, dy = rng.normal(size=shape), rng.normal(size=shape)
        step = (subject.oracle.train_step if training else subject.oracle.infer_step)(x, dy)
        check_step(take_step(subject, x, dy, record_train=training), step)
        subject.check_statistics(rtol=1e-12)
print(json.dumps("all modes"))
"""


def test_every_mode_with_mirroring_switched_on(device):
    process = run_python(GLUON_MIRROR_PROGRAM, device, env={"MXNET_BACKWARD_DO_MIRROR": "1"})
    assert last_json(process) == "all modes"


# Several layers on one array: MXNet merges what they have in common


class Siblings(HybridBlock):
    """Sums what several norm layers make of one array."""

    def __init__(self, norm, count):
        super().__init__()
        for k in range(count):
            self.register_child(norm(in_channels=3), f"norm{k}")

    def hybrid_forward(self, F, x):
        return F.add_n(*(F.tanh(norm(x)) for norm in self._children.values()))


@pytest.mark.parametrize("count", [2, 3, 12])
@pytest.mark.parametrize("static", [False, True])
def test_layers_that_share_their_data(device, rng, count, static):
    x, dy = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    gradients = []
    for norm in (nn.BatchNorm, ScratchBatchNorm):
        net = Siblings(norm, count)
        net.initialize(ctx=device)
        net.cast("float64")
        for k, layer in enumerate(net._children.values()):
            layer.gamma.set_data(mx.nd.array([1 + k, 2, 3], dtype="float64"))
        net.hybridize(static_alloc=static, static_shape=static)
        data = array(x, device)
        y = forward_backward(net, data, array(dy, device))
        per_layer = [layer.gamma.grad().asnumpy() for layer in net._children.values()]
        gradients.append((y.asnumpy(), data.grad.asnumpy(), *per_layer))
    for built_in, ours in zip(*gradients):
        np.testing.assert_allclose(ours, built_in, rtol=1e-9, atol=1e-10)
