"""Random small graphs: what is written computes what the net does, or a node is named."""

import os
import re
import tempfile
import warnings
from pathlib import Path

from scratchbn import convert_files

import mxnet as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from mxnet.gluon import SymbolBlock
from onnx_symbols import as_net, check_export, outputs_of, renamed, unstated
from random_graphs import graphs as graphs_that_branch

S = mx.sym
NAMED = re.compile(r"node '.+' \(\w+\)|dynamic_batch must be False")


def some(draw, *values):
    return draw(st.sampled_from(values))


def flag(draw):
    return draw(st.booleans())


class Shape(tuple):
    """Lengths of the axes, and what they allow."""

    @property
    def spatial(self):
        return len(self) - 2


def convolution(draw, x, shape):
    n = shape.spatial
    if n < 1:
        return dense(draw, x, shape)
    kernel = tuple(some(draw, 1, 2, 3) for _ in range(n))
    options = {"kernel": kernel, "num_filter": some(draw, 2, 4), "no_bias": flag(draw)}
    options |= {"stride": (some(draw, 1, 2),) * n, "pad": (some(draw, 0, 1),) * n}
    if flag(draw):
        return S.Deconvolution(x, **options)
    if shape[1] % 2 == 0:
        options["num_group"] = some(draw, 1, 2)
    return S.Convolution(x, dilate=(some(draw, 1, 2),) * n, **options)


def dense(draw, x, shape):
    return S.FullyConnected(x, num_hidden=some(draw, 3, 4), flatten=flag(draw))


def batch_norm(draw, x, shape):
    axis = some(draw, 1, 1, len(shape) - 1)
    return S.BatchNorm(x, axis=axis, fix_gamma=flag(draw), eps=some(draw, 1e-3, 1e-5))


def other_norm(draw, x, shape):
    kind = some(draw, "layer", "instance", "group", "l2", "lrn")
    if kind == "layer":
        return S.LayerNorm(x, axis=some(draw, -1, 1), eps=some(draw, 1e-5, 0.1))
    if kind == "instance":
        return S.InstanceNorm(x, eps=some(draw, 1e-3, 0.1))
    if kind == "group":
        return S.GroupNorm(x, num_groups=some(draw, 1, 2))
    if kind == "l2":
        return S.L2Normalization(x, mode=some(draw, "instance", "channel", "spatial"))
    return S.LRN(x, nsize=some(draw, 1, 3), alpha=some(draw, 1e-4, 0.5), knorm=some(draw, 2, 1))


def pooling(draw, x, shape):
    n = shape.spatial
    options = {"pool_type": some(draw, "max", "avg", "avg", "sum", "lp")}
    if options["pool_type"] == "lp":
        options["p_value"] = 2
    if some(draw, False, False, True):
        return S.Pooling(x, global_pool=True, **options)
    options["kernel"] = tuple(some(draw, 2, 3) for _ in range(n))
    if flag(draw):
        options["count_include_pad"] = flag(draw)
    if flag(draw):
        options["stride"] = tuple(some(draw, 1, 2, 3) for _ in range(n))
    options["pad"] = tuple(some(draw, 0, 1) for _ in range(n))
    return S.Pooling(x, pooling_convention=some(draw, "valid", "full"), **options)


def activation(draw, x, shape):
    kind = some(draw, "prelu", "leaky", "elu", "selu", "gelu", "relu", "softsign", "tanh", "clip")
    if kind in ("relu", "softsign", "tanh"):
        return S.Activation(x, act_type=kind)
    if kind == "clip":
        return S.clip(x, a_min=-0.5, a_max=some(draw, 0.5, 6))
    return S.LeakyReLU(x, act_type=kind, slope=some(draw, 0.25, 0.1))


def softmax(draw, x, shape):
    kind = some(draw, "softmax", "log", "output", "multi", "channel", "instance")
    if kind == "softmax":
        return S.softmax(x, axis=some(draw, -1, 1), temperature=some(draw, None, 2.0))
    if kind == "log":
        return S.log_softmax(x, axis=some(draw, -1, 1))
    if kind in ("output", "multi"):
        return S.SoftmaxOutput(x, S.var("data1"), multi_output=kind == "multi")
    return S.SoftmaxActivation(x, mode=kind)


