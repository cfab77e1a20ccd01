"""Files that appear together or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Offer a directory whose files move to `directory` at the end, and only if all went well."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory) as staging:
        yield Path(staging)
        for file in sorted(Path(staging).iterdir()):
            os.replace(file, directory / file.name)
