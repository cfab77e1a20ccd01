"""Every layer of `gluon.nn` before and behind ours: eager and hybridized, against float64.

The reference computes the neighbour in float64, where MXNet has plain kernels only, and batch
normalization by the oracle. What is handed over between layers matters: MXNet's max pooling behind
a view of another array has a wrong gradient, so a layer must not return one.
"""

import scratchbn
from scratchbn.variants import BatchRenorm, GhostBatchNorm

# isort: split
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import array, random_values, set_values
from mxnet import autograd
from mxnet.gluon import nn

SHAPES = {1: (4, 8, 6), 2: (4, 8, 6, 6), 3: (3, 8, 4, 4, 4)}
CHANNELS = 8


def spatial(dims):
    """The layers for data with that many axes behind the channels."""
    layers = {}
    for name, options in {
        "MaxPool": {"pool_size": 2},
        "MaxPool full": {"pool_size": 3, "strides": 2, "ceil_mode": True},
        "MaxPool padded": {"pool_size": 3, "strides": 2, "padding": 1},
        "AvgPool": {"pool_size": 2},
        "GlobalMaxPool": {},
        "GlobalAvgPool": {},
        "Conv": {"channels": CHANNELS, "kernel_size": 3, "in_channels": CHANNELS},
        "Conv 5": {"channels": 5, "kernel_size": 3, "in_channels": CHANNELS},
        "ConvTranspose": {"channels": 5, "kernel_size": 3, "in_channels": CHANNELS},
    }.items():
        kind, _, rest = name.partition(" ")
        pool, d = ("Pool" in kind, f"{dims}D")
        kind = kind.replace("Transpose", f"{d}Transpose") if "Transpose" in kind else kind + d
        assert pool or "Conv" in kind
        layers[f"{kind} {rest}".strip()] = (dims, lambda k=kind, o=options: getattr(nn, k)(**o))
    return layers


LAYERS = {
    **spatial(1),
    **spatial(2),
    **spatial(3),
    "Activation relu": (2, lambda: nn.Activation("relu")),
    "Activation sigmoid": (2, lambda: nn.Activation("sigmoid")),
    "Activation tanh": (2, lambda: nn.Activation("tanh")),
    "Activation softrelu": (2, lambda: nn.Activation("softrelu")),
    "Activation softsign": (2, lambda: nn.Activation("softsign")),
    "LeakyReLU": (2, lambda: nn.LeakyReLU(0.1)),
    "PReLU": (2, lambda: nn.PReLU()),
    "ELU": (2, lambda: nn.ELU()),
    "SELU": (2, lambda: nn.SELU()),
    "GELU": (2, lambda: nn.GELU()),
    "Swish": (2, lambda: nn.Swish()),
    "Dropout": (2, lambda: nn.Dropout(0.0)),
    "Flatten": (2, lambda: nn.Flatten()),
    "Dense": (2, lambda: nn.Dense(5, in_units=CHANNELS * 36)),
    "Dense not flat": (2, lambda: nn.Dense(5, in_units=6, flatten=False)),
    "Embedding": (0, lambda: nn.Embedding(9, 3)),
    "ReflectionPad2D": (2, lambda: nn.ReflectionPad2D(1)),
    "BatchNorm": (2, lambda: nn.BatchNorm(in_channels=CHANNELS)),
    "BatchNormReLU": (2, lambda: nn.BatchNormReLU(in_channels=CHANNELS)),
    "InstanceNorm": (2, lambda: nn.InstanceNorm(in_channels=CHANNELS)),
    "LayerNorm": (2, lambda: nn.LayerNorm(in_channels=6)),
    "GroupNorm": (2, lambda: nn.GroupNorm(2)),
    "HybridLambda": (2, lambda: nn.HybridLambda(lambda F, x: F.softmax(x, axis=1))),
    "HybridLambda Pooling sum": (
        2,
        lambda: nn.HybridLambda(
            lambda F, x: F.Pooling(x, kernel=(2, 2), stride=(2, 2), pool_type="sum")
        ),
    ),
    "HybridLambda LRN": (2, lambda: nn.HybridLambda(lambda F, x: F.LRN(x, nsize=3))),
    "HybridLambda concat": (2, lambda: nn.HybridLambda(lambda F, x: F.concat(x, x * 2, dim=1))),
    "HybridLambda slice": (2, lambda: nn.HybridLambda(lambda F, x: F.slice_axis(x, 1, 1, 5))),
    "HybridLambda transpose": (
        2,
        lambda: nn.HybridLambda(lambda F, x: F.transpose(x, (0, 2, 3, 1))),
    ),
    "HybridLambda UpSampling": (
        2,
        lambda: nn.HybridLambda(lambda F, x: F.UpSampling(x, scale=2, sample_type="nearest")),
    ),
    "HybridLambda max": (2, lambda: nn.HybridLambda(lambda F, x: F.max(x, axis=(2, 3)))),
}
# Containers, and what is no layer.
NOT_TRIED = {"Block", "HybridBlock", "SymbolBlock", "Sequential", "HybridSequential", "Lambda"}
NORMS = {
    "ScratchBatchNorm": scratchbn.ScratchBatchNorm,
    "ScratchBatchNormReLU": scratchbn.ScratchBatchNormReLU,
    "GhostBatchNorm": lambda **options: GhostBatchNorm(64, **options),  # one chunk: batch norm
    "BatchRenorm": lambda **options: BatchRenorm(1, 0, **options),  # no correction: batch norm
}
ONLY_FLOAT32 = {"InstanceNorm", "BatchNormReLU", "HybridLambda LRN", "Conv3DTranspose"}
LEGACY = {"InstanceNorm", "GroupNorm", "ReflectionPad2D"}  # they refuse NumPy arrays
# MXNet's gradients of these are wrong under record(train_mode=False), whatever stands beside them.
WRONG_IN_INFERENCE = ("MaxPool", "GlobalMaxPool", "BatchNorm")
# Behind these most of the gradient cancels: what is left is compared with what cancelled.
CANCELS = ("InstanceNorm", "LayerNorm", "GroupNorm", "BatchNorm")


