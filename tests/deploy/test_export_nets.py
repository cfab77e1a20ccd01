"""Whole nets exported for inference: the same results by mxnet alone, and a net left as it was."""

from scratchbn import ScratchBatchNorm
from scratchbn.deploy import export_inference

import helpers
import mxnet as mx
import numpy as np
import pytest
from inference_files import (
    EXACT,
    difference,
    exported,
    load,
    norms,
    prepared,
    randomize,
    sequential,
)
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

from models.lenet import initialize, lenet

STATEFUL = {
    "BatchNorm",
    "Dropout",
    "sgd_mom_update",
    "_contrib_BatchNormWithReLU",
    "_contrib_SyncBatchNorm",
    "mean",
    "sum",
    "arange_like",
    "dot",
}


@pytest.mark.parametrize("style", ["dwconv", "affine"])
@norms
def test_lenet(style, norm, rng, tmp_path):
    net = lenet(norm_layer=norm)
    initialize(net, "xavier")
    x = mx.nd.array(rng.normal(size=(4, 1, 28, 28)))
    net(x)
    randomize(net, rng)
    report, ops = exported(net, tmp_path / "net", net(x), x, style=style)
    assert (len(report.folded), report.kept) == (3, ())
    assert len(ops) == len(["conv", "relu", "pool"] * 2 + ["flatten", "dense", "relu", "dense"])


@pytest.mark.parametrize(
    "name, size, folded, kept",
    [
        ("cifar_resnet20_v1", 32, 21, 0),
        ("mobilenet0.5", 64, 27, 0),
        ("densenet121", 224, 59, 62),
    ],
)
@norms
def test_gluoncv_nets(name, size, folded, kept, norm, rng, tmp_path):
    model_zoo = pytest.importorskip("gluoncv.model_zoo")
    options = {} if norm is nn.BatchNorm else {"norm_layer": norm}
    net = model_zoo.get_model(name, **options)
    y, x = prepared(net, rng, (1, 3, size, size))
    report, ops = exported(net, tmp_path / "net", y, x)
    assert (len(report.folded), len(report.kept)) == (folded, kept)
    assert not STATEFUL & set(ops)


class Inputs(HybridBlock):
    """Two inputs in a list and one beside it; two outputs."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.norm, self.dense = ScratchBatchNorm(), nn.Dense(3)

    def hybrid_forward(self, F, pair, x):
        return self.dense(pair[0] + pair[1]), self.norm(self.dense(x))


def test_several_inputs_and_outputs(rng, tmp_path):
    net = Inputs()
    net.initialize()
    a, b, c = (mx.nd.array(rng.normal(size=(2, 4))) for _ in range(3))
    net([a, b], c)
    randomize(net, rng)
    export_inference(net, tmp_path / "net", [a, b], c)
    again = load(tmp_path / "net", "data0", "data1", "data2")(a, b, c)
    for y, z in zip(net([a, b], c), again):
        assert difference(y, z) < EXACT


def test_the_same_array_may_be_given_twice(rng, tmp_path):
    net = Inputs()
    net.initialize()
    x = mx.nd.array(rng.normal(size=(2, 4)))
    y = net([x, x], x)
    export_inference(net, tmp_path / "net", [x, x], x)
    assert difference(y[0], load(tmp_path / "net", "data0", "data1", "data2")(x, x, x)[0]) < EXACT


def test_a_block_that_is_not_hybrid(rng, tmp_path):
    net = nn.Sequential()
    net.add(nn.Dense(4), ScratchBatchNorm())
    y, x = prepared(net, rng, (2, 4))
    assert len(exported(net, tmp_path / "net", y, x)[0].folded) == 1


@norms
def test_numpy_semantics(norm, rng, tmp_path):
    mx.npx.set_np()
    layers = [nn.Conv2D(4, 3), norm(), nn.Activation("relu"), norm(), nn.Activation("tanh")]
    net = sequential(*layers, nn.Dense(3), norm())
    net.initialize()
    x = mx.np.array(rng.normal(size=(2, 3, 6, 6)), dtype="float32")
    net(x)
    y = net(x)
    report = export_inference(net, tmp_path / "net", x)
    assert (len(report.folded), len(report.kept)) == (2, 1)
    assert difference(y, load(tmp_path / "net")(x)) < EXACT


def test_an_imported_training_export_is_exported_again(rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), nn.BatchNorm())
    net.hybridize()
    y, x = prepared(net, rng, (2, 3, 6, 6))
    net.export(str(tmp_path / "trained"))
    again = load(tmp_path / "trained")
    assert len(exported(again, tmp_path / "net", y, x)[0].folded) == 1


FRESH = """
import sys, json, numpy as np
for old, new in (("bool", bool), ("int", int), ("float", float), ("object", object)):
    if old not in np.__dict__:
        setattr(np, old, new)
import mxnet as mx
prefix, = sys.argv[1:]
x = mx.nd.load(prefix + "-x")[0]
block = mx.gluon.SymbolBlock.imports(prefix + "-symbol.json", ["data"], prefix + "-0000.params")
module = mx.mod.Module(*mx.model.load_checkpoint(prefix, 0)[:1], label_names=None)
module.bind([("data", x.shape)], for_training=False)
module.set_params(*mx.model.load_checkpoint(prefix, 0)[1:])
module.forward(mx.io.DataBatch([x]), is_train=False)
assert "scratchbn" not in sys.modules
print(json.dumps([block(x).asnumpy().tolist(), module.get_outputs()[0].asnumpy().tolist()]))
"""


@pytest.mark.parametrize("style", ["dwconv", "affine", "batchnorm"])
def test_files_load_where_only_mxnet_is(style, rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), ScratchBatchNorm(), nn.Activation("relu"), ScratchBatchNorm())
    y, x = prepared(net, rng, (2, 3, 6, 6))
    export_inference(net, tmp_path / "net", x, style=style)
    mx.nd.save(str(tmp_path / "net-x"), [x])
    process = helpers.run_python(FRESH, tmp_path / "net", env=helpers.without_scratchbn())
    for z in helpers.last_json(process):
        assert difference(y, mx.nd.array(z)) < EXACT


# --- the net is left as it was ----------------------------------------------------------------


@norms
def test_the_net_is_left_as_it_was(norm, rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), norm(), nn.Dropout(0.5))
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append("after"))
    net[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    y, x = prepared(net, rng, (2, 3, 6, 6))
    net.hybridize(static_alloc=True)
    net(x)
    before = {k: p.data().asnumpy() for k, p in net.collect_params().items()}
    state = net._cached_op, net._cached_graph, list(net._flags), net._active
    calls.clear()
    with autograd.record():
        export_inference(net, tmp_path / "net", x)
        assert autograd.is_training()
    assert calls == []
    assert state == (net._cached_op, net._cached_graph, list(net._flags), net._active)
    for name, parameter in net.collect_params().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name], err_msg=name)
    net.hybridize(False)
    np.testing.assert_array_equal(net(x).asnumpy(), y.asnumpy())
    assert calls == ["before", "after"]


@norms
def test_the_same_net_gives_the_same_bytes(norm, rng, tmp_path):
    net = sequential(nn.Conv2D(4, 3), norm(), nn.Activation("relu"), norm())
    _, x = prepared(net, rng, (2, 3, 6, 6))

    def contents():
        export_inference(net, tmp_path / "net", x)
        return [(tmp_path / f"net-{end}").read_bytes() for end in ("symbol.json", "0000.params")]

    first = contents()
    mx.sym.relu(mx.sym.var("x")), nn.Dense(3), net(x)
    net.hybridize()
    net(x)
    assert contents() == first
