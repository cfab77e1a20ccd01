"""The CUDA kernels' numbers: their own source, run on a CPU through the operator's own host code.

A call goes the way that MXNet's does, from attributes to launches. What is not proven here is what
needs a card: that its compiler and its threads do what the language says.
"""

import dataclasses

from scratchbn import native
from scratchbn.parity.oracle import OracleBatchNorm, batch_moments

# isort: split
import cuda_on_cpu
import mxnet as mx
import numpy as np
import pytest
from gpu_kit.steps import INFERENCE, TRAINING, Forward, Gradients, backward, forward
from kernel_cases import ONE_VALUE_PER_CHANNEL

pytestmark = [
    pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        mx.runtime.Features().is_enabled("CUDA"), reason="a driver of its own is in the process"
    ),
]

# Runs and columns, vectors and single elements, one block and many, one thread and all.
SHAPES = [
    ((4, 3), 1),
    ((8, 20, 24, 24), 1),
    ((5, 50, 5, 5), 1),
    ((3, 1, 50, 60), 1),
    ((1, 2, 8199), 1),
    ((2, 3, 4, 5, 6), 2),
    ((64, 512), 1),
    ((4, 9, 9, 64), -1),
    ((1500, 7), 1),
    ((2, 1300), 1),
    ((9, 300, 3), 1),
    ((6, 2, 34), 0),
    ((2, 3, 64), 1),
    ((2, 3), 1),
    # Sums that are added up in two steps, and channels that end within a block of columns.
    ((1200, 128), 1),
    ((720, 128, 3), 1),
    ((150, 170, 3), 1),
]
CLOSE = {"float64": 1e-13, "float32": 2e-6, "float16": 6e-4}  # float16: what rounding costs


@pytest.fixture(scope="module")
def driver():
    return cuda_on_cpu.Driver()


@pytest.fixture(scope="module")
def operator(driver):
    return cuda_on_cpu.operator_on(driver)


@pytest.fixture
def memory():
    return cuda_on_cpu.HostMemory()


def statistics_type(dtype):
    return "float32" if dtype == "float16" else dtype


def state_of(rng, channels, dtype, mean=0.0, flag=TRAINING, **more):
    kind = statistics_type(dtype)
    values = {
        "gamma": rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels),
        "beta": rng.normal(size=channels),
        "running_mean": rng.normal(mean, 1, channels),
        "running_var": rng.uniform(0.5, 2, channels),
        **more,
    }
    state = {name: np.array(value, kind, ndmin=1) for name, value in values.items()}
    return {**state, "flag": np.array([flag], "float32")}


def oracle_of(state, options, **more):
    names = ("gamma", "beta", "running_mean", "running_var")
    return OracleBatchNorm(**{name: state[name] for name in names}, **options, **more)


def apart(got, want, scale=0.0):
    """The largest error, relative to the largest value, or to `scale` if that is larger."""
    want = np.asarray(want)
    scale = max(np.abs(want).max(initial=1e-30), scale)
    return np.abs(np.asarray(got, np.float64) - want).max(initial=0) / scale


def largest_term(oracle, x, dy, training):
    """The largest gradient of x if statistics were constants."""
    fixed = dataclasses.replace(oracle)
    if training:
        fixed.running_mean, fixed.running_var = batch_moments(x, oracle.axis)
    return np.abs(fixed.infer_step(x, dy).dx).max(initial=0)