def initialized(layer, device, seed=5):
    """A neighbour whose weights depend on the seed alone."""
    mx.random.seed(seed)
    layer.initialize(mx.init.Normal(0.3), ctx=device)
    return layer


def head_for(shape):
    return np.random.default_rng(7).normal(size=shape)


class Reference:
    """A neighbour and the oracle, one after the other; `run` returns (y, dx, dgamma, dbeta)."""

    def __init__(self, name, values, device, *, relu):
        self.dtype = "float32" if name in ONLY_FLOAT32 else "float64"
        self.layer = initialized(LAYERS[name][1](), device)
        self.values, self.device, self.relu = values, device, relu

    def oracle(self, x, dy, training):
        oracle = OracleBatchNorm(**self.values, relu=self.relu)
        return oracle.train_step(x, dy) if training else oracle.infer_step(x, dy)

    def neighbour(self, x, dy, training):
        """The output and the input's gradient; `dy` may be a function of the output's shape."""
        data = array(x, self.device, self.dtype)
        if not isinstance(self.layer, nn.Embedding):
            data.attach_grad()
        self.layer.cast(self.dtype)
        self.layer.hybridize()
        with autograd.record(train_mode=training):
            y = self.layer(data)
        head = dy(y.shape) if callable(dy) else dy
        y.backward(array(head, self.device, self.dtype))
        return y.asnumpy(), None if data.grad is None else data.grad.asnumpy(), head

    def run(self, position, x, training):
        if position == "behind":
            normed = self.oracle(x, np.zeros(x.shape), training).y
            y, dy, _ = self.neighbour(normed, head_for, training)
            step = self.oracle(x, dy, training)
            return y, step.dx, step.dgamma, step.dbeta
        h, _, _ = self.neighbour(x, lambda shape: np.zeros(shape), training)
        step = self.oracle(h, head_for(h.shape), training)
        _, dx, _ = self.neighbour(x, step.dx, training)
        return step.y, dx, step.dgamma, step.dbeta


def ours(norm, name, position, values, x, device, *, hybrid):
    """What one net gives in inference and then in training, as `Reference.run` gives it."""
    net = nn.HybridSequential()
    layer = norm(in_channels=len(values["gamma"]))
    neighbour = initialized(LAYERS[name][1](), device)
    layer.initialize(ctx=device)
    net.add(*((layer, neighbour) if position == "behind" else (neighbour, layer)))
    data = array(np.asarray(x), device, "float32")
    if hybrid:
        net.hybridize()
    if not isinstance(neighbour, nn.Embedding):
        data.attach_grad()
    for training in (False, True):
        for _ in range(2):  # the second time memory holds what the first left in it
            set_values(layer, values)
            with autograd.record(train_mode=training):
                y = net(data)
            y.backward(array(head_for(y.shape), device, "float32"))
        yield [
            a if a is None else a.asnumpy().astype(np.float64)
            for a in (y, data.grad, layer.gamma.grad(), layer.beta.grad())
        ]


def check(actual, expected, title, atol=2e-5):
    for key, a, e in zip(("y", "dx", "dgamma", "dbeta"), actual, expected):
        if e is None:  # the neighbour takes indices
            assert a is None
            continue
        size = max(1.0, np.abs(e).max())
        np.testing.assert_allclose(
            a / size, e / size, err_msg=f"{title}: {key}", rtol=2e-4, atol=atol
        )


def data_for(name, position, rng):
    dims = LAYERS[name][0]
    if dims == 0:
        return rng.integers(0, 9, size=(4, CHANNELS)).astype(float)
    return rng.normal(size=SHAPES[dims])


