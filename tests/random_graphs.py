"""Random graphs around norms: chains that branch and meet again, and layers that share.

Each grows by layers, norms and what lies between, with layers that share their parameters, and
more than one output.
"""

import mxnet as mx
import numpy as np
from hypothesis import strategies as st

S = mx.sym


class Builder:
    """A symbol that grows by what hypothesis draws; `parts` are its outputs and their shapes."""

    def __init__(self, draw, shape, dtype):
        self.draw, self.shape, self.dtype = draw, shape, dtype
        self.count = 0
        self.parts = [(S.var("data"), shape)]

    def choose(self, *values):
        return self.draw(st.sampled_from(values))

    def name(self, kind):
        self.count += 1
        return f"{kind}{self.count}"

    def add(self, step, position):
        """Put an operator on a part, if MXNet finds that it fits."""
        x, shape = self.parts[position]
        try:
            y = step(self, x, shape)
            _, (found,), _ = y.infer_shape(data=self.shape)
        except (mx.MXNetError, Unfit):
            return
        # MXNet finds some reshapes possible, and ends the process when it runs them.
        lost = step is reshape and np.prod(found) != np.prod(shape)
        if 0 < np.prod(found) < 5000 and not lost:
            self.parts.append((y, found))


class Unfit(Exception):
    """An operator that does not fit its input."""


def spatial(shape, *ranks):
    if len(shape) - 2 not in ranks:
        raise Unfit
    return len(shape) - 2


def convolution(b, x, shape, **shared):
    rank, kernel, groups = spatial(shape, 1, 2, 3), b.choose(1, 2), b.choose(1, 1, 2)
    options = {"kernel": (kernel,) * rank, "num_group": groups, "pad": (b.choose(0, 0, 1),) * rank}
    bias = {"no_bias": b.choose(True, False)}
    return S.Convolution(x, num_filter=b.choose(2, 4), name=b.name("conv"), **options, **bias)


def deconvolution(b, x, shape):
    rank = spatial(shape, 1, 2)
    options = {
        "kernel": (2,) * rank,
        "stride": (b.choose(1, 2),) * rank,
        "num_group": b.choose(1, 2),
    }
    return S.Deconvolution(x, num_filter=4, name=b.name("deconv"), **options)


def dense(b, x, shape):
    options = {"flatten": b.choose(True, False), "no_bias": b.choose(True, False)}
    return S.FullyConnected(x, num_hidden=b.choose(2, 4), name=b.name("fc"), **options)


def norm(b, x, shape):
    options = {"fix_gamma": b.choose(True, False)}
    options |= b.choose({}, {"eps": 1e-5}, {"eps": 0.1}) | b.choose({}, {"momentum": 0.5})
    options |= b.choose({}, {"use_global_stats": True})
    kinds = ["BatchNorm"] * 3
    if len(shape) in (2, 4):
        kinds += ["BatchNorm_v1"]
        kinds += ["SyncBatchNorm"] if b.dtype == "float32" else []
    if len(shape) == 4 and b.dtype == "float32":
        kinds += ["BatchNormWithReLU"]
    kind = b.choose(*kinds)
    if kind == "BatchNorm" and b.choose(True, False, False):
        options["axis"] = b.choose(*range(-len(shape), len(shape)))
    name = b.name("bn")
    if kind == "SyncBatchNorm":
        return S.contrib.SyncBatchNorm(x, name=name, key=name, **options)
    return getattr(S.contrib if kind == "BatchNormWithReLU" else S, kind)(x, name=name, **options)


def layer_and_norm(b, x, shape):
    producer = b.choose(convolution, convolution, dense)
    return norm(b, producer(b, x, shape), shape[:2] if producer is dense else shape)


def between(b, x, shape):
    return b.choose(
        lambda: S.relu(x),
        lambda: S.Activation(x, act_type="tanh"),
        lambda: S.LeakyReLU(x, act_type="leaky"),
        lambda: S.Dropout(x, p=0.5),
        lambda: S.BlockGrad(x),
        lambda: S.identity(x),
        lambda: S.clip(x, a_min=-1.0, a_max=1.0),
        lambda: S.LRN(x, nsize=3),
        lambda: S.softmax(x, axis=1),
        lambda: S.L2Normalization(x),
        lambda: S.SwapAxis(x, dim1=1, dim2=len(shape) - 1),
        lambda: S.Dropout(x, p=0.5) + x,
    )()


