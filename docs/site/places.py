"""Where each file of the repository is on the site, and the links of a page that say so."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

REPOSITORY = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
# Pages that are made from files outside docs/, or are no Markdown there.
MADE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/learn/batch-norm-from-scratch.ipynb": "learn/batch-norm-from-scratch.md",
}
PICTURES = (".png", ".svg")


def slug(heading: str, separator: str = "-") -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def place_of(file: str) -> str:
    """Return where a file or folder of the repository is on the site.

    What is no page of its own has one that shows its source.
    """
    if file in MADE:
        return MADE[file]
    if file.startswith("docs/") and Path(file).suffix in (".md", *PICTURES):
        return file[len("docs/") :]
    return f"source/{file}/index.md" if (REPOSITORY / file).is_dir() else f"source/{file}.md"


def targets(markdown: str, file: str) -> Iterator[tuple[str, str, str]]:
    """Yield the links of a page to files: each link, the file it leads to, and the anchor there."""
    for link in LINK.findall(markdown):
        path, _, anchor = link.partition("#")
        if path and not re.match(r"[a-z]+:", link):
            yield link, posixpath.normpath(posixpath.join(posixpath.dirname(file), path)), anchor


def linked_on_site(markdown: str, file: str) -> str:
    """Return the text of a file of the repository with its links as they are on the site."""
    here = posixpath.dirname(place_of(file)) or "."
    moved = {}
    for link, target, anchor in targets(markdown, file):
        there = posixpath.relpath(place_of(target), here)
        moved[link] = f"{there}#{anchor}" if anchor else there

    def rewritten(match: re.Match[str]) -> str:
        link = match[0]
        if link.startswith("#"):  # those of Jupyter keep capitals and stops
            return "#" + slug(unquote(link[1:]))
        return moved.get(link, link)

    return LINK.sub(rewritten, markdown)
