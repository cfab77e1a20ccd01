"""The curves of runs: lines over several epochs, bars that show their values after one."""

from types import SimpleNamespace

from scratchbn.train.plot import plot

import pytest


def finished(name, epochs):
    """What is drawn of a run."""
    results = [{"train_acc": 0.5 + 0.0123 * i, "test_acc": 0.25 + 0.0123 * i} for i in epochs]
    return SimpleNamespace(name=name, losses=[2.0, 1.0], epochs=results)


@pytest.mark.parametrize("names", [("scratch", "builtin"), ("scratch",)])
def test_one_epoch_is_drawn_as_numbers(tmp_path, names):
    plot([finished(name, [i]) for i, name in enumerate(names)], tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text("utf-8")
    for i, name in enumerate(names):
        assert f"<!-- {name} -->" in text
        for value in (50 + 1.23 * i, 25 + 1.23 * i):
            assert f"<!-- {value:.2f} -->" in text


def test_several_epochs_are_drawn_as_lines(tmp_path):
    plot([finished("scratch", range(3))], tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text("utf-8")
    assert "<!-- scratch, train -->" in text
    assert "<!-- 50.00 -->" not in text
