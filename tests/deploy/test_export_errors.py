"""Inference export that fails: the error says why, and no file is left behind or damaged."""

import os

from scratchbn import ScratchBatchNorm
from scratchbn.deploy import export_inference

import mxnet as mx
import numpy as np
import pytest
from inference_files import EXACT, difference, load, prepared, sequential
from mxnet.gluon import Block, nn


def ready(rng=None):
    net = sequential(nn.Dense(4, in_units=3), ScratchBatchNorm(in_channels=4))
    net.initialize()
    return net


@pytest.mark.parametrize(
    "arguments, options, error, match",
    [
        ([mx.nd.ones((2, 3))], {"style": "fast"}, ValueError, "style must be one of .*got 'fast'"),
        (
            [mx.nd.ones((2, 3))],
            {"epoch": -1},
            ValueError,
            "epoch must be between 0 and 9999, got -1",
        ),
        ([mx.nd.ones((2, 3))], {"epoch": 1.5}, TypeError, "epoch must be an integer, got 1.5"),
        ([], {}, ValueError, "example_inputs must have the inputs the net takes, got none"),
        ([np.ones((2, 3))], {}, TypeError, "must be NDArrays.*, got numpy.ndarray$"),
        ([[mx.nd.ones((2, 3)), "x"]], {}, TypeError, "must be NDArrays.*, got builtins.str$"),
        ([None], {}, TypeError, "example_inputs must be NDArrays"),
        ([mx.nd.ones((2, 7))], {}, ValueError, "do not match the symbol.*dense"),
        ([mx.nd.ones((2, 3))] * 2, {}, ValueError, "HybridSequential cannot be traced"),
    ],
)
def test_bad_arguments(arguments, options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        export_inference(ready(), tmp_path / "net", *arguments, **options)
    assert os.listdir(tmp_path) == []


def test_a_prefix_that_was_left_out():
    with pytest.raises(TypeError, match="prefix must be a str or a path, got NDArray"):
        export_inference(ready(), mx.nd.ones((2, 3)))


def test_bad_net(tmp_path):
    x = mx.nd.ones((2, 3))
    with pytest.raises(TypeError, match="net must be a gluon Block, got str"):
        export_inference("net", tmp_path / "net", x)
    for net in (sequential(nn.Dense(4, in_units=3)), sequential(nn.Dense(4))):
        with pytest.raises(ValueError, match=r"dense.*_weight' has no value yet"):
            export_inference(net, tmp_path / "net", x)
        net.initialize()
    with pytest.raises(ValueError, match="channels"):
        net = ScratchBatchNorm(in_channels=4)
        net.initialize()
        export_inference(net, tmp_path / "net", x)
    with pytest.raises(ValueError, match=r"axis=5 of 'batchnorm.*' is out of range.*2 axes"):
        net = ScratchBatchNorm(in_channels=3, axis=5)
        net.initialize()
        export_inference(net, tmp_path / "net", x)


def test_an_error_leaves_hooks_and_files_alone(rng, tmp_path):
    class Python(Block):
        def forward(self, x):
            return mx.nd.array(x.asnumpy())

    net = nn.Sequential()
    net.add(nn.Dense(4), Python())
    net[0].register_forward_hook(lambda *_: None)
    _, x = prepared(net, rng, (2, 4))
    with pytest.raises(ValueError, match="Sequential cannot be traced"):
        export_inference(net, tmp_path / "net", x)
    assert len(net[0]._forward_hooks) == 1
    assert os.listdir(tmp_path) == []


def test_files_are_replaced_both_or_none(rng, tmp_path, monkeypatch):
    net, x = ready(), mx.nd.ones((2, 3))
    with pytest.raises(FileNotFoundError, match=r"the directory of .* does not exist"):
        export_inference(net, tmp_path / "nowhere" / "net", x)

    old = tmp_path / "net-symbol.json"
    blocked = tmp_path / "net-0000.params"
    blocked.mkdir()
    with pytest.raises(OSError, match=r"net-0000.params"):
        export_inference(net, tmp_path / "net", x)
    assert os.listdir(tmp_path) == [blocked.name]
    old.write_text("precious")
    with pytest.raises(OSError, match=r"net-0000.params"):
        export_inference(net, tmp_path / "net", x)
    assert sorted(os.listdir(tmp_path)) == sorted([blocked.name, old.name])
    assert old.read_text() == "precious"

    blocked.rmdir()
    blocked.write_text("precious too")

    def full(file, data):
        raise mx.MXNetError("Check failed: no space left on device")

    monkeypatch.setattr(mx.nd, "save", full)
    with pytest.raises(OSError, match=r"net-0000.params.*no space left on device"):
        export_inference(net, tmp_path / "net", x)
    assert (old.read_text(), blocked.read_text()) == ("precious", "precious too")
    monkeypatch.undo()
    export_inference(net, tmp_path / "net", x)
    assert difference(net(x) + 1, load(tmp_path / "net")(x) + 1) < EXACT
    assert len(os.listdir(tmp_path)) == 2
