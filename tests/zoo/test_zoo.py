"""GluonCV's nets with our layer, passed to them or converted, beside the built-in."""

import json
from dataclasses import dataclass, field

from scratchbn import ScratchBatchNorm, freeze, to_builtin, to_scratch, unfreeze
from scratchbn._hidden import hidden_norms
from scratchbn._net import BATCH_NORM_OPERATORS, blocks_of, graph_of

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm
from mxnet.gluon.nn.basic_layers import _BatchNorm

from models import zoo

gluoncv = pytest.importorskip("gluoncv")
pytestmark = pytest.mark.filterwarnings("ignore:.*is already initialized, ignoring:UserWarning")

IMAGE = (2, 3, 64, 64)
FASTSCNN = {"base_size": 128, "crop_size": 128, "height": 128, "width": 128}


@dataclass
class Case:
    """A net, the shape of its input, the options it is built with and how many layers it has."""

    name: str
    shape: tuple
    layers: int
    options: dict = field(default_factory=dict)

    def build(self, norm_layer):
        net = zoo.get_model(self.name, norm_layer=norm_layer, **self.options)
        net.apply(adapt)
        return net


REQUIRED = [
    Case("cifar_resnet20_v1", (4, 3, 16, 16), 21),
    Case("cifar_resnet20_v2", (4, 3, 16, 16), 20),
    Case("resnet18_v1", IMAGE, 20),
    Case("resnet50_v1b", IMAGE, 53),
    Case("mobilenet0.5", IMAGE, 27),
    Case("mobilenetv2_0.25", (4, 3, 64, 64), 52),
    Case("densenet121", IMAGE, 121),
    Case("squeezenet1.0", IMAGE, 0),
    Case("se_resnet18_v1", IMAGE, 20),
    Case("fastscnn_citys", (4, 3, 128, 128), 45, FASTSCNN),
    Case("center_net_resnet18_v1b_voc", (1, 3, 64, 64), 26),
]
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


def of(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def adapt(block):
    """Prepare a net for comparisons: no random numbers, and images smaller than it was made for."""
    if isinstance(block, nn.Dropout):
        block._rate = 0
    if isinstance(block, nn.AvgPool2D) and block._kwargs["kernel"] in ((7, 7), (13, 13)):
        block._kwargs["kernel"] = (2, 2)


def blocks(net):
    found = []
    net.apply(found.append)
    return found


def layers_of(net, kind):
    return [block for block in dict.fromkeys(blocks(net)) if isinstance(block, kind)]


def flat(outputs):
    if isinstance(outputs, (list, tuple)):
        return [one for output in outputs for one in flat(output)]
    return [outputs]


def batch_norm_nodes(net):
    graph = mx.sym.Group(flat(net(mx.sym.var("data"))))
    operators = [node["op"] for node in json.loads(graph.tojson())["nodes"]]
    assert len(operators) > 10
    return [operator for operator in operators if "norm" in operator.lower()]


def values(net):
    mx.nd.waitall()
    return {n: p.data().asnumpy() for n, p in net._collect_params_with_prefix().items()}


def restore(net, stored):
    """Set values; a Parameter whose shape is not known yet learns it."""
    for name, parameter in net._collect_params_with_prefix().items():
        parameter.set_data(mx.nd.array(stored[name], dtype=parameter.dtype))


def training_step(net, x, device):
    """Outputs, gradients and statistics of a training step on float64, hybridized."""
    net.hybridize()
    data = array(x, device)
    data.attach_grad()
    with autograd.record():
        outputs = flat(net(data))
    stream = np.random.default_rng(7)
    heads = [array(stream.normal(size=output.shape), device) for output in outputs]
    autograd.backward(outputs, heads)
    parameters = net._collect_params_with_prefix()
    gradients = {n: p.grad().asnumpy() for n, p in parameters.items() if p.grad_req != "null"}
    gradients["data"] = data.grad.asnumpy()
    stored = {n: value for n, value in values(net).items() if "running" in n}
    return [output.asnumpy() for output in outputs], gradients, stored


def check_step(actual, expected):
    outputs, gradients, statistics = actual
    assert len(outputs) == len(expected[0])
    for a, e in zip(outputs, expected[0]):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-12 * np.abs(e).max())
    assert gradients.keys() == expected[1].keys()
    # A gradient that is 0 by symmetry is rounding noise: what counts is its share of the step.
    scale = max(np.abs(gradient).max() for gradient in expected[1].values())
    for name, gradient in gradients.items():
        close = {"rtol": 0, "atol": 1e-11 * scale}
        np.testing.assert_allclose(gradient, expected[1][name], err_msg=name, **close)
    for name, statistic in statistics.items():
        # The built-in rounds its momentum to float32, in float64 too.
        close = {"rtol": 1e-6, "atol": 1e-12}
        np.testing.assert_allclose(statistic, expected[2][name], err_msg=name, **close)


