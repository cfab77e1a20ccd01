"""A copy with MXNet's own operator: what MXNet's own tools do with it."""

import contextlib
import io

from scratchbn import ScratchBatchNorm, convert_files
from scratchbn._graph.nodes import Graph, Node, Output
from scratchbn.datasets import load_sample
from scratchbn.deploy import builtin_copy, write_model
from scratchbn.deploy.check import run_symbol

# isort: split
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.contrib import amp, quantization
from mxnet.gluon import SymbolBlock, Trainer, loss, nn

from models.lenet import initialize, lenet


def small(**options):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Conv2D(4, 3, in_channels=3), ScratchBatchNorm(in_channels=4, **options))
        net.add(nn.Activation("relu"), nn.Dense(2, in_units=4 * 36))
    net.initialize()
    return net


def image(batch=2):
    return mx.nd.random.normal(2, 3, shape=(batch, 3, 8, 8))


def train(net, data, labels, steps, size=50, rate=0.05):
    trainer = Trainer(net.collect_params(), "sgd", {"learning_rate": rate, "momentum": 0.9})
    criterion = loss.SoftmaxCrossEntropyLoss()
    for i in range(steps):
        rows = slice(i * size % len(data), i * size % len(data) + size)
        with autograd.record():
            objective = criterion(net(data[rows]), labels[rows])
        objective.backward()
        trainer.step(size)
    mx.nd.waitall()


