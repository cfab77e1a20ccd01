"""What the scripts share: a command line that fails in one line, files that appear together."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Offer a directory whose files move to `directory` at the end, and only if all went well."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory) as staging:
        yield Path(staging)
        for file in sorted(Path(staging).iterdir()):
            os.replace(file, directory / file.name)
