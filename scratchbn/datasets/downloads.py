"""Download a named set with pooch: checked before it is cached, all four files or none."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .._writing import staged_folder
from ..environment.install import install_command
from . import idx
from .dataset import Dataset, DatasetError, NotFoundError
from .sources import SOURCES, Source

ANSWER_SECONDS = 4.0  # for all mirrors together: what a closed network costs
STALL_SECONDS = 5.0
LARGEST_DOWNLOAD = 64 << 20
_CHUNK_BYTES = 8192
_SMALLEST = "t10k-labels"


def download(
    name: str, cache: Path | None, reasons: list[str], say: Callable[[str], None]
) -> Dataset:
    """Download the four files from the first mirror that has them, check and cache them."""
    source = SOURCES[name]
    missing = [m for m in ("pooch", "tqdm") if importlib.util.find_spec(m) is None]
    if missing:
        problem = f"download: needs {' and '.join(missing)} ({install_command('demo')})"
        raise NotFoundError(source.title, [*reasons, problem])
    files: dict[str, bytes] = {}
    contents: dict[str, bytes] = {}
    failures: list[str] = []
    for mirror, smallest in _answering(source.mirrors, failures):
        try:
            for key in (_SMALLEST, *source.sha256):
                if key not in files:
                    file = smallest if key == _SMALLEST else _fetch_shown(mirror, key)
                    contents[key] = _inflate_known(file, source, key, mirror)
                    files[key] = file
        except DatasetError as error:
            failures.append(f"{_host(mirror)}: {error}")
            continue
        if cache is not None:
            _keep(files, cache / name, say)
        return Dataset(name, mirror, *idx.parse_all(contents, dict.fromkeys(contents, mirror)))
    raise NotFoundError(source.title, [*reasons, "download: " + ", ".join(failures)])


def _answering(mirrors: tuple[str, ...], failures: list[str]) -> Iterator[tuple[str, bytes]]:
    """Ask all mirrors for the smallest file at once; yield those that sent it, fastest first.

    In daemon threads, because nothing can interrupt a hanging name look-up: the waiting side stops
    waiting, and the program may end.
    """
    answers: queue.SimpleQueue[tuple[str, bytes | Exception]] = queue.SimpleQueue()

    def ask(mirror: str) -> None:
        try:
            answers.put((mirror, _fetch(mirror, _SMALLEST)))
        except Exception as error:  # whatever it is, it is the waiting thread's to report
            answers.put((mirror, error))

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    silent = list(mirrors)
    deadline = time.monotonic() + ANSWER_SECONDS
    while silent:
        try:
            mirror, answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            failures += [f"{_host(m)}: no answer within {ANSWER_SECONDS:g} s" for m in silent]
            return
        silent.remove(mirror)
        if isinstance(answer, bytes):
            yield mirror, answer
        else:
            failures.append(f"{_host(mirror)}: {_explain(answer)}")


class _Memory(io.BytesIO):
    """A file in memory for pooch to write to, with an end to what it takes."""

    def write(self, chunk: Any) -> int:
        if self.tell() + len(chunk) > LARGEST_DOWNLOAD:
            raise OSError(f"larger than {LARGEST_DOWNLOAD:,} bytes")
        return super().write(chunk)


def _fetch(mirror: str, key: str, bar: Any = False) -> bytes:
    import pooch

    memory = _Memory()
    get = pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK_BYTES, timeout=STALL_SECONDS)
    get(mirror + _file_name(key), memory, None)
    return memory.getvalue()


def _fetch_shown(mirror: str, key: str) -> bytes:
    """Download one file with a progress bar; a mirror that falls silent is given up."""
    from tqdm import tqdm

    name = _file_name(key)
    handled = sys.exc_info()[1]  # of the caller: it becomes the context of what is raised here
    # total=1: pooch wants a bar that is true, and a tqdm bar without a total has no truth value.
    with tqdm(total=1, desc=name, unit="B", unit_scale=True) as bar:
        try:
            return _fetch(mirror, key, bar)
        except OSError as error:  # those of requests are OSErrors
            raise DatasetError(f"{name}: {_explain(error, handled)}") from error


def _inflate_known(file: bytes, source: Source, key: str, mirror: str) -> bytes:
    content = idx.inflate(file, _file_name(key), LARGEST_DOWNLOAD)
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256[key]:
        raise DatasetError(
            f"{_file_name(key)}: expected SHA-256 {source.sha256[key]} when uncompressed, "
            f"found {found} ({len(file):,} bytes from {_host(mirror)})"
        )
    return content


def _keep(files: dict[str, bytes], folder: Path, say: Callable[[str], None]) -> None:
    """Cache the checked files, instead of other spellings: a damaged one would be found first."""
    # The first spelling is of raw files, the second of compressed ones.
    names = {k: idx.spellings(k)[c.startswith(idx.GZIP_MAGIC)] for k, c in files.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staged_folder(folder) as staged:
            for key, name in names.items():
                Path(staged, name).write_bytes(files[key])
        for key, name in names.items():
            for other in set(idx.spellings(key)) - {name}:
                Path(folder, other).unlink(missing_ok=True)
    except OSError as error:
        say(f"{folder}: the download could not be cached ({error.strerror or error})")


def _file_name(key: str) -> str:
    return idx.spellings(key)[1]


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _explain(error: Exception, handled: BaseException | None = None) -> str:
    """Reduce an exception to one short line; those of requests carry several nested ones."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP status {response.status_code}"
    root: BaseException = error
    while (inner := root.__cause__ or root.__context__) is not None and inner is not handled:
        root = inner
    stalled = f"no data for {STALL_SECONDS:g} s" if isinstance(root, socket.timeout) else ""
    text = getattr(root, "strerror", None) or stalled or str(root) or type(root).__name__
    return " ".join(text.split())
