"""Parameter files of GluonCV's nets, between nets with our layer and with the built-in."""

from scratchbn import ScratchBatchNorm, to_builtin, to_scratch

import mxnet as mx
import numpy as np
import pytest
from helpers import array
from mxnet import autograd
from mxnet.gluon import SymbolBlock, nn

from models import zoo

gluoncv = pytest.importorskip("gluoncv")
pytestmark = pytest.mark.filterwarnings("ignore:.*is already initialized, ignoring:UserWarning")


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
