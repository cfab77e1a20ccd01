"""Files are written to a temporary name and renamed: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Union

from ._text import first_line

PathLike = Union[str, "os.PathLike[str]"]
UNFINISHED = ".unfinished-"


def check_directory(path: PathLike, name: str = "path") -> None:
    """Raise FileNotFoundError if there is no directory for a file to be written to.

    TypeError, with the argument's name, if it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a str or a path, got {type(path).__name__}")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"the directory of {os.fspath(path)!r} does not exist")


def write_text(path: PathLike, text: str) -> None:
    """Write a text file as UTF-8."""
    with staged(path) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def staged(path: PathLike) -> Iterator[Path]:
    """Offer a temporary path, of the same suffix; what is there at the end takes `path`'s place."""
    path = Path(path)
    check_directory(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory: a file is to be written")
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as folder:
        file = Path(folder, path.name)
        yield file
        os.replace(file, path)


@contextmanager
def staged_folder(directory: PathLike) -> Iterator[Path]:
    """Offer a folder whose files move to `directory` at the end, and only if all went well."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=directory) as folder:
        yield Path(folder)
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, Path(directory, file.name))


def write_files(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Write several files, all or none: what exists is replaced when everything is written.

    Each writer is called with a temporary path in the directory of its file. An OSError leaves
    existing files as they were.
    """
    with ExitStack() as stack:
        written = []
        for path, write in writers.items():
            check_directory(path)
            name = tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent)
            stack.callback(shutil.rmtree, name, ignore_errors=True)
            new, old = Path(name, "new"), Path(name, "old")
            try:
                write(new)
            except RuntimeError as error:  # what MXNet raises where a disk is full
                raise OSError(f"cannot write {str(path)!r}: {first_line(error)}") from error
            written.append((path, new, old))
        replaced: list[tuple[Path, Path]] = []
        try:
            for path, new, old in written:
                if path.exists():
                    _keep(path, old)
                os.replace(new, path)
                replaced.append((path, old))
        except BaseException:
            for path, old in replaced:
                if old.exists():
                    os.replace(old, path)
                else:
                    path.unlink()
            raise


def _keep(path: Path, copy: Path) -> None:
    """Keep a file's content under a second name."""
    with suppress(OSError):  # not every file system has links
        os.link(path, copy)
        return
    shutil.copy2(path, copy)
