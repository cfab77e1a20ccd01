"""The notebook of docs/learn: runs as committed, and says what it said when it was committed."""

import re
import sys
from urllib.parse import unquote

from scratchbn.parity.oracle import OracleBatchNorm

import nbformat
import numpy as np
import pytest
import run_notebook
from helpers import REPOSITORY

COMMITTED = nbformat.read(run_notebook.NOTEBOOK, as_version=4)
CODE = [cell for cell in COMMITTED.cells if cell.cell_type == "code"]
PROSE = [cell.source for cell in COMMITTED.cells if cell.cell_type == "markdown"]
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
# How far a printed number may be from the committed one, by the tag of its cell.
CLOSE = {None: {"rtol": 1e-3, "atol": 2e-3}, "trained": {"rtol": 0.5, "atol": 0.1}}


def tags(cell):
    return cell.metadata.get("tags", [])


def text_of(cell):
    """What a cell printed and returned, pictures apart."""
    shown = [
        output.text if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in cell.outputs
        if output.output_type == "stream" or "image/png" not in output.data
    ]
    return "\n".join(shown)


def pictures_of(cell):
    return [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]


def numbers(text):
    return np.array([float(number) for number in NUMBER.findall(text)])


def words(text):
    return NUMBER.sub("#", text).split()


def check_outputs(cell):
    """No error, no noise, nothing of the machine."""
    kinds = {(output.output_type, output.get("name")) for output in cell.outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}
    text = text_of(cell)
    assert "Traceback" not in text and "Warning" not in text
    assert not re.search(r"/(home|root|tmp|usr|var|work)/", text)
    assert str(REPOSITORY) not in text and sys.prefix not in text


def check_arrays(cells):
    """Batch norm of A and B, against the oracle in float64."""
    A = np.array([[1, 7], [5, 4], [6, 10]])
    B = np.array([1, 6, 5, 7, 4, 3, 2, 5, 6, 3, 2, 4, 5, 3, 2, 5]).reshape(2, 2, 2, 2)
    for name, x in (("A", A), ("B", B)):
        (cell,) = (cell for cell in cells if name in tags(cell))
        found = numbers(re.sub("float32", "", text_of(cell)))
        exact = OracleBatchNorm.fresh(2).train(x).ravel()
        np.testing.assert_allclose(found, exact, atol=6e-5, err_msg=name)


def test_it_runs_and_says_what_it_said():
    """All cells, in a fresh kernel in a temporary directory; what they assert holds."""
    fresh = [c for c in run_notebook.executed(COMMITTED).cells if c.cell_type == "code"]
    check_arrays(fresh)
    for before, now in zip(CODE, fresh):
        check_outputs(now)
        assert len(pictures_of(now)) == len(pictures_of(before)), now.source
        if "machine" in tags(now):  # with the compiled kernel, or without
            continue
        said, says = text_of(before), text_of(now)
        assert words(says) == words(said), now.source
        close = CLOSE["trained" if "trained" in tags(now) else None]
        np.testing.assert_allclose(numbers(says), numbers(said), err_msg=now.source, **close)


def test_it_is_committed_as_it_ran_from_top_to_bottom():
    check_arrays(CODE)
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        check_outputs(cell)
    assert sum(len(pictures_of(cell)) for cell in CODE) >= 10
    assert run_notebook.NOTEBOOK.stat().st_size < 1.5e6
    nbformat.validate(COMMITTED)


def anchor(heading):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((.+?)\)", "\n".join(PROSE)))))
def test_its_links_lead_somewhere(target):
    if target.startswith("https://"):
        return
    path, _, place = unquote(target).partition("#")
    if not path:
        headings = re.findall(r"^#+ (.+)$", "\n".join(PROSE), flags=re.MULTILINE)
        assert place in {heading.replace(" ", "-") for heading in headings}  # as Jupyter does
        return
    file = run_notebook.NOTEBOOK.parent / path
    assert file.is_file()
    if place:
        headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), flags=re.MULTILINE)
        assert place in {anchor(heading) for heading in headings}


def small_notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def test_the_script_saves_what_it_ran(tmp_path, capsys):
    file = tmp_path / "small.ipynb"
    small_notebook(file, "x = 6", "print(7 * x)\nimport scratchbn")
    assert run_notebook.main([str(file)]) == 0
    saved = nbformat.read(file, as_version=4)
    assert [cell.execution_count for cell in saved.cells] == [1, 2]
    assert text_of(saved.cells[1]) == "42\n"
    assert "small.ipynb" in capsys.readouterr().out


def test_the_script_keeps_a_notebook_that_fails(tmp_path, capsys):
    file = tmp_path / "small.ipynb"
    small_notebook(file, "print(1)", "1 / 0")
    before = file.read_bytes()
    assert run_notebook.main([str(file)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [None, "no JSON", "{}"])
def test_the_script_refuses_what_is_no_notebook(tmp_path, capsys, content):
    file = tmp_path / "small.ipynb"
    if content is not None:
        file.write_text(content)
    assert run_notebook.main([str(file)]) == 2
    assert "run_notebook.py: error: " in capsys.readouterr().err
