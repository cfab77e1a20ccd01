"""What could end a process: each hazard of the operator in a process of its own."""

from scratchbn import BackendError, native

import pytest
from helpers import run_python

PREAMBLE = """
import faulthandler, sys
faulthandler.enable()
import numpy as np
import scratchbn
from scratchbn import ScratchBatchNorm, native
import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn

scratchbn.set_backend("native")
OPTIONS = dict(
    axis=1, epsilon=1e-5, momentum=0.9, scale=True, center=True, relu=False, unbiased_variance=False
)


def call(x, channels, training=True, gamma=None, mean=None, dtype="float32", **options):
    vector = lambda value: mx.nd.full((channels,), value, dtype=dtype)
    mean = vector(0) if mean is None else mean
    others = [vector(1) if gamma is None else gamma, vector(0), mean, vector(1)]
    others.append(mx.nd.full((1,), 0 if training else 1))
    return native.batch_norm(mx.nd, x, *others, **{**OPTIONS, **options})[0]


def refused(f):
    try:
        f().wait_to_read()
    except mx.MXNetError:
        return True
    return False
"""


def survives(program, **environment):
    """Run `program` after the preamble in a process that must end well."""
    try:
        native.load()
    except BackendError as error:
        pytest.skip(str(error))
    child = run_python(PREAMBLE + program, env=environment)
    assert child.returncode == 0, f"exit {child.returncode}\n{child.stdout}\n{child.stderr[-3000:]}"


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 3), (4, 0, 64)])
def test_zero_channels_have_nothing_to_compute(shape):
    survives(f"""
mx.util.set_np_shape(True)
for training in (True, False):
    x = mx.nd.zeros({shape})
    x.attach_grad()
    with autograd.record():
        y = call(x, 0, training)
    y.backward()
    assert y.shape == x.grad.shape == {shape}, (y.shape, x.grad.shape)
    x.grad.wait_to_read()
""")


def test_empty_batches_have_nothing_to_compute():
    survives("""
mx.util.set_np_shape(True)
for shape in ((0, 3), (0, 3, 64), (4, 3, 0), (4, 3, 0, 64), (0, 3, 0)):
    for training in (True, False):
        x, gamma, mean = mx.nd.zeros(shape), mx.nd.ones((3,)), mx.nd.full((3,), 5)
        x.attach_grad()
        gamma.attach_grad()
        with autograd.record():
            y = call(x, 3, training, gamma, mean)
        y.backward()
        assert y.shape == x.grad.shape == shape
        assert not gamma.grad.asnumpy().any()
        assert (mean.asnumpy() == 5).all()
""")


def test_words_that_are_no_options_are_refused():
    survives("""
x = mx.nd.ones((4, 3, 20))
for options in (
    {"relu": "yes"}, {"scale": "1"}, {"center": "true"}, {"unbiased_variance": ""},
    {"axis": "x"}, {"axis": 3}, {"axis": -4}, {"axis": 2**40}, {"axis": "1.5"}, {"axis": ""},
    {"epsilon": "e"}, {"epsilon": "1e-5x"}, {"epsilon": ""}, {"epsilon": "nan"},
    {"momentum": "none"}, {"momentum": "0,9"}, {"momentum": "inf"},
    {"momentum": None}, {"__ext_extra_inputs__": 4},
):
    extra = options.pop("__ext_extra_inputs__", 5)
    vectors = [mx.nd.ones((3,)) for _ in range(4)] + [mx.nd.zeros((1,))]
    operator = mx.nd._internal._scratchbn_batch_norm
    assert refused(
        lambda: operator(x, *vectors, __ext_extra_inputs__=extra, **{**OPTIONS, **options})[0]
    ), options
assert refused(lambda: operator(x, *vectors, **OPTIONS)[0]), "its inputs not declared"
assert refused(lambda: operator(x, *vectors)[0]), "no options"
assert not refused(lambda: call(x, 3))
""")


def test_inputs_that_do_not_fit_are_refused():
    survives("""
x = mx.nd.ones((4, 3, 20))
for gamma in (mx.nd.ones((n,)) for n in (1, 2, 4, 1000)):
    assert refused(lambda: call(x, 3, gamma=gamma)), gamma.shape
assert refused(lambda: call(x, 3, gamma=mx.nd.ones((1, 3))))
assert refused(lambda: call(x, 3, gamma=mx.nd.ones((3,), dtype="float64")))
assert refused(lambda: call(x, 3, dtype="float64"))
assert refused(lambda: call(x.astype("float64"), 3))
for dtype in ("float16", "int8", "int32", "int64", "uint8"):
    assert refused(lambda: call(x.astype(dtype), 3, dtype=dtype)), dtype
assert refused(lambda: call(mx.nd.ones((3,)), 3))
assert refused(lambda: call(x.tostype("row_sparse"), 3))
assert not refused(lambda: call(x, 3))
assert not refused(lambda: call(x.astype("float64"), 3, dtype="float64"))
""")