def errors_of_a_step(operator, memory, shape, axis, dtype, mean=0.0, training=True, **options):
    """Take one step; return how far each result is from the oracle's."""
    rng = np.random.default_rng(sum(shape) + axis)
    options = {"axis": axis, **options}
    flag = TRAINING if training else INFERENCE
    state = state_of(rng, shape[axis], dtype, mean, flag)
    if options.get("momentum", 0) is None:
        state["num_batches"] = np.array([2], statistics_type(dtype))
    x = rng.normal(mean, 1.5, shape).astype(dtype)
    dy = rng.normal(size=shape).astype(dtype)
    # The oracle sees the data without their mean, exactly, as float64 would cost it digits too.
    near = x.astype("float64") - mean
    oracle = oracle_of({**state, "running_mean": state["running_mean"] - mean}, options, batches=2)
    if options.get("relu"):  # elements at the kink, where rounding decides, take no part
        linear = dataclasses.replace(oracle, relu=False)
        linear = linear.train(near) if training else linear.infer(near)
        dy[np.abs(linear) < 1e-3] = 0
    want = oracle.train_step(near, dy) if training else oracle.infer_step(near, dy)
    outputs = forward(operator, memory, x, state, options)
    gradients = backward(operator, memory, dy, x, state, outputs, options)
    assert (outputs.token == 1).all()
    # These are sums whose terms cancel: their error is that of the terms.
    count = np.sqrt(max(x.size // shape[axis], 1))
    errors = {
        "y": apart(outputs.y, want.y),
        "dx": apart(gradients.dx, want.dx, largest_term(oracle, near, dy, training)),
        "dgamma": apart(gradients.dgamma, want.dgamma, count),
        "dbeta": apart(gradients.dbeta, want.dbeta, count),
        "mean": apart(state["running_mean"], oracle.running_mean + mean),
        "var": apart(state["running_var"], oracle.running_var),
    }
    if "num_batches" in state:
        assert state["num_batches"] == oracle.batches
    return errors


def assert_close(errors, dtype):
    exact = CLOSE[statistics_type(dtype)]
    close = {n: CLOSE[dtype] if n in ("y", "dx") else exact for n in errors}
    assert {n: e for n, e in errors.items() if not e <= close[n]} == {}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_every_way_through_an_array_gives_the_formulas(operator, memory, shape, axis, dtype):
    assert_close(errors_of_a_step(operator, memory, shape, axis, dtype), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 40, 40), 1), ((1500, 7), 1), ((4, 6, 4), 1)])
def test_a_mean_of_a_hundred_thousand_costs_nothing(operator, memory, shape, axis, dtype):
    assert_close(errors_of_a_step(operator, memory, shape, axis, dtype, mean=1e5), dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"relu": True},
        {"relu": True, "training": False},
        {"training": False},
        {"scale": False, "center": False},
        {"scale": False, "relu": True},
        {"momentum": None, "unbiased_variance": True},
        {"momentum": 0.0, "epsilon": 0.0},
        {"momentum": 1.0, "epsilon": 0.3},
        {"momentum": None, "training": False},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 6, 6), 1), ((50, 36), -1), ((40, 22, 3), 1)])
def test_options(operator, memory, shape, axis, options):
    for dtype in CLOSE:
        assert_close(errors_of_a_step(operator, memory, shape, axis, dtype, **options), dtype)


@pytest.mark.parametrize("shape", [(16, 2, 64, 64), (1200, 128), (720, 128, 3), (150, 170, 3)])
def test_bits_do_not_depend_on_which_block_is_the_last(operator, memory, monkeypatch, shape):
    """The last block that is done adds up what all have left, in an order of its own."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(1, 2, shape).astype("float32") for _ in range(2))
    results = []
    for variable in (None, "CUDA_ON_CPU_FIRST_BLOCK_FIRST", "CUDA_ON_CPU_BLOCKS_AT_ONCE"):
        if variable:
            monkeypatch.setenv(variable, "3")
        state = state_of(np.random.default_rng(1), shape[1], "float32")
        outputs = forward(operator, memory, x, state, {})
        gradients = backward(operator, memory, dy, x, state, outputs, {})
        results.append([*outputs, *gradients, state["running_mean"], state["running_var"]])
    for other in results[1:]:
        assert all((one == another).all() for one, another in zip(results[0], other))


def test_each_stream_counts_its_blocks_for_itself(operator):
    """The driver's stand-in looks whether all counters are zero before and after each kernel."""
    few, many = (1200, 128), (9, 48, 32, 16)
    for stream, shape in ((0x61, few), (0x62, many), (0x61, many)):
        memory = cuda_on_cpu.HostMemory()
        memory.stream = stream
        assert_close(errors_of_a_step(operator, memory, shape, 1, "float32"), "float32")


