"""The built-in's defects on a CPU, reproduced; the same cases with ours; and what ours cannot do.

`docs/builtin-defects.md` is the table of these measurements.
"""

import importlib.util

from scratchbn import use_backend
from scratchbn.defects import DEFECTS, MODES, Bench, Defect, case, survey
from scratchbn.defects.measuring import batch, complaint, numpy_semantics, statistics
from scratchbn.defects.updates import Loop
from scratchbn.parity.oracle import OracleBatchNorm

import mxnet as mx
import numpy as np
import pytest
from helpers import REPOSITORY, run_python
from mxnet import autograd
from mxnet.gluon import SymbolBlock

PAGE = REPOSITORY / "docs" / "builtin-defects.md"
SCRIPT = REPOSITORY / "scripts" / "defects_table.py"
every_case = pytest.mark.parametrize("key", DEFECTS)
every_mode = pytest.mark.parametrize("mode", MODES)


@every_mode
@every_case
def test_built_in_is_wrong(device, key, mode):
    """The behaviour of `gluon.nn.BatchNorm`, as measured: a change of MXNet would show here."""
    if device.device_type != "cpu":
        pytest.skip("the built-in has other kernels on a GPU")
    outcome = DEFECTS[key].outcome("built-in", mode, device)
    assert outcome.broken, outcome.text
    assert not outcome.sound, outcome.text


@every_mode
@every_case
def test_ours_is_right(device, key, mode):
    outcome = DEFECTS[key].outcome("ours", mode, device)
    assert outcome.sound, outcome.text
    assert not outcome.broken, outcome.text


def test_the_page_lists_every_defect():
    listed = [
        line.split("-k ")[1].split("`")[0]
        for line in PAGE.read_text().splitlines()[1:]
        if line.startswith("|") and "-k " in line
    ]
    assert listed == list(DEFECTS)


def test_the_table_shows_both_modes_where_they_differ():
    """One row of the script's table, against what the case itself returns."""
    process = run_python(
        "import runpy, sys; sys.argv = ['defects_table.py', '--only', *sys.argv[1:]];"
        "runpy.run_path('scripts/defects_table.py', run_name='__main__')",
        "scale_false",
    )
    assert process.returncode == 0, process.stderr
    [row] = [line for line in process.stdout.splitlines() if "scale_false" in line]
    for norm in ("built-in", "ours"):
        for mode in MODES:
            assert DEFECTS["scale_false"].outcome(norm, mode, mx.cpu()).text in row
    assert row.count("eager: ") == 1
    assert row.count("graph: ") == 1


