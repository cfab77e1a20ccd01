"""A data set as arrays, and the errors of getting one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Dataset", "DatasetError"]


class DatasetError(RuntimeError):
    """A data set is missing, damaged or not what its file names promise."""


class NotFoundError(DatasetError):
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