def test_an_odd_element_costs_little(operator, memory):
    """Sums are measured from first elements: here they are far from all others."""
    x = np.random.default_rng(0).normal(size=(64, 3, 40)).astype("float32")
    x[0, :, :8] = 1e4
    state = state_of(np.random.default_rng(1), 3, "float32")
    oracle = oracle_of(state, {})
    y = forward(operator, memory, x, state, {}).y
    assert apart(y, oracle.train(x)) < 2e-6
    assert apart(state["running_var"], oracle.running_var) < 1e-5


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [*SHAPES[:8], *ONE_VALUE_PER_CHANNEL])
def test_equal_elements_and_equal_gradients_give_zeros(operator, memory, shape, axis, relu):
    rng = np.random.default_rng(sum(shape))
    one = [n if i == axis % len(shape) else 1 for i, n in enumerate(shape)]
    options = {"axis": axis, "relu": relu}
    for dtype in CLOSE:
        state = state_of(rng, shape[axis], dtype)
        state["beta"][:] = 1
        x, dy = (np.ascontiguousarray(np.broadcast_to(rng.normal(3, 9, one), shape), dtype)
                 for _ in range(2))  # fmt: skip
        outputs = forward(operator, memory, x, state, options)
        gradients = backward(operator, memory, dy, x, state, outputs, options)
        assert (outputs.y == 1).all()
        assert not gradients.dx.any()
        assert not gradients.dgamma.any()


@pytest.mark.parametrize("axis", [1, -1])
def test_an_empty_batch_moves_nothing_and_has_gradients_of_zero(operator, memory, driver, axis):
    rng = np.random.default_rng(0)
    for shape in ((0, 3, 3), (4, 3, 0) if axis == 1 else (4, 0, 3)):
        state = state_of(rng, 3, "float32", num_batches=1.0)
        before = {name: value.copy() for name, value in state.items()}
        x = np.zeros(shape, "float32")
        options = {"axis": axis, "momentum": None}
        driver.launches()
        outputs = forward(operator, memory, x, state, options)
        gradients = backward(operator, memory, x, x, state, outputs, options)
        assert [name for name, _ in driver.launches()] == [
            "moments_float_1", "gradient_sums_float_1",
        ]  # fmt: skip
        assert all((state[name] == before[name]).all() for name in state)
        assert not gradients.dgamma.any()
        assert not gradients.dbeta.any()


def test_no_channels_at_all(operator, memory, driver):
    state = state_of(np.random.default_rng(0), 0, "float32")
    x = np.zeros((4, 0, 3), "float32")
    driver.launches()
    outputs = forward(operator, memory, x, state, {})
    backward(operator, memory, x, x, state, outputs, {})
    assert driver.launches() == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("shape", [(6, 300), (4, 20, 40)])
def test_a_batch_that_is_not_finite_moves_no_channel(operator, memory, shape, bad):
    """1e30 squares to more than float32 holds."""
    rng = np.random.default_rng(0)
    state = state_of(rng, shape[1], "float32", num_batches=3.0)
    before = {name: value.copy() for name, value in state.items()}
    x = rng.normal(size=shape).astype("float32")
    x[1, -1] = bad
    y = forward(operator, memory, x, state, {"momentum": None}).y
    assert np.isfinite(y[:, :-1]).all()
    assert all((state[name] == before[name]).all() for name in state)


def test_inference_reads_no_statistics_of_the_batch(operator, memory):
    rng = np.random.default_rng(0)
    state = state_of(rng, 5, "float64", flag=INFERENCE)
    before = {name: value.copy() for name, value in state.items()}
    x = rng.normal(size=(7, 5, 40))
    x[2, 3, 4] = np.nan
    want = oracle_of(state, {}).infer(x)
    y = forward(operator, memory, x, state, {}).y
    np.testing.assert_allclose(y, want, rtol=1e-13, atol=1e-13)
    assert all((state[name] == before[name]).all() for name in state)


def test_arrays_that_begin_anywhere(operator, memory, driver):
    """Vectors need an address that is a multiple of their size; elements do not."""
    rng = np.random.default_rng(0)
    whole = rng.normal(size=1 + 4 * 8 * 40).astype("float32")
    x, state = whole[1:].reshape(4, 8, 40), state_of(rng, 8, "float32")
    want = oracle_of(state, {}).train(x)
    driver.launches()
    assert apart(forward(operator, memory, x, state, {}).y, want) < 2e-6
    assert [name for name, _ in driver.launches()] == [
        "moments_float_1", "transform_float_1",
    ]  # fmt: skip


