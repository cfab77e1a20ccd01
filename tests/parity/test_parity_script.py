"""The script that writes the page of the parity report."""

import importlib.util
import sys
from pathlib import Path

from scratchbn.defects import Finding, Outcome

import pytest
from compared_layers import Blind, few

from models.lenet import lenet


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "parity_report.py"
    spec = importlib.util.spec_from_file_location("parity_report", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_its_page(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "standard_grid", few)
    known = {"center_false": script.DEFECTS["center_false"]}
    monkeypatch.setattr(script, "DEFECTS", known)
    monkeypatch.setattr(script, "nets", lambda full: [script.Net("LeNet", lenet, (2, 1, 28, 28))])
    path = tmp_path / "page" / "report.html"
    assert script.main(["--out", str(path), "--backends", "portable", "auto"]) == 0
    assert "held" in capsys.readouterr().out
    page = path.read_text()
    assert "backend portable, auto; kernel " in page
    assert page.count("<td>portable</td>") == page.count("<td>auto</td>") == 6  # a line for each
    assert "Everything held" in page
    assert page.count("data:image/png;base64,") == 2
    assert "<code>center=False</code> still adds beta" in page
    assert page.count("beta of 5 adds") == 2
    assert known["center_false"].cause in page
    assert "http" not in page
    assert '<meta name="viewport"' in page
    assert page.index("Is <code>ScratchBatchNorm</code> right?") < page.index("Single layers")
    # What is wide scrolls by itself: tables and pictures.
    assert page.count("<table>") == page.count('<div class="wide"><table>')
    assert page.count("<img") == page.count('<div class="wide"><img alt="')


def test_the_script_fails_with_ours(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "standard_grid", few)
    monkeypatch.setattr(script, "DEFECTS", {})
    monkeypatch.setattr(script, "ScratchBatchNorm", Blind)
    path = tmp_path / "report.html"
    assert script.main(["--no-nets", "--out", str(path), "--backends", "auto"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert "out of tolerance" in path.read_text()


def test_the_script_fails_with_a_defect_of_ours(script, tmp_path, monkeypatch, capsys):
    wrong, right = Outcome(False, True, "off by <5>"), Outcome(True, False, "exact")

    def found(defects):
        for defect in defects:
            outcomes = {(norm, "eager"): wrong for norm in ("built-in", "ours")}
            outcomes.update({(norm, "graph"): right for norm in ("built-in", "ours")})
            yield Finding(defect, outcomes)

    monkeypatch.setattr(script, "standard_grid", few)
    monkeypatch.setattr(script, "DEFECTS", {"scale_false": script.DEFECTS["scale_false"]})
    monkeypatch.setattr(script, "survey", found)
    path = tmp_path / "report.html"
    assert script.main(["--no-nets", "--out", str(path), "--backends", "auto"]) == 1
    out = capsys.readouterr().out
    assert "scale_false, ours, eager: off by <5>" in out
    assert "built-in, graph" not in out  # what counts is ours
    assert path.read_text().count("off by &lt;5&gt;") == 3  # among the failures, and in two cells
