"""The variants in nets: trained in every mode, as NumPy arrays, in files, beside conversions."""

from __future__ import annotations

from scratchbn import ScratchBatchNorm, to_builtin
from scratchbn.deploy import export_inference, fold

import mxnet as mx
import numpy as np
import pytest
from helpers import CLOSE, GRAPH_MODES, MODES, STATE, array, in_mode, set_values
from mxnet import autograd, gluon
from mxnet.gluon import SymbolBlock, nn
from variant_layers import EXACT, VARIANTS, data, of


class Twice(gluon.HybridBlock):
    """A net that calls one norm layer twice; its channels are unknown until it is called."""

    def __init__(self, norm):
        super().__init__(prefix="twice_")
        with self.name_scope():
            self.first, self.norm, self.last = nn.Dense(5), norm(), nn.Dense(2)

    def hybrid_forward(self, F, x):
        x = F.sigmoid(self.norm(self.first(x)))
        return self.last(F.sigmoid(self.norm(F.square(x))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_net_trains_alike_in_every_mode(variant, device, tmp_path, rng):
    batches = [data(rng, (8, 4)) for _ in range(4)]
    sample = array(batches[0][0], device)
    start, ends = {}, {}
    for mode in MODES:
        (tmp_path / mode).mkdir()
        net = Twice(of(*variant))
        net.cast("float64")
        net.initialize(mx.init.Normal(0.5), ctx=device)
        net = in_mode(net, mode, sample, tmp_path / mode)
        net(sample)
        parameters = net.collect_params()
        start = start or {name: p.data().asnumpy() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.set_data(array(start[name], device))
        trainer = gluon.Trainer(parameters, "sgd", {"learning_rate": 0.1})
        for x, dy in batches:
            with autograd.record():
                y = net(array(x, device))
            y.backward(array(dy[:, :2], device))
            trainer.step(len(x))
        mx.nd.waitall()
        ends[mode] = {name: p.data().asnumpy() for name, p in parameters.items()}
    for name, value in ends["eager"].items():
        assert not np.array_equal(value, start[name]), f"{name} did not move"
        for mode in GRAPH_MODES:
            np.testing.assert_allclose(ends[mode][name], value, err_msg=f"{mode} {name}", **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_numpy_arrays(variant, device, rng):
    x = rng.normal(size=(8, 3, 2))
    classic = of(*variant)(in_channels=3)
    classic.initialize(ctx=device)
    classic.cast("float64")
    with autograd.train_mode():
        expected = classic(array(x, device)).asnumpy()
    mx.npx.set_np()
    for hybridize in (False, True):
        layer = of(*variant)(in_channels=3)
        layer.initialize(ctx=device)
        layer.cast("float64")
        layer.hybridize(hybridize)
        with autograd.train_mode():
            y = layer(array(x, device))
        assert isinstance(y, mx.np.ndarray)
        np.testing.assert_allclose(y.asnumpy(), expected, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_files_are_right(variant, device, rng, tmp_path):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), of(*variant)(), nn.Activation("relu"), nn.Dense(3))
    net.initialize(mx.init.Normal(0.5), ctx=device)
    net.hybridize()
    x = array(rng.normal(size=(7, 2, 6, 6)), device, "float32")
    for _ in range(3):
        with autograd.train_mode():
            net(x)
    mx.nd.waitall()
    expected = net(x).asnumpy()

    report = export_inference(net, tmp_path / "served", x)
    assert (len(report.folded), len(report.kept)) == (1, 0)
    net.export(str(tmp_path / "live"))
    symbol, params, _ = fold(tmp_path / "live-symbol.json", tmp_path / "live-0000.params")
    symbol.save(str(tmp_path / "folded-symbol.json"))
    mx.nd.save(str(tmp_path / "folded-0000.params"), params)
    for name in ("served", "folded"):
        file = str(tmp_path / name)
        loaded = SymbolBlock.imports(
            f"{file}-symbol.json", ["data"], f"{file}-0000.params", ctx=device
        )
        np.testing.assert_allclose(loaded(x).asnumpy(), expected, **CLOSE["float32"], err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_files_interchange(variant, device, rng, tmp_path):
    layers = of(*variant)(in_channels=3), ScratchBatchNorm(in_channels=3)
    for layer in layers:
        layer.initialize(ctx=device)
    values = {name: rng.uniform(0.5, 2, 3) for name in STATE}
    set_values(layers[0], values)
    layers[0].save_parameters(str(tmp_path / "layer.params"))
    layers[1].load_parameters(str(tmp_path / "layer.params"), ctx=device)
    x = array(rng.normal(size=(4, 3)), device, "float32")
    ours, plain = (layer(x).asnumpy() for layer in layers)
    np.testing.assert_allclose(ours, plain, **CLOSE["float32"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversion_to_the_builtin_leaves_variants_alone(variant, device):
    net = nn.HybridSequential()
    net.add(of(*variant)(in_channels=3), ScratchBatchNorm(in_channels=3))
    net.initialize(ctx=device)
    _, report = to_builtin(net, report=True)
    assert isinstance(net[0], variant[0])
    assert type(net[1]) is nn.BatchNorm
    assert len(report.converted) == len(report.skipped) == 1