def infer_float32(net, x, device):
    net.cast("float32")
    net.hybridize()
    return [output.asnumpy() for output in flat(net(array(x, device, "float32")))]


def check_inference(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert np.isfinite(e).all()
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-6 * max(1, np.abs(e).max()))


def initialized(case, device, x, norm_layer=nn.BatchNorm):
    net = case.build(norm_layer)
    net.initialize(mx.init.Xavier(magnitude=2), ctx=device)
    net.cast("float64")
    net(array(x, device))
    return net


# Built with our layer


@of(REQUIRED)
def test_built_with_our_layer_it_trains_and_infers_like_with_the_built_in(case, device, rng):
    x = rng.normal(size=case.shape)
    theirs = initialized(case, device, x)
    ours = case.build(ScratchBatchNorm)
    assert len(layers_of(ours, ScratchBatchNorm)) == case.layers
    assert not layers_of(ours, _BatchNorm)
    ours.initialize(ctx=device)
    ours.cast("float64")
    restore(ours, values(theirs))
    assert batch_norm_nodes(ours) == []
    assert len(batch_norm_nodes(theirs)) == case.layers

    check_step(training_step(ours, x, device), training_step(theirs, x, device))
    restore(ours, values(theirs))
    check_inference(infer_float32(ours, x, device), infer_float32(theirs, x, device))


# Converted


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


def test_a_net_built_to_use_global_statistics_does_so_after_unfreeze(device, rng):
    net = zoo.get_model("cifar_resnet20_v1", norm_kwargs={"use_global_stats": True})
    net.initialize(ctx=device)
    x = array(rng.normal(size=(2, 3, 16, 16)), device, "float32")
    with autograd.train_mode():
        first = net(x).asnumpy()
    net.hybridize()
    assert len(freeze(net, parameters=True, report=True)[1]) == 21
    to_builtin(net)
    assert len(unfreeze(net, report=True)[1]) == 21
    assert all(layer._kwargs["use_global_stats"] for layer in layers_of(net, nn.BatchNorm))
    assert all(layer.gamma.grad_req == "write" for layer in layers_of(net, nn.BatchNorm))
    with autograd.train_mode():
        np.testing.assert_allclose(net(x).asnumpy(), first, rtol=1e-5, atol=1e-5)


# Files


