"""What the README and the pages show: the examples run, the links lead somewhere."""

import re

import mxnet as mx
import pytest
from helpers import REPOSITORY
from places import slug

FOLDERS = ("docs", ".github")
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *(p for f in FOLDERS for p in (REPOSITORY / f).rglob("*.md"))]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def examples(page):
    text = (REPOSITORY / page).read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/using.md"])
@pytest.mark.filterwarnings("ignore")
def test_the_examples_run(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gluoncv")
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    found = examples(page)
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)
        told = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
        printed = capsys.readouterr().out
        assert [line for line in told if line not in printed] == []
    mx.nd.waitall()
    assert (tmp_path / "model-symbol.json").is_file()


def test_the_readme_counts_the_defects():
    text = (REPOSITORY / "README.md").read_text("utf-8")
    page = (REPOSITORY / "docs" / "builtin-defects.md").read_text("utf-8")
    table = page.split("<!-- defects: begin -->")[1].split("<!-- defects: end -->")[0]
    assert f"[{len(table.strip().splitlines()) - 2} measured defects]" in text


def anchors(path):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return set(map(slug, re.findall(r"^#+ (.*)$", text, re.MULTILINE)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text("utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []
