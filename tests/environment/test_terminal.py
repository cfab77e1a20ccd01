"""What commands show in terminals of 60 and 80 columns."""

from scratchbn import cli
from scratchbn._text import fitted, reflowed, within
from scratchbn.parity import Report, Row
from scratchbn.parity.summary import summary

import pytest
from helpers import REPOSITORY, make
from hypothesis import given
from hypothesis import strategies as st
from terminal import in_terminal

WIDTHS = (60, 80)
NAMES = [f"densenet0_stage{i}_batchnorm{i}_running_mean" for i in range(1, 4)]


def row(name, case, *, ok=True, where="eager"):
    found = 1e-9 if ok else 1.0
    return Row("statistic", name, where, "train", 1, found, found, 1e-6, case=case, backend="auto")


@pytest.mark.parametrize("width", WIDTHS)
def test_names_of_layers_are_whole_and_the_verdict_is_last(width):
    case = "4x5x6x7 float32 center=False scale=False"
    rows = [row(name, f"{case} {i}", ok=False) for i, name in enumerate(NAMES)]
    report = Report((*rows, row("output", "4x3 float64")), {}, ("a remark " * 20,))
    lines = summary(report, width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(name in line for line in lines) for name in NAMES)
    assert lines[-1] == "failed: 3 of 4"
    assert "4x3 float64" not in "\n".join(lines), "what agrees is folded"
    assert "those that agree are not shown: parity --all" in lines
    assert "4x3 float64" in summary(report, width, every=True)


def test_a_report_that_holds_is_short():
    report = Report(tuple(row(f"tensor{i}", f"case {i}") for i in range(50)))
    lines = summary(report, 80).splitlines()
    assert len(lines) < 7
    assert "50 cases, 50 tensors, 50 comparisons" in lines
    assert "closest to what is allowed: tensor0 of case 0 (auto), 1.0e-09 of 1.0e-06" in lines
    assert lines[-1] == "held: all 50"
    assert summary(Report(()), 80).splitlines()[-1] == "nothing was compared"


words = st.lists(st.text("abc_/-", min_size=1, max_size=12), min_size=1, max_size=12)


@given(words, st.integers(20, 70))
def test_no_word_is_split_and_no_line_is_too_long(words, width):
    text = " ".join(words)
    for shown in (
        reflowed(text, width),
        within([("name", text), ("longer name", text)], width),
        fitted(["layer", "what"], [["x", text], [words[0], text]], width),
    ):
        assert set(words) <= set(shown.split())
        assert max(map(len, shown.splitlines())) <= max(width, 25 + max(map(len, words)))


def test_a_table_that_fits_is_a_table():
    assert fitted(["a", "b"], [["1", "2"]], 80) == "a  b\n1  2"
    assert fitted(["a", "b"], [["1", "2" * 90]]) == f"a  b\n1  {'2' * 90}"
    assert reflowed("x " * 90) == "x " * 90


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", ["", "doctor", "demo", "parity", "fold", "convert", "launch"])
def test_helps_fit(width, command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_the_list_of_targets_fits(width):
    seen = in_terminal(["make", "--no-print-directory", "-C", REPOSITORY, "help"], width)
    assert seen.status == 0
    assert 40 < seen.widest <= width, seen.text
    assert " ".join(seen.text.split()) == " ".join(make("help").stdout.split())