def check_output(net, x, expected):
    np.testing.assert_allclose(net(x).asnumpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def twins(device, rng):
    """A net of each kind with statistics that training has moved, and one input."""
    x = array(rng.normal(size=(4, 3, 16, 16)), device, "float32")
    nets = {}
    for norm_layer in (nn.BatchNorm, ScratchBatchNorm):
        net = zoo.get_model("cifar_resnet20_v1", norm_layer=norm_layer, prefix="cifar_")
        net.initialize(mx.init.Xavier(magnitude=2), ctx=device)
        with autograd.train_mode():
            net(x)
        mx.nd.waitall()
        nets[norm_layer] = net
    return nets, x


@pytest.fixture(params=["to ours", "to the built-in"])
def way(request, twins):
    nets, x = twins
    kinds = [nn.BatchNorm, ScratchBatchNorm]
    source, target = kinds if request.param == "to ours" else kinds[::-1]
    return nets[source], nets[target], x


@pytest.mark.parametrize("deduplicate", [False, True])
def test_save_parameters_interchanges(way, device, tmp_path, deduplicate):
    source, target, x = way
    file = str(tmp_path / "net.params")
    source.save_parameters(file, deduplicate=deduplicate)
    target.load_parameters(file, ctx=device)
    check_output(target, x, source(x).asnumpy())


def test_collect_params_save_interchanges(way, device, tmp_path):
    source, target, x = way
    file = str(tmp_path / "net.params")
    source.collect_params().save(file, strip_prefix=source.prefix)
    target.collect_params().load(file, ctx=device, restore_prefix=target.prefix)
    check_output(target, x, source(x).asnumpy())


def test_collect_params_file_loads_with_load_parameters(way, device, tmp_path):
    """The form of GluonCV's older files: names without dots."""
    source, target, x = way
    file = str(tmp_path / "net.params")
    source.collect_params().save(file, strip_prefix=source.prefix)
    target.load_parameters(file, ctx=device)
    check_output(target, x, source(x).asnumpy())


def test_exported_parameters_interchange(way, device, tmp_path):
    source, target, x = way
    source.hybridize()
    expected = source(x).asnumpy()
    source.export(str(tmp_path / "net"))
    target.collect_params().load(str(tmp_path / "net-0000.params"), ctx=device)
    check_output(target, x, expected)


def test_exported_parameters_fit_the_other_symbol(way, device, tmp_path):
    source, target, x = way
    for name, net in (("source", source), ("target", target)):
        net.hybridize()
        net(x)
        net.export(str(tmp_path / name))
    mixed = SymbolBlock.imports(
        str(tmp_path / "target-symbol.json"),
        ["data"],
        str(tmp_path / "source-0000.params"),
        ctx=device,
    )
    check_output(mixed, x, source(x).asnumpy())


def test_a_file_saved_before_a_conversion_loads_after_it(way, device, tmp_path):
    source, _, x = way
    source.save_parameters(str(tmp_path / "before.params"))
    converted = to_scratch if isinstance(source.features[1], nn.BatchNorm) else to_builtin
    expected = source(x).asnumpy()
    converted(source)
    source.load_parameters(str(tmp_path / "before.params"), ctx=device)
    check_output(source, x, expected)
    source.save_parameters(str(tmp_path / "after.params"))
    a, b = (mx.nd.load(str(tmp_path / f"{name}.params")) for name in ("before", "after"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].asnumpy(), b[name].asnumpy())


def test_gluoncv_exports_a_net_with_our_layer(twins, device, tmp_path, rng):
    net = twins[0][ScratchBatchNorm]
    images = array(rng.integers(0, 256, (2, 16, 16, 3)), device, "float32")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scaled = (images / 255 - array(mean, device, "float32")) / array(std, device, "float32")
    expected = net(scaled.transpose((0, 3, 1, 2))).asnumpy()
    prefix = str(tmp_path / "net")
    gluoncv.utils.export_block(
        prefix, net, data_shape=(16, 16, 3), preprocess=True, layout="HWC", ctx=device
    )
    served = SymbolBlock.imports(
        f"{prefix}-symbol.json", ["data"], f"{prefix}-0000.params", ctx=device
    )
    np.testing.assert_allclose(served(images).asnumpy(), expected, rtol=1e-3, atol=1e-4)


# models.zoo


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


def test_a_net_that_supports_the_built_in_only_is_converted():
    net = zoo.get_model("center_net_mobilenetv3_small_duc_voc")
    assert len(layers_of(net, ScratchBatchNorm)) == 37
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