def reduction(draw, x, shape):
    axes = st.integers(0, len(shape) - 1)
    axis = draw(st.one_of(st.none(), axes, st.lists(axes, min_size=1, max_size=2, unique=True)))
    options = {"axis": axis if axis is None or isinstance(axis, int) else tuple(axis)}
    options["keepdims"] = flag(draw)
    kind = some(draw, "mean", "max", "min", "sum", "prod", "norm")
    if kind == "norm":
        return S.norm(x, ord=some(draw, 1, 2), **options)
    return getattr(S, kind)(x, exclude=flag(draw), **options)


def arithmetic(draw, x, shape):
    kind = some(draw, "+", "-", "r-", "*", "/", "r/", "max", "power", "compare", "twice")
    return {
        "+": lambda: x + 2,
        "-": lambda: x - 0.5,
        "r-": lambda: 1 - x,
        "*": lambda: x * 0.3,
        "/": lambda: x / 3,
        "r/": lambda: 2 / (S.abs(x) + 1),
        "max": lambda: S.maximum(x, 0.1),
        "power": lambda: (S.abs(x) + 0.1) ** 1.5,
        "compare": lambda: x > 0.1,
        "twice": lambda: S.relu(x) + S.sigmoid(x),
    }[kind]()


def fitting(x, shape, new):
    """Reshape. MXNet does not check that the sizes are the same, and reads beyond its arrays."""
    y = S.Reshape(x, shape=new)
    _, (found,), _ = S.Reshape(S.var("x"), shape=new).infer_shape(x=shape)
    if np.prod(found) != np.prod(shape):
        raise ValueError(f"{shape} cannot become {found}")
    return y


def reshaping(draw, x, shape):
    kind = some(draw, "flat", "join", "codes", "swap", "transpose", "expand", "concat", "split")
    if kind == "split":
        first, last = S.split(x, num_outputs=2, axis=len(shape) - 1)
        return last - first
    return {
        "flat": lambda: S.Flatten(x),
        "join": lambda: S.Reshape(x, shape=(0, -3, -2)),
        "codes": lambda: fitting(x, shape, some(draw, (0, -1), (0, 1, -1), (-2,), (-1, 2))),
        "swap": lambda: S.SwapAxis(x, dim1=1, dim2=len(shape) - 1),
        "transpose": lambda: S.transpose(x),
        "expand": lambda: S.squeeze(S.expand_dims(x, axis=some(draw, 1, 2)), axis=None),
        "concat": lambda: S.concat(x, S.relu(x), dim=1),
    }[kind]()


def boxes(draw, x, shape):
    x = fitting(S.abs(x), shape, (0, -1, 6))
    options = {"id_index": some(draw, -1, 0), "topk": some(draw, -1, 3)}
    options |= {"in_format": some(draw, "corner", "center"), "force_suppress": flag(draw)}
    classes = S.floor(S.slice_axis(x, axis=2, begin=0, end=1))
    x = S.concat(classes, S.slice_axis(x, axis=2, begin=1, end=6), dim=2)
    return S.contrib.box_nms(x, overlap_thresh=0.3, coord_start=2, score_index=1, **options)


def seldom(draw, x, shape):
    kind = some(
        draw,
        "boxes",
        "slice",
        "dropout",
        "cumsum",
        "pad",
        "upsample",
        "adaptive",
        "embedding",
        "take",
    )
    weight = S.var(f"rows{draw(st.integers(0, 99))}_weight")
    return {
        "boxes": lambda: boxes(draw, x, shape),
        "slice": lambda: S.slice_axis(x, axis=1, begin=some(draw, 0, 1), end=None),
        "dropout": lambda: S.Dropout(x, mode=some(draw, "always", "training")),
        "cumsum": lambda: S.cumsum(x, axis=1),
        "pad": lambda: S.Pad(x, mode=some(draw, "edge", "constant"), pad_width=(0,) * 4 + (1,) * 4),
        "upsample": lambda: S.UpSampling(x, scale=2, sample_type="nearest"),
        "adaptive": lambda: S.contrib.AdaptiveAvgPooling2D(x, output_size=some(draw, 1, 2, 3)),
        "embedding": lambda: S.Embedding(x * 3, weight, input_dim=4, output_dim=2),
        "take": lambda: S.take(x, S.argmax(x, axis=1), axis=1, mode=some(draw, "clip", "wrap")),
    }[kind]()


