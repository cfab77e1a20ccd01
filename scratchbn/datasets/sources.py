"""The named sets: what they are known by, and where a machine may have them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from . import idx
from .dataset import Dataset, DatasetError, NotFoundError

_SHOWN = 4  # names of files in a message
_SEARCHED = 200  # folders on a level


@dataclass(frozen=True)
class Source:
    """A set that is known by the hashes of its four files."""

    title: str
    mirrors: tuple[str, ...]
    sha256: dict[str, str]
    folders: tuple[Path, ...] = ()


# The hashes are of the uncompressed files: mirrors compress the same files differently.
SOURCES = {
    "mnist": Source(
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
    "fashion": Source(
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


def read_folder(folder: Path) -> Dataset:
    """Read the four files of a folder, and name what they are."""
    paths = idx.locate(folder)
    missing = [idx.spellings(key)[0] for key in idx.FILES if key not in paths]
    if missing:
        raise DatasetError(
            f"{folder}: missing {', '.join(missing)} (each may end in .gz); "
            "expected the four IDX files of an MNIST-like data set, found "
            + _found(folder, list(paths.values()))
        )
    where = {key: str(path) for key, path in paths.items()}
    contents = {key: idx.read(path) for key, path in paths.items()}
    arrays = idx.parse_all(contents, where)
    return Dataset(_identify(contents, where, folder), str(folder), *arrays)


def find(name: str, cache: Path | None) -> Dataset:
    """Look for a named set on this machine; the first place that holds it intact wins."""
    reasons = []
    for folder, chosen_by_user in _places(name, cache):
        if not idx.locate(folder):
            reasons.append(f"{folder}: no IDX files")
            continue
        try:
            found = read_folder(folder)
        except DatasetError as error:
            if chosen_by_user:
                raise DatasetError(f"SCRATCHBN_DATA: {error}") from error
            reasons.append(str(error))
            continue
        if found.name == name:
            return found
        reasons.append(f"{folder}: holds {found.name!r}")
    raise NotFoundError(SOURCES[name].title, reasons or ["no cache directory is known"])


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the cache: given, that of the environment, or the platform's if pooch knows it."""
    given = cache_dir or os.environ.get("SCRATCHBN_CACHE")
    if given:
        return Path(given).expanduser()
    try:
        import pooch
    except ImportError:
        return None
    return Path(pooch.os_cache("scratchbn"))


def _found(folder: Path, idx_files: list[Path]) -> str:
    """Say what a folder has in place of the four files, or below it."""
    below = next((f for f in _folders_below(folder) if len(idx.locate(f)) == len(idx.FILES)), None)
    if below is not None:
        return f"them in {str(below)!r}: name that directory"
    if idx_files:
        return f"only {', '.join(path.name for path in idx_files)}"
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"that it cannot be listed ({error.strerror or error})"
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} other name{'s' * (len(names) > 1)}: {shown}" if names else "nothing there"


def _folders_below(folder: Path) -> list[Path]:
    """Return the folders one and two levels below, some of them where there are many."""
    found: list[Path] = []
    for depth in ("*/", "*/*/"):
        try:
            found += [path for path in islice(folder.glob(depth), _SEARCHED) if path.is_dir()]
        except OSError:  # what may not be looked at is not what is meant
            continue
    return found


def _places(name: str, cache: Path | None) -> Iterator[tuple[Path, bool]]:
    """Yield the folders to look in, and whether the user named them."""
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
    for folder in SOURCES[name].folders:
        yield folder, False


def _identify(contents: Mapping[str, bytes], where: Mapping[str, str], folder: Path) -> str:
    """Name a set by its hashes; one odd file among known ones is damage, not a new set."""
    digests = {key: hashlib.sha256(content).hexdigest() for key, content in contents.items()}
    for name, source in SOURCES.items():
        odd = [key for key in idx.FILES if digests[key] != source.sha256[key]]
        if not odd:
            return name
        if len(odd) == 1:
            raise DatasetError(
                f"{where[odd[0]]}: the other three files are {source.title}, this one is not; "
                f"expected SHA-256 {source.sha256[odd[0]]}, found {digests[odd[0]]}"
            )
    return f"custom:{folder.resolve().name}"
