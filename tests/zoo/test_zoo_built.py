"""GluonCV's nets built by models.zoo with our layer, beside the built-in."""

import json

from scratchbn import ScratchBatchNorm
from scratchbn._hidden import hidden_norms
from scratchbn._net import BATCH_NORM_OPERATORS, blocks_of, graph_of

import pytest
from mxnet.gluon import SymbolBlock, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm
from mxnet.gluon.nn.basic_layers import _BatchNorm
from zoo_nets import (
    REQUIRED,
    batch_norm_nodes,
    check_inference,
    check_step,
    infer_float32,
    initialize,
    initialized,
    layers_of,
    of,
    restore,
    training_step,
    values,
)

from models import zoo

pytest.importorskip("gluoncv")
pytestmark = pytest.mark.filterwarnings("ignore:.*is already initialized, ignoring:UserWarning")


@of(REQUIRED)
def test_built_with_our_layer_it_trains_and_infers_like_with_the_built_in(case, device, rng):
    x = rng.normal(size=case.shape)
    theirs = initialized(case, device, x)
    ours = case.build(ScratchBatchNorm)
    assert len(layers_of(ours, ScratchBatchNorm)) == case.layers
    assert not layers_of(ours, _BatchNorm)
    initialize(ours, device)
    ours.cast("float64")
    restore(ours, values(theirs))
    assert batch_norm_nodes(ours) == []
    assert len(batch_norm_nodes(theirs)) == case.layers

    check_step(training_step(ours, x, device), training_step(theirs, x, device))
    restore(ours, values(theirs))
    check_inference(infer_float32(ours, x, device), infer_float32(theirs, x, device))


def test_options_reach_the_layers():
    net = zoo.get_model("cifar_resnet20_v1", norm_kwargs={"momentum": None, "epsilon": 1e-3})
    options = [layer._kwargs for layer in layers_of(net, ScratchBatchNorm)]
    assert len(options) == 21
    assert {(o["momentum"], o["eps"]) for o in options} == {(None, 1e-3)}


def test_any_norm_layer_can_be_asked_for():
    options = {"num_devices": 1}
    net = zoo.get_model("cifar_resnet20_v1", norm_layer=SyncBatchNorm, norm_kwargs=options)
    assert len(layers_of(net, SyncBatchNorm)) == 21


def test_a_net_with_the_built_in_is_the_one_of_the_zoo():
    net = zoo.get_model("center_net_mobilenetv3_small_duc_voc", norm_layer=nn.BatchNorm)
    assert len(layers_of(net, nn.BatchNorm)) == 37


@pytest.mark.parametrize(
    ("name", "layers"),
    [("center_net_mobilenetv3_small_duc_voc", 37), ("alpha_pose_resnet101_v1b_coco", 106)],
    ids=["not asked for", "asked for by the net itself"],
)
def test_a_net_that_supports_the_built_in_only_is_converted(name, layers):
    net = zoo.get_model(name)
    assert len(layers_of(net, ScratchBatchNorm)) == layers
    assert not layers_of(net, _BatchNorm)


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("resnet1", {}, ValueError, "name must be one of .* got 'resnet1'"),
        (18, {}, ValueError, "name must be one of .* got 18"),
        ("vgg11_bn", {"norm_layer": "ours"}, TypeError, "norm_layer must be .* got 'ours'"),
        ("vgg11_bn", {"norm_kwargs": {"epsilon": 1e-3}}, ValueError, "norm_kwargs=.*epsilon"),
        ("vgg11_bn", {"norm_layer": SyncBatchNorm}, ValueError, "norm_layer=.*SyncBatchNorm"),
        ("center_net_resnet18_v1b_voc", {"norm_kwargs": {"scale": False}}, ValueError, "scale"),
        ("resnet18_v1b_0.89", {"norm_kwargs": {"momentum": None}}, ValueError, "norm_kwargs=.*"),
        ("resnet18_v1", {"layers": 3}, TypeError, "layers"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, error, text):
    with pytest.raises(error, match=text):
        zoo.get_model(name, **options)


def test_norms_that_are_nodes_of_a_graph_are_ours_too():
    """The backbone of these detectors is a SymbolBlock."""
    blocks = blocks_of(zoo.get_model("ssd_300_mobilenet0.25_voc"))
    assert len(hidden_norms(blocks)) >= 20
    graphs = [graph_of(block).tojson() for block in blocks if isinstance(block, SymbolBlock)]
    operators = {node["op"] for graph in graphs for node in json.loads(graph)["nodes"]}
    assert "sgd_mom_update" in operators
    assert not operators & BATCH_NORM_OPERATORS