STEPS = [
    convolution,
    convolution,
    dense,
    batch_norm,
    batch_norm,
    other_norm,
    pooling,
    pooling,
    activation,
    activation,
    softmax,
    reduction,
    arithmetic,
    reshaping,
    seldom,
]


@st.composite
def graphs(draw):
    """A chain of steps that MXNet accepts, with the shapes of its inputs."""
    sizes = [st.integers(1, 3), st.integers(2, 4), *[st.integers(4, 7)] * draw(st.integers(0, 3))]
    shape = Shape(draw(size) for size in sizes)
    shapes, x = {"data0": shape}, S.var("data0")
    for _ in range(draw(st.integers(1, 5))):
        step = draw(st.sampled_from(STEPS))
        try:
            y = step(draw, x, shape)
            if "data1" in y.list_inputs() and "data1" not in shapes:
                shapes["data1"] = shape[:1]
            _, (found, *_), _ = y.infer_shape(**shapes)
        except (mx.MXNetError, ValueError, TypeError):
            reject()
        if len(found) < 2 or 0 in found:
            break
        x, shape = y, Shape(found)
    return x, shapes


def examples(usual):
    """As many as ``SCRATCHBN_CORPUS`` says, or the usual number."""
    return settings(
        max_examples=int(os.environ.get("SCRATCHBN_CORPUS", usual)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def exported_or_refused(net, *arrays, **options):
    """Export a net and compare; if it is refused, a node is named and nothing is written."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "net.onnx")
        try:
            check_export(net, path, *arrays, **options)
        except ValueError as refusal:
            assert NAMED.search(str(refusal))
            assert not path.exists()


@examples(120)
@given(
    graphs(),
    st.booleans(),
    st.sampled_from([None, None, "", "node", "data0"]),
    st.booleans(),
    st.integers(12, 17),
    st.integers(0, 2**32 - 1),
)
def test_right_or_refused(graph, bare, name, dynamic, opset, seed):
    symbol, shapes = graph
    if symbol.name == "data0":
        reject()
    symbol = unstated(symbol) if bare else symbol
    symbol = symbol if name is None else renamed(symbol, name)
    rng = np.random.default_rng(seed)
    arrays = [[rng.normal(size=shape) for shape in shapes.values()] for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            net = as_net(symbol, rng, **shapes)
            net(*map(mx.nd.array, arrays[0]))[0].asnumpy()
        except (mx.MXNetError, ValueError, TypeError):
            reject()
        exported_or_refused(net, *arrays, dynamic_batch=dynamic, opset=opset)


@examples(30)
@given(graphs_that_branch(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_graphs_that_branch_and_share(graph, converted, dynamic, seed):
    symbol, params, inputs, _ = graph
    if symbol.list_outputs()[0] == "data" or "data" not in symbol.list_inputs():
        reject()
    params = {name: value.astype("float32") for name, value in params.items()}
    if converted:
        symbol, params, _ = convert_files(symbol, params, to="scratch")
    rng = np.random.default_rng(seed)
    arrays = [[rng.normal(size=inputs["data"].shape)] for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = SymbolBlock(symbol, [mx.sym.var("data", dtype="float32")])
        net.collect_params().load_dict({n: params[n] for n in symbol.list_inputs() if n in params})
        try:
            outputs = outputs_of(net, *arrays[0])
        except mx.MXNetError:
            reject()
        if not all(np.isfinite(y).all() for y in outputs):
            reject()
        exported_or_refused(net, *arrays, dynamic_batch=dynamic)
