"""The report of a comparison: JSON, HTML, tables."""

import json
import os
import re
import sys

from scratchbn import ScratchBatchNorm
from scratchbn.environment.install import install_command
from scratchbn.parity import Report, Row, compare

import numpy as np
import pytest
from compared_layers import SHAPE, Nan


@pytest.fixture(scope="module")
def failed():
    data = np.random.default_rng(0).normal(1, 2, SHAPE)
    return compare(ScratchBatchNorm(), Nan(), data, steps=1)


def test_json_round_trip(failed, tmp_path):
    path = tmp_path / "new" / "report.json"
    text = failed.to_json(path)
    assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    document = json.loads(text)
    assert document["held"] is False
    assert document["settings"]["dtype"] == "float64"
    assert len(document["rows"]) == len(failed.rows)
    again = Report.from_json(text)
    assert again.to_json() == text
    assert str(again) == str(failed)
    assert [row.where for row in again.rows] == [row.where for row in failed.rows]


def plain(value):
    """Whether a value is made of JSON's types only."""
    if isinstance(value, dict):
        return all(type(name) is str and plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (str, int, float, bool, type(None))


def test_a_dict_of_plain_types(failed):
    found = failed.to_dict()
    assert set(found) == {"ok", "settings", "notes", "rows"}
    assert found["ok"] is False
    assert plain(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [row["ok"] for row in found["rows"]] == [row.ok for row in failed.rows]
    assert "nan" in {row["absolute"] for row in found["rows"]}
    document = json.loads(failed.to_json())
    assert document.pop("held") is found.pop("ok")
    assert document == found


def test_numbers_of_numpy_in_the_settings():
    row = Row("output", "y", "eager", "train", 1, 0.0, 0.0, 1.0, index=(1, 2))
    settings = {"steps": np.int64(3), "rtol": np.float64("inf"), "modes": ("eager",)}
    found = Report((row,), settings).to_dict()
    assert found["ok"] is True
    assert found["settings"] == {"steps": 3, "rtol": "inf", "modes": ["eager"]}
    assert plain(found)


@pytest.mark.parametrize("text", ["", "{}", '{"rows": [{}], "settings": {}, "notes": []}', "[1]"])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="text must be JSON from Report"):
        Report.from_json(text)


def test_html_is_complete_in_itself(failed, tmp_path):
    path = tmp_path / "report.html"
    text = failed.to_html(path, title="a < b")
    assert path.read_text() == text
    assert "a &lt; b" in text
    assert "Failures" in text
    assert "not finite" in text
    assert "http" not in text
    assert '<meta name="viewport" content="width=device-width' in text
    assert "How to read this" in text
    for told in ("backend auto", "mxnet ", "numpy ", "CPU ", "dtype float64", "eager and hybrid"):
        assert text.count(told) == 1, told
    assert text.count("<table>") == text.count("</table>") == 2


def test_html_without_jinja2(failed, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=re.escape(install_command("report"))):
        failed.to_html()


def test_a_failed_write_leaves_the_old_file(failed, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        failed.to_json(path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


def test_an_empty_report_is_not_a_success():
    assert not Report(())
    assert "nothing was compared" in str(Report(()))


def test_a_long_table_shows_the_worst():
    rows = [
        Row("output", f"t{i}", "eager", "train", 1, float(i), float(i), 95.5) for i in range(100)
    ]
    report = Report(tuple(rows))
    header, lines, more = report.table(most=10)
    assert [line[0] for line in lines] == [f"t{i}" for i in range(99, 89, -1)]
    assert len(header) == len(lines[0])
    assert more == "and 90 more, none of them failed"
    assert report.table(most=2)[2] == "and 98 more, 2 of them failed"
    assert more not in str(report)
    assert len(report.failures) == 4
