"""The kernel on what hypothesis thinks of: right by the float64 oracle, or a clean error.

``SCRATCHBN_FUZZ`` is the number of examples of each test; a crash ends the process, and
``make sanitize`` runs many of them on a kernel that the sanitizers watch.
"""

import os

from scratchbn import ScratchBatchNorm, ScratchBatchNormReLU, native, use_backend
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import BFLOAT16, load_kernel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mxnet import autograd

EXAMPLES = int(os.environ.get("SCRATCHBN_FUZZ", 120))
CLOSE = {"float64": 1e-9, "float32": 2e-4, "float16": 2e-2, "bfloat16": 3e-2}
STATE = ("gamma", "beta", "running_mean", "running_var")
REQUESTS = st.sampled_from(["write", "add", "null"])
LAYOUTS = ("plain", "slice", "reshaped", "transposed", "onednn")
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
# A flag, a statistic or an element may be any of these.
ODD = st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38, 1e-45, -0.0])


@pytest.fixture(autouse=True, scope="module")
def kernel():
    load_kernel(mx.cpu())


# --- layers ---------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Return the options of a layer, its data, and how it is called."""
    size = st.sampled_from([1, 1, 2, 3, 5, 8, 17, 0])
    shape = [draw(size) for _ in range(draw(st.sampled_from([2, 3, 4, 4, 5, 6])))]
    layout = draw(st.sampled_from(LAYOUTS))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = draw(st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"]))
    if layout == "onednn":  # between convolutions, channels in blocks of 8 or 16
        shape, dtype = (
            [draw(st.sampled_from([1, 3])), draw(st.sampled_from([3, 8, 16])), 5, 4],
            "float32",
        )
        shape += [3] * draw(st.booleans())
        axis = draw(st.integers(-len(shape), len(shape) - 1))
    # A convolution mixes a NaN into every channel.
    odd = st.none() if layout == "onednn" else st.one_of(st.none(), st.none(), ODD)
    options = {
        "axis": axis,
        "momentum": draw(st.sampled_from([0.9, 0.0, 1.0, None])),
        "scale": draw(st.booleans()),
        "center": draw(st.booleans()),
        "use_global_stats": draw(st.sampled_from([False, False, True])),
        "unbiased_variance": draw(st.booleans()),
    }
    call = {
        "layout": layout,
        "relu": draw(st.booleans()),
        "hybrid": draw(st.booleans()),
        "training": draw(st.sampled_from([True, True, False])),
        "numpy": draw(st.booleans()) and layout != "onednn" and dtype != "bfloat16",
        "context": mx.cpu(draw(st.integers(0, 3))),
        "requests": {name: draw(REQUESTS) for name in ("data", "gamma", "beta")},
        "odd": draw(odd),
        "mean": draw(st.sampled_from([0.0, 3.0, 200.0])),
        "seed": draw(st.integers(0, 99)),
    }
    return tuple(shape), dtype, options, call


def laid_out(values, layout, dtype, context):
    """Return an array of these values, which may share memory with a larger one."""
    if dtype == "bfloat16":  # NumPy has none, and MXNet transposes none
        whole = laid_out(values, "plain", "float32", context)
        if layout == "slice":
            return mx.nd.concat(whole[:1], whole, dim=0).astype(BFLOAT16)[1:]
        whole = whole.astype(BFLOAT16)
        return whole.reshape(-1).reshape(whole.shape) if layout == "reshaped" else whole
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    if layout == "slice":
        padded = np.concatenate([values[:1], values, values[:1]])
        return make(padded, dtype=dtype, ctx=context)[1 : 1 + len(values)]
    if layout == "reshaped":
        return make(values.reshape(-1), dtype=dtype, ctx=context).reshape(values.shape)
    if layout == "transposed":
        return make(np.ascontiguousarray(values.T), dtype=dtype, ctx=context).transpose()
    return make(values, dtype=dtype, ctx=context)


def held(values, dtype):
    """Return what an array of this dtype holds of these values, in what NumPy has."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    return (values.astype("float32").view("uint32") & np.uint32(0xFFFF0000)).view("float32")


def through_convolution(x):
    """Return `x`, written by oneDNN; its gradient is written by oneDNN too."""
    channels, kernel = x.shape[1], (1,) * (x.ndim - 2)
    weight = mx.nd.array(np.eye(channels).reshape((channels, channels, *kernel)), ctx=x.context)
    return mx.nd.Convolution(x, weight, kernel=kernel, num_filter=channels, no_bias=True)


def built(shape, dtype, options, call, rng):
    """Return a layer whose parameters are those of the oracle, and the oracle."""
    channels = shape[options["axis"]]
    kind = ScratchBatchNormReLU if call["relu"] else ScratchBatchNorm
    layer = kind(**options, in_channels=channels)
    layer.initialize(ctx=call["context"])
    layer.cast(dtype)
    values = {
        "gamma": rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels),
        "beta": rng.normal(size=channels),
        "running_mean": rng.normal(call["mean"], 1, channels),
        "running_var": rng.uniform(0.5, 2, channels),
    }
    values = {k: v.astype(layer.gamma.dtype) for k, v in values.items()}
    for name, value in values.items():
        parameter = getattr(layer, name)
        parameter.set_data(laid_out(value, "plain", parameter.dtype, call["context"]))
    for name, trained in (("gamma", options["scale"]), ("beta", options["center"])):
        if trained:
            getattr(layer, name).grad_req = call["requests"][name]
    if call["hybrid"]:
        layer.hybridize(static_alloc=call["seed"] % 2 == 0)
    return layer, OracleBatchNorm(**values, **options, relu=call["relu"])


def step(layer, shape, dtype, call, x, dy):
    """Take a step; return output and gradients as NumPy arrays, those that were asked for."""
    context, request = call["context"], call["requests"]["data"]
    there = 1 if dtype == "bfloat16" else 7  # what is in a gradient before; bfloat16 has 3 digits
    data = laid_out(x, call["layout"], dtype, context)
    head = laid_out(dy, call["layout"], dtype, context)
    onednn = call["layout"] == "onednn"
    if request != "null":
        data.attach_grad(grad_req=request)
        data.grad[:] = there
    wanted = {"dx": data} if request != "null" else {}
    for name in ("gamma", "beta"):
        parameter = getattr(layer, name)
        if parameter.grad_req != "null":
            parameter.grad(context)[:] = there
            wanted[f"d{name}"] = parameter.data(context)
    with use_backend("native"), autograd.record(train_mode=call["training"]):
        y = layer(through_convolution(data) if onednn else data)
        y = through_convolution(y) if onednn else y
    if wanted:
        y.backward(head, train_mode=call["training"])
    assert y.dtype == data.dtype
    found = {"y": as_numpy(y)}
    requests = {**call["requests"], "x": request}
    for name, array in wanted.items():
        before = there if requests[name[1:]] == "add" else 0
        found[name] = as_numpy(array.grad).astype(np.float64) - before
    return found


def as_numpy(array):
    return (array.astype("float32") if array.dtype == BFLOAT16 else array).asnumpy()


@fuzzed
@given(problem=problems())
def test_any_layer_is_right(problem):
    shape, dtype, options, call = problem
    rng = np.random.default_rng(call["seed"])
    empty = 0 in shape
    shapes, arrays = mx.util.is_np_shape(), mx.util.is_np_array()
    mx.npx.set_np(shape=empty or call["numpy"] or shapes, array=call["numpy"])
    try:
        if empty and (call["layout"] in ("slice", "onednn") or shape[options["axis"]] == 0):
            return  # MXNet has no such slices, and Gluon no Parameters of no elements
        layer, oracle = built(shape, dtype, options, call, rng)
        before = {name: getattr(oracle, name) for name in STATE[2:]}
        x = held(rng.normal(call["mean"], 2, shape), dtype)
        dy = held(rng.normal(size=shape), dtype)
        if call["odd"] is not None and x.size:
            x.reshape(-1)[0] = held(np.array([call["odd"]]), dtype)[0]
        if call["relu"]:  # where rounding decides about the kink there is no gradient
            linear = OracleBatchNorm(**{k: getattr(oracle, k) for k in STATE}, **options)
            take = linear.train_step if call["training"] else linear.infer_step
            dy[np.abs(np.nan_to_num(take(x, dy).y)) < 1e-2] = 0
        expected = (oracle.train_step if call["training"] else oracle.infer_step)(x, dy)
        try:
            found = step(layer, shape, dtype, call, x, dy)
        except mx.MXNetError as error:
            assert empty, error  # some of MXNet's own operators have nothing to say to no elements
            return
        mx.nd.waitall()
        statistics = [getattr(layer, k).data(call["context"]).asnumpy() for k in STATE[2:]]
    finally:
        mx.nd.waitall()
        mx.npx.set_np(shape=shapes, array=arrays) if shapes else mx.npx.reset_np()
    compare(found, expected, x, options["axis"], dtype)
    # A variance that float32 cannot hold is no statistic; the oracle's float64 holds it.
    huge = call["odd"] == 3e38 and dtype in ("float32", "bfloat16")
    overflows = huge and x.size > x.shape[options["axis"]]
    for name, value in zip(STATE[2:], statistics):
        want = before[name] if overflows else getattr(oracle, name)
        size = max(1, np.abs(want).max())
        np.testing.assert_allclose(value / size, want / size, rtol=0, atol=CLOSE[dtype])


def compare(found, expected, x, axis, dtype):
    """Compare channels of finite data; what a channel with NaN becomes is its own affair."""
    assert found["y"].shape == x.shape
    assert found["y"].dtype == x.dtype
    over = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    with np.errstate(over="ignore", invalid="ignore"):
        sane = (np.abs(x.astype(np.float64)) < 1e4).all(axis=over)
    for name, value in found.items():
        want = getattr(expected, name)
        if name in ("y", "dx"):
            value, want = (np.moveaxis(a, axis, -1) for a in (value, want))
        value, want = value[..., sane], want[..., sane]
        size = np.abs(want).max(initial=1)
        np.testing.assert_allclose(
            value / size, want / size, rtol=0, atol=CLOSE[dtype], err_msg=name
        )


# --- the operator itself --------------------------------------------------------------------------

NAMES = ("data", *STATE, "flag", "count")
WORDS = ["True", "False", True, False, "yes", "1", "", None]
NUMBERS = [0.9, 0, 1, "0.5", None, "None", "nan", "inf", "1e400", "x", "", -1]


@st.composite
def operators(draw):
    """Return attributes and input shapes; most are right."""

    def maybe(right, wrong):
        return draw(st.sampled_from(wrong)) if draw(st.integers(0, 19)) == 0 else right

    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 8]), min_size=1, max_size=6)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    momentum = maybe(draw(st.sampled_from([0.9, None])), NUMBERS)
    attributes = {
        "axis": maybe(axis, [7, -7, 2**31, -(2**63), "x", "1.5", "", None]),
        "epsilon": maybe(1e-5, NUMBERS),
        "momentum": momentum,
        **{k: maybe(draw(st.booleans()), WORDS) for k in ("scale", "center", "relu")},
        "unbiased_variance": maybe(False, WORDS),
    }
    names = NAMES if momentum is None else NAMES[:-1]
    lengths = {"data": shape, "flag": (1,), "count": (1,)}
    wrong = [(1,), (2,), (4,), (1, 3), (3, 1), (100,)]
    shapes = {n: maybe(lengths.get(n, (shape[axis],)), wrong) for n in names}
    shapes["data"] = shape
    return attributes, shapes


def is_right(attributes, shapes):
    """Tell whether the operator has anything to compute."""
    shape, axis = shapes["data"], attributes["axis"]
    numbers = {0.9, 0, 1, "0.5", -1}
    if not (len(shape) >= 2 and isinstance(axis, int) and -len(shape) <= axis < len(shape)):
        return False
    words = [attributes[k] for k in ("scale", "center", "relu", "unbiased_variance")]
    counted = attributes["momentum"] in (None, "None")
    return (
        all(str(word) in ("True", "False") for word in words)
        and attributes["epsilon"] in {*numbers, 1e-5}
        and (counted or attributes["momentum"] in numbers)
        and counted == ("count" in shapes)
        and all(shapes[name] == (shape[axis],) for name in STATE)
        and all(shapes[name] == (1,) for name in ("flag", "count") if name in shapes)
    )


@fuzzed
@given(operator=operators(), data=st.data())
def test_any_call_of_the_operator_is_an_error_or_right(operator, data):
    attributes, shapes = operator
    dtypes = st.sampled_from(["float32"] * 30 + ["float16", "float64", "int32", "uint8", "int64"])
    types = {name: data.draw(dtypes) for name in shapes}
    arrays = {name: mx.nd.ones(shape, dtype=types[name]) for name, shape in shapes.items()}
    flag = data.draw(st.one_of(st.sampled_from([0.0, 1.0, 2.0]), ODD))
    arrays["flag"][:] = flag
    arrays["data"][:] = data.draw(st.sampled_from([2.0, float("nan"), float("inf")]))
    right = is_right(attributes, shapes) and set(types.values()) == {"float32"}
    arrays["data"].attach_grad()
    try:
        with autograd.record():
            y = native.batch_norm(mx.nd, *arrays.values(), **attributes)[0]
        y.backward()
        arrays["data"].grad.wait_to_read()
        y.wait_to_read()
    except mx.MXNetError:
        assert not right, (attributes, shapes)
        return
    assert right, (attributes, shapes, types)
    if (arrays["data"] == 2).asnumpy().all() and attributes["epsilon"] == 1e-5:
        # 2 in every place, all parameters 1: the batch has no variance, the running one is 1
        beta = 1 if attributes["center"] in (True, "True") else 0
        normalized = 1 / np.sqrt(1 + 1e-5) if flag == 1 else 0
        np.testing.assert_allclose(y.asnumpy(), normalized + beta, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Cannot decide")
@fuzzed
@given(operator=operators(), data=st.data())
def test_any_inference_of_a_symbol_is_an_error_or_right(operator, data):
    attributes, shapes = operator
    try:
        symbol = native.batch_norm(mx.sym, *map(mx.sym.var, shapes), **attributes)[0]
    except (mx.MXNetError, TypeError):
        assert not is_right(attributes, shapes)
        return
    stated = {name: shape for name, shape in shapes.items() if data.draw(st.integers(0, 4))}
    if data.draw(st.booleans()):  # sizes that are not known yet
        stated = {
            n: tuple(data.draw(st.sampled_from([k, k, 0])) for k in s) for n, s in stated.items()
        }
    kind = data.draw(st.sampled_from(["float32", "float64", "float16", "int32"]))
    typed = {name: kind for name in shapes if data.draw(st.booleans())}
    for infer, given_ in (
        (symbol.infer_shape, stated),
        (symbol.infer_shape_partial, stated),
        (symbol.infer_type, typed),
        (symbol.infer_type_partial, typed),
    ):
        try:
            _, outputs, _ = infer(**given_)
        except mx.MXNetError:
            continue
        if infer == symbol.infer_shape and outputs and stated == shapes:
            numbers = {name: (1,) for name in ("flag", "count") if name in shapes}
            assert is_right(attributes, {**shapes, **numbers})  # the kernel refuses those itself
            assert outputs == [shapes["data"]]


HUGE = [
    (70_000, 40_000),
    (3, 2**30, 2),
    (2**31 - 1, 2),
    (2, 3, 2**31 - 1),
    (2**16, 2**16, 3, 2**10),
]


@pytest.mark.parametrize("shape", HUGE)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_shapes_of_more_than_two_to_the_31_elements_are_inferred(shape, axis):
    with use_backend("native"):
        symbol = ScratchBatchNorm(axis=axis)(mx.sym.var("data"))
    arguments, outputs, states = symbol.infer_shape(data=shape)
    assert outputs == [shape]
    assert set(arguments[1:]) | set(states) == {(shape[axis],)}


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_integers_are_refused(dtype, hybrid):
    layer = ScratchBatchNorm(in_channels=3)
    layer.initialize()
    layer.hybridize(hybrid)
    with use_backend("native"), pytest.raises(TypeError, match="data must be"):
        layer(mx.nd.ones((2, 3), dtype=dtype))
