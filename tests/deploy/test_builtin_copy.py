"""A copy with MXNet's own operator: what MXNet's own tools do with it."""

import contextlib
import io

from scratchbn import ScratchBatchNorm
from scratchbn.datasets import load_sample
from scratchbn.deploy import builtin_copy

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


def test_amp_converts_the_copy_and_keeps_the_statistics_float32(trained):
    net, images, _ = trained
    copy = builtin_copy(net, images[:1])
    copy.hybridize()
    copy(images[:1])
    converted = amp.convert_hybrid_block(copy, target_dtype="float16", ctx=mx.cpu())
    symbol = converted(mx.sym.var("data"))
    _, _, states = symbol.infer_type(data="float32")
    assert set(states) == {np.float32}
    assert "amp_cast" in symbol.tojson(remove_amp_cast=False)
    values = {n: p.data() for n, p in copy.collect_params().items()}
    more = {n: values.pop(n) for n in symbol.list_auxiliary_states()}
    again, _, _ = amp.convert_model(copy(mx.sym.var("data")), values, more, target_dtype="float16")
    assert set(again.infer_type(data="float32")[2]) == {np.float32}