def scalar(b, x, shape):
    number = b.choose(-2.0, 0.25, 1.0, 3.0)
    operators = (lambda: x + number, lambda: x - number, lambda: number - x)
    return b.choose(
        *operators, lambda: x * number, lambda: x / number, lambda: number / (2 + x * x)
    )()


def reshape(b, x, shape):
    tail = (1,) * b.choose(0, 1, 2)
    return b.choose(
        lambda: S.Flatten(x),
        lambda: S.Reshape(x, shape=(0, -1, *tail)),
        lambda: S.Reshape(x, shape=(0, 0, -1)),
        lambda: S.Reshape(x, shape=(-1, shape[1], *tail)),
        lambda: S.Reshape(x, shape=(0, shape[1], *tail)),
        lambda: S.Reshape(x, shape=(0, 0, -1), reverse=True),
        lambda: S.expand_dims(x, axis=2),
        lambda: S.transpose(x),
    )()


def resize(b, x, shape):
    rank = spatial(shape, 2)
    return b.choose(
        lambda: S.Pooling(x, kernel=(2,) * rank, pool_type=b.choose("max", "avg"), stride=(1, 1)),
        lambda: S.Pooling(x, kernel=(1, 1), pool_type="avg", global_pool=True),
        lambda: S.UpSampling(x, scale=2, sample_type="nearest"),
        lambda: S.Crop(x, h_w=(1, 1), num_args=1),
        lambda: S.mean(x, axis=(2, 3), keepdims=b.choose(True, False)),
        lambda: S.slice_axis(x, axis=1, begin=0, end=1),
    )()


def join(b, x, shape):
    others = [y for y, other in b.parts if len(other) == len(shape)]
    return b.choose(
        lambda: S.Concat(x, b.choose(*others), dim=b.choose(1, 1, 1, 2)),
        lambda: x + b.choose(*others),
        lambda: S.broadcast_add(x, b.choose(*others)),
    )()


def fork(b, x, shape):
    """Two layers on one input, a norm on both together."""
    y = S.Concat(convolution(b, x, shape), scalar(b, convolution(b, x, shape), shape), dim=1)
    return norm(b, y, shape)


def towers(b, x, shape):
    """One layer and one norm, called on two inputs."""
    rank, name = spatial(shape, 1, 2), b.name("tower")
    layer = {"weight": S.var(f"{name}_weight"), "num_filter": 4, "kernel": (2,) * rank}
    roles = ("gamma", "beta", "moving_mean", "moving_var")
    own = {role: S.var(f"{name}_{role}") for role in roles}
    alike = b.choose(True, True, False)

    def call(y, i):
        y = S.Convolution(y, no_bias=True, name=f"{name}_{i}", **layer)
        parameters = own if alike else {}
        return S.BatchNorm(y, fix_gamma=False, name=f"{name}_bn{i}", **parameters)

    return S.broadcast_add(call(x, 0), call(b.choose(x * 2, x + 1), 1))


STEPS = [
    *([convolution, norm, layer_and_norm] * 3),
    *([dense, between, scalar, reshape, join, fork] * 2),
    *(resize, deconvolution, towers),
]


@st.composite
def graphs(draw):
    """Return a symbol, parameters, inputs, and the type of all."""
    rank = draw(st.sampled_from([2, 3, 4, 4, 4, 5]))
    shape = (draw(st.sampled_from([1, 2, 3])), *draw(st.sampled_from([(2,), (4,)])), 4, 3, 3)[:rank]
    dtype = draw(st.sampled_from(["float32", "float64"]))
    builder = Builder(draw, shape, dtype)
    for _ in range(draw(st.integers(1, 9))):
        last = len(builder.parts) - 1
        position = draw(st.sampled_from([last, last, last, draw(st.integers(0, last))]))
        builder.add(draw(st.sampled_from(STEPS)), position)
    heads = [builder.parts[-1][0]]
    if draw(st.booleans()):
        heads.append(draw(st.sampled_from([part for part, _ in builder.parts])))
    symbol = S.Group(heads)
    arguments, _, auxiliary = symbol.infer_shape(data=shape)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    named = zip([*symbol.list_arguments(), *symbol.list_auxiliary_states()], arguments + auxiliary)
    values = {
        n: rng.uniform(0.5, 2, s) if n.endswith("var") else rng.normal(size=s) for n, s in named
    }
    arrays = {n: mx.nd.array(value, dtype=dtype) for n, value in values.items()}
    inputs = {"data": arrays.pop("data", mx.nd.zeros(shape, dtype=dtype))}
    return symbol, arrays, inputs, dtype
