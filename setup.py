"""The README as a package index shows it: there is no repository around it for its links."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?![a-z]+:)([^)\s]+)\)")


def outside(readme, repository):
    """Return a README whose links to files lead to the repository's address.

    Without an address the words of a link stay, and pictures are left out.
    """

    def absolute(match):
        mark, words, target = match.groups()
        if repository is None:
            return "" if mark else words
        return f"{mark}[{words}]({repository}/{'raw' if mark else 'blob'}/HEAD/{target})"

    return LINK.sub(absolute, readme)


def address(pyproject):
    """Return the address of the repository, or None."""
    found = re.search(r'^Repository = "(.+?)/?"$', pyproject, re.MULTILINE)
    return found and found[1]


setup(
    long_description=outside(
        (HERE / "README.md").read_text("utf-8"),
        address((HERE / "pyproject.toml").read_text("utf-8")),
    ),
    long_description_content_type="text/markdown",
)
