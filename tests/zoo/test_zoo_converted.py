"""GluonCV's nets converted to our layer and back, beside the built-in."""

from scratchbn import ScratchBatchNorm, freeze, to_builtin, to_scratch, unfreeze

import numpy as np
import pytest
from helpers import array, untrained
from mxnet import autograd
from mxnet.gluon import nn
from mxnet.gluon.nn.basic_layers import _BatchNorm
from zoo_nets import (
    IMAGE,
    REQUIRED,
    Case,
    batch_norm_nodes,
    blocks,
    check_inference,
    check_step,
    infer_float32,
    initialized,
    layers_of,
    of,
    restore,
    training_step,
    values,
)

from models import zoo

gluoncv = pytest.importorskip("gluoncv")
pytestmark = pytest.mark.filterwarnings("ignore:.*is already initialized, ignoring:UserWarning")

THERE_AND_BACK = [
    *REQUIRED[:3],
    *REQUIRED[4:6],
    Case("resnet18_v2", IMAGE, 19),
    Case("resnet18_v1b", IMAGE, 20),
    Case("resnet18_v1b_0.89", IMAGE, 20),
    Case("mobilenetv3_small", (4, 3, 64, 64), 34),
    Case("shufflenet_v1", (4, 3, 64, 64), 48),
    Case("cifar_resnext29_32x4d", (2, 3, 16, 16), 31),
    Case("cifar_residualattentionnet56", (1, 3, 32, 32), 89),
    Case("resnest14", IMAGE, 23),
    Case("dla34", IMAGE, 37),
    Case("hrnet_w18_small_v1_c", IMAGE, 91),
    Case("simple_pose_resnet18_v1b", IMAGE, 23),
    Case("mobile_pose_mobilenet1.0", IMAGE, 30),
]


def structure(net):
    """What must survive a round trip: classes, options, flags and names of all blocks."""
    return [
        (
            type(block),
            block.prefix,
            dict(getattr(block, "_kwargs", {})),
            block._active,
            list(block._flags),
            sorted(vars(block)),
            {name: (id(p), p.grad_req) for name, p in block._reg_params.items()},
        )
        for block in blocks(net)
    ]


@of(THERE_AND_BACK)
def test_converts_there_and_back(case, device, rng):
    x = rng.normal(size=case.shape)
    net = initialized(case, device, x)
    net.hybridize(False)
    before, stored = structure(net), values(net)
    built_in = training_step(net, x, device)
    parameters = list(net.collect_params().values())
    net.hybridize(False)
    assert structure(net) == before

    restore(net, stored)
    same, report = to_scratch(net, report=True)
    assert same is net
    assert (len(report.converted), report.skipped, report.notes) == (case.layers, (), ())
    assert batch_norm_nodes(net) == []
    check_step(training_step(net, x, device), built_in)
    ours = infer_float32(net, x, device)

    net.hybridize(False)
    _, report = to_builtin(net, report=True)
    assert (len(report.converted), report.skipped, report.notes) == (case.layers, (), ())
    assert structure(net) == before
    assert all(a is b for a, b in zip(net.collect_params().values(), parameters))
    check_inference(ours, infer_float32(net, x, device))

    net.cast("float64")
    restore(net, stored)
    check_step(training_step(net, x, device), built_in)
    assert len(batch_norm_nodes(net)) == case.layers


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vgg11_bn", 8),
        ("yolo3_mobilenet0.25_voc", 47),
        ("faster_rcnn_resnet50_v1b_voc", 53),
        ("mask_rcnn_resnet18_v1b_coco", 20),
        ("fcn_resnet50_voc", 57),
        ("deeplab_resnet50_ade", 63),
        ("inceptionv3", 94),
        ("xception", 132),
        ("nasnet_4_1056", 194),
        ("siamrpn_alexnet_v2_otb15", 11),
    ],
)
def test_a_net_that_is_not_initialized_converts_there_and_back(name, layers):
    net = zoo.get_model(name, norm_layer=nn.BatchNorm)
    before, parameters = structure(net), list(net.collect_params().values())
    _, report = to_scratch(net, report=True)
    assert (len(report.converted), report.skipped) == (layers, ())
    assert len(layers_of(net, ScratchBatchNorm)) == layers
    assert not layers_of(net, _BatchNorm)
    _, report = to_builtin(net, report=True)
    assert (len(report.converted), report.skipped) == (layers, ())
    assert structure(net) == before
    assert all(a is b for a, b in zip(net.collect_params().values(), parameters))


def test_batch_normalization_in_a_symbol_block_is_converted(device):
    """The features of this detector are one graph; only its own layers are blocks."""
    net = gluoncv.model_zoo.get_model("ssd_300_mobilenet0.25_voc", pretrained_base=False)
    parameters = list(net.collect_params().values())
    for convert in (to_scratch, to_builtin, to_scratch):
        _, report = convert(net, report=True)
        assert (len(report.converted), report.skipped) == (35, ())
        assert all(entry.path.startswith("features.") for entry in report.converted)
    assert len(freeze(net, report=True)[1]) == 35
    assert all(a is b for a, b in zip(net.collect_params().values(), parameters))


def test_gluoncv_layer_without_cudnn_comes_back_as_itself(device, rng):
    layer = gluoncv.nn.block.BatchNormCudnnOff(in_channels=3, epsilon=1e-3)
    layer.initialize(ctx=device)
    x = array(rng.normal(size=(4, 3, 5)), device, "float32")
    with autograd.train_mode():
        expected = layer(x).asnumpy()
    _, report = to_scratch(layer, report=True)
    assert type(layer) is ScratchBatchNorm
    assert [entry.kind for entry in report.converted] == ["BatchNormCudnnOff"]
    with autograd.train_mode():
        np.testing.assert_allclose(layer(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)
    to_builtin(layer)
    assert type(layer) is gluoncv.nn.block.BatchNormCudnnOff


@pytest.mark.values
def test_a_net_built_to_use_global_statistics_does_so_after_unfreeze(device, rng):
    net = zoo.get_model("cifar_resnet20_v1", norm_kwargs={"use_global_stats": True})
    net.initialize(ctx=device)
    x = array(rng.normal(size=(2, 3, 16, 16)), device, "float32")
    with autograd.train_mode():
        first = net(x).asnumpy()
    net.hybridize()
    with untrained():
        assert len(freeze(net, parameters=True, report=True)[1]) == 21
    to_builtin(net)
    assert len(unfreeze(net, report=True)[1]) == 21
    assert all(layer._kwargs["use_global_stats"] for layer in layers_of(net, nn.BatchNorm))
    assert all(layer.gamma.grad_req == "write" for layer in layers_of(net, nn.BatchNorm))
    with autograd.train_mode():
        np.testing.assert_allclose(net(x).asnumpy(), first, rtol=1e-5, atol=1e-5)