def test_what_is_launched_and_on_what(operator, memory, driver):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(4, 8, 40)).astype("float32") for _ in range(2))
    state = state_of(rng, 8, "float32")
    driver.launches()
    outputs = forward(operator, memory, x, state, {})
    gradients = backward(operator, memory, dy, x, state, outputs, {})
    launched = driver.launches()
    assert [name for name, _ in launched] == [
        "moments_float_4", "transform_float_4", "gradient_sums_float_4", "gradient_float_4",
    ]  # fmt: skip
    given = {
        "x": x, "y": outputs.y, "kept": outputs.kept, "flag": state["flag"], "dy": dy,
        "dx": gradients.dx,
    }  # fmt: skip
    for i, (_, fields) in enumerate(launched):
        for name, array in given.items():
            absent = name in (("dy", "dx") if i < 2 else ("y",))
            assert fields[name] == ("(nil)" if absent else hex(array.ctypes.data))
        assert fields["stream"] == hex(memory.stream)


def test_a_gradient_that_nobody_wants_is_not_computed(operator, memory, driver):
    rng = np.random.default_rng(0)
    x, state = rng.normal(size=(4, 8, 40)), state_of(rng, 8, "float64")
    outputs = forward(operator, memory, x, state, {})
    driver.launches()
    into = Gradients(None, np.empty(8), None)
    backward(operator, memory, x, x, state, outputs, {}, into)
    assert [name for name, _ in driver.launches()] == [
        "gradient_sums_double_2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "axis", "grid"),
    [
        ((16, 2, 64, 64), 1, "2x16"),  # C blocks, each split over the processors
        ((16, 64, 8, 8), 1, "64x1"),
        ((8192, 4), 1, "1x8"),  # one vector wide, 256 rows of threads
        ((1024, 256), 1, "2x32"),
        ((1024, 255), 1, "8x8"),  # no vectors
    ],
)
def test_work_is_cut_into_blocks_for_all_processors(operator, memory, driver, shape, axis, grid):
    """The stand-in has 8, of which each holds 8 blocks."""
    x = np.zeros(shape, "float32")
    state = state_of(np.random.default_rng(0), shape[axis], "float32", flag=INFERENCE)
    driver.launches()
    forward(operator, memory, x, state, {"axis": axis})
    assert driver.launches()[0][1]["grid"] == grid


def test_what_mxnet_asks_of_the_operator(operator):
    assert operator.name == "_scratchbn_batch_norm"
    assert operator.arity({}) == (1, 3)
    assert operator.mutated({}) == [3, 4]
    assert operator.mutated({"momentum": None}) == [3, 4, 6]
    assert operator.output_types("float16") == ["float16", "float32", "float32"]
    assert operator.output_shapes((5, 6, 7), {"axis": -1}) == [(5, 6, 7), (3, 7), (7,)]


def test_a_type_that_does_not_fit_is_refused(operator, memory):
    state = state_of(np.random.default_rng(0), 3, "float64")
    with pytest.raises(RuntimeError, match="FCompute"):
        forward(operator, memory, np.zeros((2, 3), "float32"), state, {})


def test_a_device_that_is_not_there_is_refused(operator):
    with pytest.raises(RuntimeError, match="cuDeviceGet: CUDA error 101"):
        operator.open(1)


def test_an_array_beyond_what_is_counted_is_refused_with_a_reason(operator, memory, driver, capfd):
    state = state_of(np.random.default_rng(0), 1, "float32")
    driver.launches()
    for shape, axis in (((1, 1, 2**31), 1), ((2**31, 1), 1)):
        x = np.broadcast_to(np.float32(1), shape)
        into = Forward(x, np.empty((3, 1), "float32"), np.empty(1, "float32"))
        with pytest.raises(RuntimeError, match="FCompute"):
            forward(operator, memory, x, state, {"axis": axis}, into)
        assert "scratchbn on gpu(0): the kernels do not count that far" in capfd.readouterr().err
    assert driver.launches() == []