def test_numpy_semantics():
    mx.npx.set_np()
    net, x = small(), image().as_np_ndarray()
    copy = builtin_copy(net, x)
    for y in (copy(x), builtin_copy(copy, x)(x)):
        assert isinstance(y, mx.np.ndarray)
        np.testing.assert_allclose(y.asnumpy(), net(x).asnumpy(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def trained():
    digits = load_sample()
    images, test_images = (
        mx.nd.array(part[:, None].astype("float32") / 255)
        for part in (digits.train_images, digits.test_images)
    )
    labels, test_labels = (mx.nd.array(p) for p in (digits.train_labels, digits.test_labels))
    net = lenet()
    initialize(net)
    net.hybridize()
    train(net, images, labels, steps=80)
    return net, images, (test_images, test_labels)


def accuracy(net, images, labels):
    return float((net(images).argmax(axis=1) == labels).mean().asscalar())


def test_the_copy_computes_and_trains_as_the_net():
    net, x = small(momentum=0.8, epsilon=1e-3), image()
    labels = mx.nd.array([0, 1])
    copy = builtin_copy(net, x)
    assert isinstance(copy, SymbolBlock)
    assert copy.collect_params().keys() == net.collect_params().keys()
    for block in (net, copy):
        train(block, x, labels, steps=3, size=2)
    for name, parameter in net.collect_params().items():
        ours, theirs = (p.data().asnumpy() for p in (parameter, copy.collect_params()[name]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(net(x).asnumpy(), copy(x).asnumpy(), rtol=1e-4, atol=1e-4)
    assert type(net[1]) is ScratchBatchNorm


def test_what_cannot_be_copied_is_said():
    with pytest.raises(ValueError, match="momentum=None has no counterpart"):
        builtin_copy(small(momentum=None), image())
    with pytest.raises(TypeError, match="net must be a gluon Block, got 3"):
        builtin_copy(3, image())

    class Variant(ScratchBatchNorm):
        def transform(self, F, view, batch, gamma, beta, epsilon):
            return super().transform(F, view, batch, gamma, beta * 2, epsilon)

    net = Variant(in_channels=3, prefix="odd_")
    net.initialize()
    with pytest.warns(UserWarning, match="odd was left as it is"):
        copy = builtin_copy(net, image())
    np.testing.assert_allclose(copy(image()).shape, image().shape)


def test_a_summary_of_the_copy():
    text = io.StringIO()
    symbol = builtin_copy(small(), image())(mx.sym.var("data"))
    with contextlib.redirect_stdout(text):
        mx.viz.print_summary(symbol, shape={"data": (1, 3, 8, 8)})
    assert "net_batchnorm0_fwd(BatchNorm)" in text.getvalue()
    # MXNet counts the channels, not the elements, of what it flattens before a dense layer.
    assert f"Total params: {4 * 27 + 4 + 2 * 4 + 2 * 4 + 2}" in text.getvalue()


def test_quantized_digits_are_recognized_as_well(trained):
    net, images, (test_images, test_labels) = trained
    data = mx.gluon.data.DataLoader(
        mx.gluon.data.ArrayDataset(images[:200], mx.nd.zeros(200)), batch_size=50
    )
    quantized = quantization.quantize_net(
        builtin_copy(net, images[:1]),
        quantized_dtype="auto",
        calib_mode="naive",
        calib_data=data,
        num_calib_examples=200,
        ctx=mx.cpu(),
    )
    operators = [node.attr("quantized") for node in quantized(mx.sym.var("data")).get_internals()]
    assert "true" in operators
    assert accuracy(net, test_images, test_labels) > 0.9
    difference = accuracy(quantized, test_images, test_labels) - accuracy(
        net, test_images, test_labels
    )
    assert abs(difference) <= 0.01


def under_amp(route, net, images, folder):
    """Return a net converted by AMP to float16, as a symbol and parameters."""
    if route == "block":
        copy = builtin_copy(net, images)
        copy.hybridize()
        copy(images)
        converted = amp.convert_hybrid_block(copy, target_dtype="float16", ctx=mx.cpu())
        values = {name: p.data() for name, p in copy.collect_params().items()}
        return converted(mx.sym.var("data")), values
    net.export(str(folder / "net"))
    files = str(folder / "net-symbol.json"), str(folder / "net-0000.params")
    if route == "converted files":
        symbol, params, _ = convert_files(*files, to="builtin")
        write_model(folder / "net", symbol, params)
    symbol, arguments, states = mx.model.load_checkpoint(str(folder / "net"), 0)
    own = [node.name for node in symbol.get_internals() if "batchnorm" in node.name]
    symbol, arguments, states = amp.convert_model(
        symbol,
        arguments,
        states,
        target_dtype="float16",
        excluded_sym_names=own if route == "files" else None,
    )
    return symbol, {**arguments, **states}


def in_steps_of_float16(symbol):
    """Return the symbol with all in float32, and rounded where it was float16.

    MXNet multiplies matrices of float16 on a GPU only; this rounds as it does.
    """
    internals = symbol.get_internals()
    types = internals.infer_type(data="float32")[1]
    half = {n for n, dtype in zip(internals.list_outputs(), types) if dtype == np.float16}
    graph, rounded = Graph(symbol), {}
    for node in graph.nodes():
        if node.op == "amp_cast":
            node.op, node.attrs = "_copy", {}
        if f"{node.name}_output" in half:
            down = Node("Cast", f"{node.name}_down", {"dtype": "float16"}, [Output(node)])
            up = Node("Cast", f"{node.name}_up", {"dtype": "float32"}, [Output(down)])
            rounded[Output(node)] = Output(up)
    assert len(rounded) >= 4  # two convolutions and two dense layers
    graph.replace(rounded)
    return graph.symbol()


@pytest.mark.parametrize("route", ["block", "files", "converted files"])
def test_digits_under_amp_are_recognized_as_well(trained, route, tmp_path):
    net, images, (test_images, test_labels) = trained
    symbol, values = under_amp(route, net, images[:1], tmp_path)
    assert "amp_cast" in symbol.tojson(remove_amp_cast=False)
    _, (out,), states = symbol.infer_type(data="float32")
    assert (out, *set(states)) == (np.float32, np.float32)
    assert {values[name].dtype for name in symbol.list_auxiliary_states()} == {np.float32}
    (y,) = run_symbol(in_steps_of_float16(symbol), values, {"data": test_images})
    scores = net(test_images).asnumpy()
    assert 1e-6 < abs(y - scores).max() / abs(scores).max() < 1e-2
    right = (y.argmax(axis=1) == test_labels.asnumpy()).mean()
    assert abs(right - accuracy(net, test_images, test_labels)) <= 0.01