@pytest.mark.parametrize("momentum", [0.9, None])
def test_no_mixture_of_known_and_unknown_shapes_is_fatal(momentum):
    survives(f"""
import itertools
known = dict(g=(3,), b=(3,), m=(3,), v=(3,), f=(1,))
known.update(dict(n=(1,)) if {momentum} is None else {{}})
options = {{**OPTIONS, "momentum": {momentum}}}
inputs = [mx.sym.var(name) for name in ("data", *known)]
symbol = native.batch_norm(mx.sym, *inputs, **options)[0]
for shape in (None, (2, 3), (2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 7, 8)):
    data = {{}} if shape is None else {{"data": shape}}
    for count in range(len(known) + 1):
        for names in itertools.combinations(known, count):
            shapes = {{**data, **{{name: known[name] for name in names}}}}
            try:
                arguments, outputs, states = symbol.infer_shape_partial(**shapes)
            except mx.MXNetError:
                assert shape is None, shapes
            else:
                assert outputs == [shape], (shapes, outputs)
                inferred = dict(zip(symbol.list_arguments(), arguments))
                inferred.update(zip(symbol.list_auxiliary_states(), states))
                assert all(inferred[k] == (3,) for k in "gbmv"), (shapes, inferred)
""")


def test_wrong_lengths_in_a_graph_are_errors_of_shape():
    survives("""
names = ("data", "g", "b", "m", "v", "f")
symbol = native.batch_norm(mx.sym, *map(mx.sym.var, names), **OPTIONS)[0]
right = dict(data=(4, 3, 20), g=(3,), b=(3,), m=(3,), v=(3,), f=(1,))
for name in "gbmv":
    data = {"data": (4, 3, 20)}
    for shapes in ({**data, name: (2,)}, {**right, name: (2,)}, {**right, name: (1, 3)}):
        try:
            symbol.infer_shape(**shapes)
        except mx.MXNetError as error:
            assert "Incompatible attr" in str(error), error
        else:
            raise AssertionError(f"{shapes} accepted")
""")


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("hybrid", [False, True])
def test_gradients_of_inputs_in_blocked_layouts_are_those_of_portable(rank, hybrid):
    survives(f"""
convolution, size = (nn.Conv2D, (12, 12)) if {rank} == 4 else (nn.Conv3D, (5, 7, 6))


def gradients(backend, channels):
    mx.random.seed(channels)
    np.random.seed(channels)
    net = nn.HybridSequential()
    for _ in range(3):  # between convolutions: the data and its gradient come in their layout
        net.add(convolution(channels, 3, padding=1, use_bias=False), ScratchBatchNorm())
    net.add(convolution(channels, 3), nn.Dense(3))
    net.initialize(mx.init.Xavier(rnd_type="gaussian"))
    if {hybrid}:
        net.hybridize(static_alloc=True, static_shape=True)
    x = mx.nd.array(np.random.randn(4, 8, *size))
    with scratchbn.use_backend(backend):
        for _ in range(3):
            with autograd.record():
                y = (net(x) ** 2).mean()
            y.backward()
    return [p.grad().asnumpy() for p in net.collect_params().values() if p.grad_req != "null"]


for channels in (3, 8, 16, 32):
    for a, b in zip(gradients("native", channels), gradients("portable", channels)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * np.abs(b).max() + 1e-7)
""")


def test_leaving_with_operators_pending_is_no_crash():
    survives("""
net = nn.HybridSequential()
for _ in range(12):
    net.add(nn.Conv2D(24, 3, padding=1), ScratchBatchNorm(), nn.Activation("relu"))
net.initialize()
x = mx.nd.ones((8, 3, 48, 48))
for _ in range(3):
    with autograd.record():
        y = net(x)
    y.backward()
sys.exit(0)
""")


def test_threads_with_nets_of_their_own():
    survives("""
import threading


def work(k):
    for i in range(6):
        net = nn.HybridSequential()
        net.add(nn.Conv2D(8, 3, in_channels=3), ScratchBatchNorm(in_channels=8), nn.Dense(3))
        net.initialize(ctx=mx.cpu(k))
        if i % 2:
            net.hybridize()
        with autograd.record():
            y = net(mx.nd.ones((4, 3, 16, 16), ctx=mx.cpu(k)))
        y.backward()


threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
mx.nd.waitall()
""")


@pytest.mark.parametrize(
    "environment", [{"MXNET_ENGINE_TYPE": "NaiveEngine"}, {"OMP_NUM_THREADS": "3"}]
)
def test_other_engines(environment):
    survives(
        """
net = nn.HybridSequential()
net.add(nn.Conv2D(8, 3), ScratchBatchNorm(), ScratchBatchNorm(axis=-1), nn.Dense(3))
net.initialize()
for hybrid in (False, True):
    net.hybridize(hybrid, static_alloc=True)
    for _ in range(3):
        with autograd.record():
            y = net(mx.nd.random.normal(shape=(8, 3, 40, 40)))
        y.backward()
assert np.isfinite(y.asnumpy()).all()
""",
        **environment,
    )
