"""The site of `make docs`: what it must hold, with and without the packages that build it."""

import ast
import html
import importlib
import json
import re
import subprocess
from xml.etree import ElementTree

import scratchbn

import places
import pytest
import yaml
from helpers import REPOSITORY
from notebook_page import as_page
from packaging.requirements import Requirement

DOCS = REPOSITORY / "docs"
SETTINGS = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text("utf-8"))
MKDOCS = REPOSITORY / ".venv-docs" / "bin" / "mkdocs"
PACKAGE = REPOSITORY / "scratchbn"
ROOMS = sorted(
    ".".join(path.parent.relative_to(REPOSITORY).parts)
    for path in PACKAGE.rglob("__init__.py")
    if "\n__all__ = [" in path.read_text("utf-8") and "/_" not in str(path.parent)
)
NOTEBOOK_FILE = "docs/learn/batch-norm-from-scratch.ipynb"
NOTEBOOK = REPOSITORY / NOTEBOOK_FILE


def pages_in(nav):
    """The pages of a navigation, however deep they are."""
    for entry in nav:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        if isinstance(value, str):
            yield value
        else:
            yield from pages_in(value)


def documented():
    """The names that the pages of the reference show."""
    names = []
    for page in sorted((DOCS / "reference").glob("*.md")):
        text = page.read_text("utf-8")
        for name, below in re.findall(r"^::: (\S+)\n((?: .*\n)*)", text + "\n", re.MULTILINE):
            heading = re.search(r"heading: (scratchbn[\w.]+)", below)
            names.append(heading[1] if heading else name)
    return names


def test_every_page_is_in_the_navigation_once():
    pages = list(pages_in(SETTINGS["nav"]))
    written = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert len(pages) == len(set(pages))
    assert set(pages) == written | set(places.MADE.values())
    assert set(DOCS.rglob("*.ipynb")) == {NOTEBOOK}


def found(name):
    """What a documented name stands for: a module, or what a module holds."""
    module, _, last = name.rpartition(".")
    parent = importlib.import_module(module)
    return getattr(parent, last) if hasattr(parent, last) else importlib.import_module(name)


@pytest.mark.parametrize("room", ["scratchbn", *ROOMS])
def test_every_public_name_is_in_the_reference(room):
    module, shown = importlib.import_module(room), documented()
    objects = {id(found(name)) for name in shown}
    missing = [
        name
        for name in module.__all__
        if f"{room}.{name}" not in shown and id(getattr(module, name)) not in objects
    ]
    assert missing == []


def test_the_reference_shows_names_once_and_public_ones_only():
    shown = documented()
    assert len(shown) == len({id(found(name)) for name in shown}) > 80
    assert [name for name in shown if re.search(r"(^|\.)_", name)] == []


def test_pages_load_nothing_from_elsewhere():
    assert SETTINGS["theme"]["font"] is False
    scripts = SETTINGS["extra"]["polyfills"] + SETTINGS["extra_css"]
    assert all((DOCS / script).is_file() for script in scripts)
    assert not re.search(r"https?://", (DOCS / "site" / "style.css").read_text("utf-8"))


@pytest.mark.parametrize(
    ("file", "link", "expected"),
    [
        ("README.md", "docs/using.md#measured", "using.md#measured"),
        ("README.md", "docs/readme.png", "readme.png"),
        ("README.md", "scratchbn/functional.py", "source/scratchbn/functional.py.md"),
        ("docs/using.md", "../scratchbn/native/", "source/scratchbn/native/index.md"),
        ("docs/using.md", "../README.md", "index.md"),
        ("docs/using.md", "training.md", "training.md"),
        ("docs/reference/layer.md", "../using.md", "../using.md"),
        (NOTEBOOK_FILE, "../gpu.md", "../gpu.md"),
        (NOTEBOOK_FILE, "#9.-LeNet", "#9-lenet"),
        ("CHANGELOG.md", "docs/learn/batch-norm-from-scratch.ipynb", places.MADE[NOTEBOOK_FILE]),
        ("README.md", "https://arxiv.org/abs/1502.03167", "https://arxiv.org/abs/1502.03167"),
    ],
)
def test_links_as_they_are_on_the_site(file, link, expected):
    assert places.linked_on_site(f"a [b]({link}) c", file) == f"a [b]({expected}) c"


def test_the_notebook_is_a_page_with_described_pictures():
    text, pictures = as_page(NOTEBOOK)
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert len(pictures) >= 10
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    shown = dict(re.findall(r"^!\[(.+)\]\((.+\.png)\)$", text, re.MULTILINE))
    assert set(shown.values()) == set(pictures)
    assert all(len(described) > 30 for described in shown)
    for cell in cells:
        assert "".join(cell["source"]) in text


def test_pictures_of_pages_are_described():
    pages = [REPOSITORY / "README.md", *DOCS.rglob("*.md")]
    shown = [m for p in pages for m in re.findall(r"!\[(.*?)\]\((.+?)\)", p.read_text("utf-8"))]
    assert len(shown) >= 6
    assert [file for words, file in shown if len(words) < 30] == []


@pytest.mark.parametrize("file", sorted(DOCS.glob("*.svg")), ids=lambda file: file.name)
def test_drawings_stand_alone(file):
    """They have a title, a width that pages show, a ground of their own, and load nothing."""
    root = ElementTree.parse(file).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title").text
    assert root.get("width") == "830" and root.get("viewBox").startswith("0 0 830 ")
    ground = root.find(f"{space}rect")
    assert (ground.get("width"), ground.get("fill")) == ("830", "#fff")
    assert "href" not in file.read_text("utf-8")


@pytest.mark.parametrize("python", ["3.9", "3.10", "3.11"])
def test_the_lock_of_the_site_pins_every_package_once(python):
    marks = {"python_version": python, "python_full_version": f"{python}.9"}
    lines = (DOCS / "site" / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines]
    names = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(marks)]
    assert len(names) == len(set(names))
    project = (REPOSITORY / "pyproject.toml").read_text()
    wanted = ast.literal_eval(re.search(r"^docs = (\[.*\])$", project, re.M)[1])
    assert {Requirement(text).name for text in wanted} <= set(names)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
    if not MKDOCS.exists():
        pytest.skip("`make docs` has not installed .venv-docs")
    folder = tmp_path_factory.mktemp("site")
    settings = DOCS / "site" / "mkdocs.yml"
    command = [MKDOCS, "build", "--strict", "--quiet", "-f", settings, "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in folder.rglob("*.html")
    }


def test_the_site_builds_without_a_warning_and_is_complete(site):
    pages = {page[: -len(".md")] + ".html" for page in pages_in(SETTINGS["nav"])}
    assert pages <= set(site)
    everything = "".join(text for page, text in site.items() if page.startswith("reference/"))
    for name in documented():
        assert html.escape(name.rpartition(".")[2]) in everything
    for name in scratchbn.__all__:
        assert re.search(rf'id="scratchbn\.(\w+\.)*{name}"', everything), name


def test_the_site_needs_no_network(site):
    for page, text in site.items():
        assert re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"https?://", text) == [], page


def test_the_site_shows_formulas_and_docstrings_as_they_are_meant(site):
    assert "<math" in site["learn/batch-norm-from-scratch.html"]
    for page, text in site.items():
        if page.startswith("source/"):
            continue
        prose = re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)
        assert (
            re.findall(r":(?:class|func|meth|math|data):|\\frac|\.\. math|arithmatex", prose) == []
        ), page
        assert "=====" not in prose, page
        assert re.findall(r"<img(?![^>]*alt=\"[^\"]{10})[^>]*>", prose) == [], page
