"""What `--help` shows: paragraphs as wide as the terminal, lists line by line."""

from scratchbn._command import Parser

import benchmark
import export_model
import paper_figure1
import pytest
import train_lenet

SCRIPTS = (train_lenet, export_model, paper_figure1, benchmark)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("columns", [60, 80])
def test_help_fits_the_terminal(script, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = script.build_parser().format_help().splitlines()
    assert [line for line in lines if len(line) > columns and " " in line.strip()] == []
    assert max(map(len, lines)) > columns - 12


def test_paragraphs_are_filled_and_lists_are_kept(monkeypatch):
    monkeypatch.setenv("COLUMNS", "32")
    text = "One paragraph of\nseveral short lines.\n\nnames\n  a  the first\n  b  the second"
    shown = Parser(prog="x", description=text).format_help()
    assert (
        "One paragraph of several short\nlines.\n\nnames\n  a  the first\n  b  the second\n"
        in shown
    )
