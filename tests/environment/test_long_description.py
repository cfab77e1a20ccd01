"""What a package index shows of the README: every link works without the repository."""

import re
import subprocess
import sys
from email import message_from_bytes
from importlib.metadata import version

import pytest
from helpers import REPOSITORY

ADDRESS = "https://example.org/someone/scratchbn"
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")
README = (REPOSITORY / "README.md").read_text("utf-8")
METADATA = """
import sys
from setuptools import build_meta
folder = sys.argv.pop()  # building has arguments of its own
build_meta.prepare_metadata_for_build_wheel(folder)
"""


def described(folder, address):
    """The long description in the metadata of a repository that has an address, or has none."""
    for name in ("README.md", "LICENSE", "setup.py", "scratchbn/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    project = re.sub(r"^Repository = .*\n", "", project, flags=re.MULTILINE)
    # Which modules there are is no part of the metadata.
    project = re.sub(r"^\[tool\.setuptools\]\n(.+\n)+", "", project, flags=re.MULTILINE)
    if address is not None:
        project = project.replace("[project.urls]\n", f'[project.urls]\nRepository = "{address}"\n')
    (folder / "pyproject.toml").write_text(project, "utf-8")
    command = [sys.executable, "-c", METADATA, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (metadata,) = folder.glob("*.dist-info/METADATA")
    message = message_from_bytes(metadata.read_bytes())
    assert message["Description-Content-Type"] == "text/markdown"
    return message.get_payload(decode=True).decode("utf-8")


@pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="setuptools knows no licence expressions"
)
@pytest.mark.parametrize("address", [None, ADDRESS])
def test_no_link_is_relative(tmp_path, address):
    text = described(tmp_path, address)
    links = LINK.findall(text)
    assert "<img" not in README and "<a " not in README
    assert all(target.startswith("https://") for _, _, target in links)
    inside = [link for link in LINK.findall(README) if not link[2].startswith("https://")]
    assert len(inside) > 10
    if address is None:
        assert [words for mark, words, _ in inside if (words in text) == bool(mark)] == []
        return
    kinds = {"!": "raw", "": "blob"}
    expected = [f"{ADDRESS}/{kinds[mark]}/HEAD/{to}" for mark, _, to in inside]
    assert [to for _, _, to in links if to.startswith(ADDRESS)] == expected