def norm_values(name, position, x, rng, device):
    if position == "behind":
        return random_values(rng, CHANNELS)
    layer = initialized(LAYERS[name][1](), device)
    channels = layer(array(x, device, "float32")).shape[1]
    return random_values(rng, channels)


def compare(name, position, norms, rng, device, backend):
    if name == "BatchNormReLU" and device.device_type == "gpu":
        pytest.skip("MXNet has its operator on CPUs alone")
    x = data_for(name, position, rng)
    values = norm_values(name, position, x, rng, device)
    atol = 5e-4 if name.startswith(CANCELS) else 2e-5
    expected = {}
    for relu in (False, True):
        for training in (False, True):
            reference = Reference(name, values, device, relu=relu)
            step = reference.run(position, x, training)
            wrong = not training and name.startswith(WRONG_IN_INFERENCE)
            expected[relu, training] = step[:1] if wrong else step
    for title in norms:
        norm, relu = NORMS[title], title == "ScratchBatchNormReLU"
        if backend == "native" and not norm().is_stock:
            continue  # computed without the kernel, as on the portable backend
        for hybrid in (False, True):
            steps = ours(norm, name, position, values, x, device, hybrid=hybrid)
            for training, actual in zip((False, True), steps):
                check(actual, expected[relu, training], f"{title}, {training=}, {hybrid=}", atol)


def test_every_layer_of_gluon_is_tried():
    named = {name.partition(" ")[0] for name in LAYERS} | NOT_TRIED
    layers = {n for n in dir(nn) if isinstance(getattr(nn, n), type) and n[0].isupper()}
    assert layers - named == set()


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "Embedding"])
def test_behind_ours(name, rng, device, backend):
    compare(name, "behind", NORMS, rng, device, backend)


@pytest.mark.parametrize("name", LAYERS)
def test_before_ours(name, rng, device, backend):
    compare(name, "before", NORMS, rng, device, backend)


@pytest.mark.parametrize("position", ["before", "behind"])
@pytest.mark.parametrize("name", [n for n in LAYERS if "Lambda" not in n and n not in LEGACY])
def test_numpy_arrays(name, position, rng, device, backend):
    if name == "Embedding" and position == "behind":
        pytest.skip("takes indices")
    mx.npx.set_np()
    compare(name, position, ["ScratchBatchNorm"], rng, device, backend)


VIEWS = {
    "rows": lambda base: base[2:6],
    "reshape": lambda base: base[0:4].reshape((4, 8, 6, 6)),
    "split": lambda base: mx.nd.split(base, num_outputs=2, axis=0)[1],
    "transpose": lambda base: base[1:5].transpose((0, 1, 3, 2)),
    "expand_dims": lambda base: base[3].expand_dims(0),
}


@pytest.mark.parametrize("pool", ["MaxPool2D", "GlobalMaxPool2D", "MaxPool2D full"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_view_as_input(norm, view, pool, hybrid, rng, device):
    """The gradient arrives at the array that the view is of."""
    base = mx.nd.array(rng.normal(size=(8, 8, 6, 6)), ctx=device)
    values = random_values(rng, CHANNELS)
    x = VIEWS[view](base).asnumpy()
    relu = norm == "ScratchBatchNormReLU"
    expected = Reference(pool, values, device, relu=relu).run("behind", x, training=True)

    net = nn.HybridSequential()
    net.add(NORMS[norm](in_channels=CHANNELS), LAYERS[pool][1]())
    net.initialize(ctx=device)
    set_values(net[0], values)
    if hybrid:
        net.hybridize()
    base.attach_grad()
    with autograd.record():
        y = net(VIEWS[view](base))
    y.backward(mx.nd.array(head_for(y.shape), ctx=device))
    # What arrives at the base: the gradient through the view alone.
    base_gradient = base.grad.asnumpy()
    base.attach_grad()
    with autograd.record():
        seen = VIEWS[view](base)
    seen.backward(mx.nd.array(expected[1], ctx=device))
    check(
        (y.asnumpy(), base_gradient, net[0].gamma.grad().asnumpy(), net[0].beta.grad().asnumpy()),
        (expected[0], base.grad.asnumpy(), *expected[2:]),
        f"{norm} {view}",
    )


@pytest.mark.parametrize("norm", NORMS)
def test_the_output_is_an_array_of_its_own(norm, rng, device):
    """A view has the storage of another array, and writing to one shows in the other."""
    layer = NORMS[norm](in_channels=CHANNELS)
    layer.initialize(ctx=device)
    x = mx.nd.array(rng.normal(size=SHAPES[2]), ctx=device)
    for training in (True, False):
        with autograd.record(train_mode=training):
            y = layer(x)
        before = x.asnumpy()
        y.detach()[:] = 7
        mx.nd.waitall()
        np.testing.assert_array_equal(x.asnumpy(), before)
