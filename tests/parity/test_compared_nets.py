"""What a comparison leaves of the nets, and the arguments that it refuses."""

from scratchbn import ScratchBatchNorm
from scratchbn.parity import compare

import mxnet as mx
import numpy as np
import pytest
from compared_layers import SHAPE, Stuck
from mxnet import autograd, gluon
from mxnet.gluon import nn

from models.lenet import initialize, lenet


def state(net):
    """Everything observable about a net: arrays by identity and by value."""
    found = {}
    for name, p in net._collect_params_with_prefix().items():
        arrays = p.list_data() if p._data is not None else []
        gradients = p.list_grad() if p.grad_req != "null" and arrays else []
        found[name] = (
            [id(v) for v in arrays + gradients],
            [v.asnumpy().tobytes() for v in arrays + gradients],
            (p.grad_req, str(p.dtype), p.shape, bool(p._deferred_init), p._trainer),
        )
    blocks = []
    net.apply(
        lambda b: blocks.append(
            {
                name: dict(v) if name == "_kwargs" else v
                for name, v in vars(b).items()
                if name not in ("_children", "_reg_params")
            }
        )
    )
    return found, blocks


@pytest.mark.filterwarnings("ignore:.*still having forward hook:UserWarning")
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("reference", [nn.BatchNorm, Stuck])
def test_the_nets_are_untouched(rng, fail, reference):
    data = rng.normal(size=(4, 1, 28, 28))
    nets = [lenet(), lenet(reference)]
    trainers = []
    for net in nets:
        initialize(net)
        net.hybridize(static_alloc=True)
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
        with autograd.record():
            loss = net(mx.nd.array(data)).sum()
        loss.backward()
        trainer.step(4)
        trainers.append(trainer)
    nets[0].collect_params(".*weight").setattr("grad_req", "add")
    mx.nd.waitall()
    if fail:
        calls = iter(range(100))

        def interrupt(block, inputs):
            if next(calls) == 5:
                raise RuntimeError("halfway")

        nets[1][3].register_forward_pre_hook(interrupt)
    before = [state(net) for net in nets]
    if fail:
        with pytest.raises(RuntimeError, match="halfway"):
            compare(*nets, data, modes=("eager", "hybrid"))
    else:
        assert bool(compare(*nets, data, steps=1)) is (reference is nn.BatchNorm)
    assert [state(net) for net in nets] == before
    for net, trainer in zip(nets, trainers):  # and they go on training
        net.collect_params().zero_grad()
        with autograd.record():
            loss = net(mx.nd.array(data)).sum()
        loss.backward()
        trainer.step(4)
        mx.nd.waitall()
        assert all(np.isfinite(p.data().asnumpy()).all() for p in net.collect_params().values())


def test_a_deferred_net_stays_deferred(x):
    layer, other = ScratchBatchNorm(), nn.BatchNorm()
    other.initialize()
    before = [state(net) for net in (layer, other)]
    assert compare(layer, other, x)
    assert [state(net) for net in (layer, other)] == before
    assert other(mx.nd.array(x)).shape == SHAPE


def test_it_may_be_called_while_recording(x):
    weight = mx.nd.ones((1,))
    weight.attach_grad()
    with autograd.record():
        y = 2 * weight
        assert compare(ScratchBatchNorm(), nn.BatchNorm(), x, steps=1)
    y.backward()
    assert weight.grad.asscalar() == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": "net"}, TypeError, "a must be a gluon Block, got 'net'"),
        ({"b": None}, TypeError, "b must be a gluon Block, got None"),
        ({"inputs": [[1, 2]]}, TypeError, "inputs must be an array"),
        ({"inputs": []}, ValueError, "inputs must hold at least one array"),
        ({"inputs": ()}, ValueError, "inputs must hold at least one array"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"train": 1}, TypeError, "train must be True or False, got 1"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float64, float32, float16"),
        ({"rtol": -1}, ValueError, "rtol must be finite and not negative, got -1"),
        ({"statistics_atol": "1"}, TypeError, "statistics_atol must be a number, got '1'"),
        ({"learning_rate": np.nan}, ValueError, "learning_rate must be finite"),
        ({"loss": "mse"}, TypeError, "loss must be callable, got 'mse'"),
        ({"modes": ()}, ValueError, "modes must be a sequence of eager, hybrid, static"),
        ({"modes": "eager"}, ValueError, "modes must be a sequence of eager, hybrid, static"),
        ({"modes": ("fast",)}, ValueError, "modes must be a sequence of eager, hybrid, static"),
        ({"b": nn.Dense(3)}, ValueError, "but only a has 'beta'"),
        ({"b": ScratchBatchNorm(momentum=None)}, ValueError, "but only b has 'num_batches'"),
        (
            {"a": nn.BatchNorm(in_channels=4), "b": nn.BatchNorm(in_channels=5)},
            ValueError,
            r"'(beta|gamma)' has shape \(4,\) in a and \(5,\) in b",
        ),
    ],
)
def test_bad_arguments(x, change, error, message):
    arguments = {"a": ScratchBatchNorm(), "b": nn.BatchNorm(), "inputs": x, **change}
    with pytest.raises(error, match=message):
        compare(**arguments)