def load_script():
    spec = importlib.util.spec_from_file_location("defects_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_replaces_what_is_between_the_markers(tmp_path):
    script, page = load_script(), tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    script.replace_table(page, "| new |")
    assert page.read_text() == f"before\n{script.BEGIN}\n| new |\n{script.END}\nafter\n"
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("text", ["", "{BEGIN}", "{END} {BEGIN}", "{BEGIN} {BEGIN} {END}"])
def test_a_page_without_its_markers_is_left_alone(tmp_path, text):
    script, page = load_script(), tmp_path / "page.md"
    content = text.format(BEGIN=script.BEGIN, END=script.END)
    page.write_text(content)
    with pytest.raises(ValueError, match=r"page\.md must have one '<!-- defects: begin -->'"):
        script.replace_table(page, "| new |")
    assert page.read_text() == content


def test_a_case_that_fails_by_itself_is_not_taken_for_a_crash():
    defect = Defect("no_such_case", "", (), True, lambda bench: None)
    with pytest.raises(RuntimeError, match="no_such_case"):
        defect.outcome("built-in", "eager", mx.cpu())


def test_a_measurement_without_a_result_is_not_as_expected(monkeypatch):
    monkeypatch.setattr(case.sys, "executable", "/bin/false")
    [finding] = survey([DEFECTS["too_many_channels"]])
    assert len(finding.outcomes) == 4
    for line, mode in zip(finding.surprises(), MODES):
        assert line.startswith(f"too_many_channels, built-in, {mode}: no result: ")
        assert "exit status 1" in line
    assert len(finding.surprises()) == 2
    assert finding.surprises(["ours"]) == []


def test_a_process_that_hangs_is_the_defect(monkeypatch):
    monkeypatch.setattr(case, "_TIMEOUT", 0.01)
    outcome = DEFECTS["too_many_channels"].outcome("built-in", "eager", mx.cpu())
    assert outcome.broken
    assert "hangs" in outcome.text


@every_case
def test_a_cause_is_given(key):
    cause = DEFECTS[key].cause
    assert cause.endswith(".")
    assert len(cause.splitlines()) == 1


# What MXNet's max pooling gets wrong, whatever layer stands before it

VIEWS = {
    "reshape": lambda x: x.reshape((4, 3, 4, 4)),
    "rows": lambda x: x[1:3].reshape((2, 3, 4, 4)),
    "split_data": lambda x: mx.gluon.utils.split_data(x.reshape((4, 3, 4, 4)), 2)[1],
}


def pooled_gradient(x, view=None, *, train_mode=True):
    """The gradient of the sum of 2x2 maxima, and the exact one."""
    values = x.asnumpy() if view is None else view(x).asnumpy()
    windows = values.reshape((*values.shape[:2], 2, 2, 2, 2))
    exact = (windows == windows.max(axis=(3, 5), keepdims=True)).reshape(values.shape)
    kept = []
    for value in (7, 1 << 30, 255):  # what an array that nobody wrote may be found to hold
        kept.append(mx.nd.full((64,), value, dtype="int32", ctx=x.context))
    mx.nd.waitall()
    del kept
    pool = mx.gluon.nn.MaxPool2D(2)
    seen = x if view is None else view(x)
    seen.attach_grad()
    with autograd.record(train_mode=train_mode):
        y = pool(seen)
    y.backward()
    return seen.grad.asnumpy(), exact


@pytest.mark.parametrize("view", VIEWS)
def test_max_pooling_behind_a_view(device, rng, view):
    if device.device_type != "cpu":
        pytest.skip("an error of MXNet on a CPU")
    x = mx.nd.array(rng.normal(size=(4, 3, 16)), ctx=device)
    gradient, exact = pooled_gradient(x, VIEWS[view])
    assert not np.array_equal(gradient, exact)
    gradient, exact = pooled_gradient(x, lambda x: VIEWS[view](x).copy())
    np.testing.assert_array_equal(gradient, exact)


def test_max_pooling_recorded_in_inference(device, rng):
    if device.device_type != "cpu":
        pytest.skip("an error of MXNet on a CPU")
    x = mx.nd.array(rng.normal(size=(4, 3, 4, 4)), ctx=device)
    gradient, exact = pooled_gradient(x, train_mode=False)
    assert not np.array_equal(gradient, exact)
    gradient, exact = pooled_gradient(x.astype("float64"), train_mode=False)
    np.testing.assert_array_equal(gradient, exact)


# What ours cannot do


@pytest.fixture
def portable():
    with use_backend("portable"):
        yield


def test_limit_empty_float32_batch_in_a_graph(portable, device):
    """MXNet cannot reshape an empty float32 array in a graph on a CPU: a clean error."""
    if device.device_type != "cpu":
        pytest.skip("an error of MXNet on a CPU")
    bench = Bench("ours", "graph", device)
    layer = bench.layer(3)
    with numpy_semantics(array=False):
        net = bench.net(layer)
        error = complaint(lambda: bench.step(net, np.zeros((0, 3))))
    assert error == "MXNetError: Check failed: delay_alloc"
    mean, var = statistics(layer)
    assert not mean.any()
    assert (var == 1).all()


@pytest.mark.parametrize("norm", ["built-in", "ours"])
def test_limit_gradient_of_a_hybridized_foreach(device, norm):
    """MXNet cannot run the backward of a loop whose body holds auxiliary states in a graph."""
    bench = Bench(norm, "graph", device)
    loop = Loop(bench.layer(3))
    loop.hybridize()
    error = complaint(lambda: bench.step(loop, batch((3, 8, 3))))
    assert error.startswith("MXNetError: Check failed: outputs.size() ==")


def test_limit_gradient_at_a_nan_in_inference(portable, device):
    """In a graph the gradient at an element that is NaN is NaN, and there only."""
    x = batch().copy()
    x[0, 0, 0, 0] = np.nan
    exact = OracleBatchNorm.fresh(3).infer_step(x, np.ones(x.shape)).dx
    for mode in MODES:
        bench = Bench("ours", mode, device)
        dx = bench.step(bench.net(bench.layer(3)), x, record_train=False)[1]
        if mode == "graph":
            exact[0, 0, 0, 0] = np.nan
        np.testing.assert_allclose(dx, exact, rtol=1e-6)


def test_limit_dtype_of_an_exported_graph(device, tmp_path):
    """A graph exported in float32 can be cast to float64, but refuses float16."""
    bench = Bench("ours", "graph", device)
    net = bench.net(bench.layer(3))
    net(bench.array(batch()))
    net.export(str(tmp_path / "net"))
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net-0000.params")]

    def imported(dtype):
        block = SymbolBlock.imports(files[0], ["data"], files[1], ctx=device)
        block.cast(dtype)
        return block

    y = imported("float64")(bench.array(batch(), "float64")).asnumpy()
    np.testing.assert_allclose(y, OracleBatchNorm.fresh(3).infer(batch()), rtol=1e-12)
    half = imported("float16")
    assert "expected float32, got float16" in complaint(
        lambda: half(bench.array(batch(), "float16"))
    )


def test_limit_a_training_graph_draws_one_random_number(device):
    def next_numbers(mode, context):
        bench = Bench("ours", mode, device)
        net = bench.net(bench.layer(3))
        mx.random.seed(3)
        with context():
            net(bench.array(batch())).wait_to_read()
        return mx.nd.random.uniform(shape=(3,), ctx=device).asnumpy().tolist()

    mx.random.seed(3)
    untouched = mx.nd.random.uniform(shape=(3,), ctx=device).asnumpy().tolist()
    assert next_numbers("eager", autograd.train_mode) == untouched
    assert next_numbers("graph", autograd.predict_mode) == untouched
    assert next_numbers("graph", autograd.train_mode) != untouched


@every_mode
def test_limit_an_infinite_running_statistic(portable, device, mode):
    """Inference leaves it as it is, and training does not heal it: in a graph it becomes NaN."""
    bench = Bench("ours", mode, device)
    layer = bench.layer(3, values={"running_mean": np.inf})
    net, x = bench.net(layer), bench.array(batch())
    assert not np.isfinite(net(x).asnumpy()).any()
    assert np.isposinf(statistics(layer)[0]).all()
    with autograd.train_mode():
        assert np.isfinite(net(x).asnumpy()).all()
    unusable = np.isnan if mode == "graph" else np.isposinf
    assert unusable(statistics(layer)[0]).all()
