"""The grid of comparisons, its command, and the oracle as a layer."""

import itertools
import platform
import sys
import time

from scratchbn import (
    BackendError,
    ScratchBatchNorm,
    ScratchBatchNormReLU,
    __version__,
    cli,
    get_backend,
    parity,
    use_backend,
)
from scratchbn.backends import BACKENDS
from scratchbn.parity import Case, Report, compare, run_grid, standard_grid
from scratchbn.parity.oracle_layer import OracleLayer, OracleReLU

import mxnet as mx
import numpy as np
import pytest
from compared_layers import Blind, Detached, Stuck, few
from mxnet.gluon import nn

PYTHON = platform.python_version()


def test_the_standard_grid_covers_what_it_says():
    quick, full = standard_grid(), standard_grid(full=True)
    for grid in (quick, full):
        names = [case.name for case in grid]
        assert len(set(names)) == len(names)
        assert {len(case.shape) for case in grid} == {2, 3, 4, 5}
        assert {case.dtype for case in grid} == {"float64", "float32", "float16"}
        assert {case.channels for case in grid} >= {1, 8, 64, 1024}
        assert {case.shape[0] for case in grid} >= {1}
        axes = {(len(case.shape), case.options.get("axis")) for case in grid}
        assert axes >= {(rank, axis) for rank in (2, 3, 4, 5) for axis in range(-rank, rank)}
        options = {name for case in grid for name in case.options}
        assert options >= {"center", "scale", "use_global_stats", "momentum", "epsilon"}
    assert {case.name for case in quick} < {case.name for case in full}


def test_a_grid_finds_a_fault_and_names_the_case():
    cases = [Case((4, 3), {"epsilon": e}) for e in (1e-5, 1e-3)]

    def forgetful(epsilon, **options):
        return ScratchBatchNorm(**options)

    report = run_grid(forgetful, ScratchBatchNorm, cases, modes=("eager",), steps=1)
    assert {row.case for row in report.failures} == {"4x3 float64 epsilon=0.001"}
    assert "4x3 float64 epsilon=0.001" in str(report)
    assert Report.from_json(report.to_json()).failures == report.failures


def test_the_command_writes_and_reports(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(parity, "standard_grid", few)
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert cli.main(["parity", *files]) == 0
    assert "held: all" in capsys.readouterr().out
    report = Report.from_json((tmp_path / "r.json").read_text())
    assert {row.case for row in report.rows} == {"4x3 float64", "4x3 float32 axis=0"}
    assert "4x3 float32 axis=0" in (tmp_path / "r.html").read_text()


def test_the_command_takes_backends(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(parity, "standard_grid", few)
    path = tmp_path / "r.json"
    assert cli.main(["parity", "--json", str(path), "--backends", "auto", "portable", "auto"]) == 0
    report = Report.from_json(path.read_text())
    assert {row.backend for row in report.rows} == {"auto", "portable"}
    for text in (capsys.readouterr().out, str(report)):
        assert f"backend auto, portable; kernel {report.settings['kernel']}; scratchbn " in text
        assert f"mxnet {mx.__version__}; numpy {np.__version__}; Python {PYTHON}; CPU " in text
        assert text.splitlines()[1].endswith(time.strftime("; %Y-%m-%d"))
    assert cli.main(["parity", "--backends", "fastest"]) == 1
    assert "name must be one of auto, portable" in capsys.readouterr().err


def test_a_grid_names_the_backend_that_fails():
    class WrongWhenPortable(ScratchBatchNorm):
        def transform(self, F, view, batch, gamma, beta, epsilon):
            beta = beta + float(get_backend() == "portable")
            return super().transform(F, view, batch, gamma, beta, epsilon)

    report = run_grid(
        WrongWhenPortable, OracleLayer, [Case((4, 3))], backends=["portable", "auto"], steps=1
    )
    assert {row.backend for row in report.rows} == {"portable", "auto"}
    assert {row.backend for row in report.failures} == {"portable"}
    (line,) = (line for line in str(report).splitlines() if " FAIL " in line)
    assert "portable" in line


@pytest.mark.parametrize("backends", ["auto", [], ["auto", "fastest"]])
def test_backends_that_are_none(backends):
    with pytest.raises(ValueError, match=r"must be .* auto, portable, native"):
        run_grid(ScratchBatchNorm, OracleLayer, [], backends=backends)


def test_a_comparison_names_where_it_was_made(x):
    with use_backend("portable"):
        report = compare(ScratchBatchNorm(), nn.BatchNorm(), x, steps=1)
    assert report.settings["backend"] == "portable"
    assert {row.backend for row in report.rows} == {"portable"}
    made = {name: report.settings[name] for name in ("scratchbn", "mxnet", "numpy", "Python")}
    assert made == dict(zip(made, (__version__, mx.__version__, np.__version__, PYTHON)))
    assert report.settings["CPU"]
    assert report.settings["date"] == time.strftime("%Y-%m-%d")
    page = report.to_html()
    assert "backend portable" in page
    assert report.settings["CPU"] in page


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_grid_holds_on_every_backend(backend):
    """Some of every group and dtype, and every batch of one value per channel."""
    grid = standard_grid()
    groups = itertools.groupby(grid, lambda case: (case.dtype, case.group))
    part = {case.name: case for _, cases in groups for case in list(cases)[::12]}
    part.update({case.name: case for case in grid if case.shape == (1, 5)})
    try:
        report = run_grid(ScratchBatchNorm, OracleLayer, part.values(), backends=[backend], steps=1)
    except BackendError as error:
        pytest.skip(str(error))
    assert report, str(report)
    assert {row.backend for row in report.rows} == {backend}


def test_the_command_selects_dtypes_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(parity, "standard_grid", few)
    monkeypatch.setattr(parity.run_grid, "__defaults__", (Blind, nn.BatchNorm, None))
    assert cli.main(["parity", "--dtype", "float64"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "float32" not in out


def test_the_command_refuses_a_negative_seed(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["parity", "--seed", "-1"])
    assert exit.value.code == 2
    assert "must be at least 0, got '-1'" in capsys.readouterr().err


def test_the_command_prints_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(parity, "standard_grid", few)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["parity"]) == 0
    assert "held: all" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": -1, "epsilon": 1e-3},
        {"scale": False},
        {"center": False, "beta_initializer": "ones"},
        {"momentum": None},
        {"unbiased_variance": True},
        {"use_global_stats": True},
    ],
)
def test_the_layer_holds_against_the_oracle(options):
    case = Case((4, 5, 3, 6), options)
    report = run_grid(ScratchBatchNorm, OracleLayer, [case], rtol=1e-12, atol=1e-12)
    assert report, str(report)


def test_the_layer_with_relu_holds_against_the_oracle():
    case = Case((4, 5, 3, 6))
    report = run_grid(ScratchBatchNormReLU, OracleReLU, [case], rtol=1e-12, atol=1e-12)
    assert report, str(report)
    assert not run_grid(ScratchBatchNorm, OracleReLU, [case])


def test_the_oracle_finds_the_faults(x):
    for wrong in (Blind, Detached, Stuck):
        assert not compare(wrong(), OracleLayer(in_channels=4), x)
