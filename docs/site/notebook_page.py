"""A notebook as a page: its prose, its code, what that printed, and its pictures as files."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def as_page(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by file name."""
    pictures: dict[str, bytes] = {}
    parts: list[str] = []
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += _outputs(cell, notebook.stem, pictures)
    return "\n\n".join(parts) + "\n", pictures


def _outputs(cell: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{len(pictures) + 1:02}.png"
            pictures[name] = base64.b64decode("".join(data["image/png"]))
            yield f"![{cell['metadata']['alt']}]({name})"
        else:
            text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            yield f"```{{ .text .output }}\n{text}\n```"
