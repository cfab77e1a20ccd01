"""Keywords of other layers, and a first argument that was meant for another: errors that advise."""

import inspect
import re

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, ScratchSyncBatchNorm, use_backend
from scratchbn.masked import MaskedBatchNorm
from scratchbn.variants import BatchRenorm, GhostBatchNorm

import mxnet as mx
import pytest
from mxnet.gluon import contrib, nn

LAYERS = [
    (ScratchBatchNorm,),
    (ScratchBatchNormReLU,),
    (MaskedBatchNorm,),
    (BatchRenorm,),
    (GhostBatchNorm, 2),
    (ScratchSyncBatchNorm,),
]


@pytest.mark.parametrize("layer", LAYERS[:-1])
@pytest.mark.parametrize("name", ["num_devices", "ndev", "key"])
def test_keywords_of_the_synchronized_layer_name_it(layer, name):
    cls, *arguments = layer
    text = rf"{cls.__name__} has no argument {name}=4: .*ScratchSyncBatchNorm, .* takes it"
    with pytest.raises(TypeError, match=text):
        cls(*arguments, **{name: 4})


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("eps", "write epsilon;"),
        ("fix_gamma", "write scale, "),
        ("num_features", "write in_channels;"),
        ("momemtum", "write momentum;"),
        ("cudnn_off", ".*leave it out;"),
        ("zzz", "the arguments of "),
    ],
)
def test_unknown_keywords_are_answered(layer, name, advice):
    cls, *arguments = layer
    with pytest.raises(TypeError, match=f"has no argument {name}=1: {advice}") as caught:
        cls(*arguments, **{name: 1})
    listed = re.search(r"the arguments of \w+ are (.*)", str(caught.value))[1].split(", ")
    taken = {**inspect.signature(ScratchBatchNorm).parameters, **inspect.signature(cls).parameters}
    wanted = {n for n, p in taken.items() if p.kind is not p.VAR_KEYWORD}
    assert set(listed) == wanted
    assert len(listed) == len(wanted)


def test_a_misspelt_number_of_devices():
    with pytest.raises(TypeError, match=r"has no argument ndev=2: write num_devices;"):
        ScratchSyncBatchNorm(ndev=2)


@pytest.mark.parametrize("theirs", [nn.BatchNorm, contrib.nn.SyncBatchNorm])
def test_every_argument_of_the_builtin_is_taken(theirs):
    cls = ScratchSyncBatchNorm if theirs is contrib.nn.SyncBatchNorm else ScratchBatchNorm
    parameters = inspect.signature(theirs.__init__).parameters.values()
    named = {p.name: p.default for p in parameters if p.default is not p.empty}
    cls(**named)


@pytest.mark.parametrize("backend", ["portable", "native"])
@pytest.mark.parametrize("form", ["eager", "hybrid", "nested"])
@pytest.mark.parametrize("channels", [5, 64])
def test_channels_in_the_place_of_the_axis(form, channels, backend):
    norm, net = ScratchBatchNorm(channels), nn.HybridSequential()
    net.add(nn.Conv2D(4, 1), norm)
    net.initialize()
    if form != "eager":
        (norm if form == "hybrid" else net).hybridize()
    text = rf"axis={channels} is out of range for data of shape \(2, 4, 3, 3\): in_channels="
    with use_backend(backend), pytest.raises(ValueError, match=text):
        net(mx.nd.ones((2, 3, 3, 3)))


def test_an_axis_that_is_merely_wrong_is_not_taken_for_channels():
    layer = ScratchBatchNorm(2)
    layer.initialize()
    with pytest.raises(ValueError, match=r"axis=2 is out of range for data of shape \(3, 4\)$"):
        layer(mx.nd.ones((3, 4)))


def test_data_of_a_high_rank():
    layer = ScratchBatchNorm(5)
    layer.initialize()
    layer.hybridize()
    assert layer(mx.nd.ones((2, 1, 1, 1, 1, 3))).shape == (2, 1, 1, 1, 1, 3)
