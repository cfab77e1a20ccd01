"""The IDX format: four files per data set (http://yann.lecun.com/exdb/mnist/), raw or gzipped."""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .dataset import DatasetError

# The files of a data set, and the dimensions of their arrays.
FILES = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}
IMAGE_SHAPE = (28, 28)
CLASSES = 10
GZIP_MAGIC = b"\x1f\x8b"
_KINDS = {
    b"<": "an HTML page: the file itself has to be downloaded",
    b"PK": "a ZIP archive: unpack it",
    b"\0\0\x08\x01": "the labels in place of the images",
    b"\0\0\x08\x03": "the images in place of the labels",
}
_UINT8 = 0x08


def spellings(key: str) -> tuple[str, ...]:
    """Return the names under which a file may be found: raw, then compressed, then with dots."""
    kind = f"idx{FILES[key]}-ubyte"
    return tuple(f"{key}{dot}{kind}{gz}" for dot in "-." for gz in ("", ".gz"))


def locate(folder: Path) -> dict[str, Path]:
    """Return which of the four files a folder has."""
    found = {}
    for key in FILES:
        # os.path, because a Path that may not be looked at raises.
        paths = [folder / name for name in spellings(key) if os.path.isfile(folder / name)]
        if paths:
            found[key] = paths[0]
    return found


def read(path: Path) -> bytes:
    """Return a file's content, uncompressed."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error
    return inflate(content, str(path))


def inflate(content: bytes, where: str, limit: int | None = None) -> bytes:
    """Undo gzip if there is any; servers and browsers do it unasked, so names do not tell."""
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            inflated = stream.read(-1 if limit is None else limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(
            f"{where}: expected an intact gzip file, found a damaged one of {len(content):,} bytes "
            f"({error}): copy or download it again"
        ) from error
    if limit is not None and len(inflated) > limit:
        raise DatasetError(f"{where}: expected at most {limit:,} bytes, found more")
    return inflated


def parse(content: bytes, dimensions: int, where: str) -> np.ndarray:
    """Turn the bytes of an IDX file of unsigned bytes into an array of that many dimensions."""
    magic = bytes([0, 0, _UINT8, dimensions])
    header = 4 + 4 * dimensions
    if content[:4] != magic:
        raise DatasetError(
            f"{where}: expected an IDX file of unsigned bytes with {dimensions} dimension(s), "
            f"magic {magic.hex()}; found {content[:4].hex() or 'an empty file'}{_kind(content)}"
        )
    if len(content) < header:
        raise DatasetError(
            f"{where}: expected a header of {header} bytes, found {len(content)} bytes in all"
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if shape[0] == 0:
        raise DatasetError(f"{where}: expected at least one item, found none (shape {shape})")
    expected = header + math.prod(shape)
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "trailing bytes"
        raise DatasetError(
            f"{where}: expected {expected:,} bytes for shape {shape}, "
            f"found {len(content):,} ({problem}): copy or download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _kind(content: bytes) -> str:
    """Say what a file is that is no IDX file of the right form, where its first bytes tell."""
    start = content[:64].lstrip()
    for first, kind in _KINDS.items():
        if start.startswith(first):
            return f", {kind}"
    is_text = start.isascii() and "".join(start.decode("ascii").split()).isprintable()
    return ", a text file" if start and is_text else ""


def parse_all(contents: Mapping[str, bytes], where: Mapping[str, str]) -> list[np.ndarray]:
    """Parse the four files: train images, train labels, test images, test labels."""
    arrays = {key: parse(contents[key], n, where[key]) for key, n in FILES.items()}
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images"], arrays[f"{part}-labels"]
        images_at, labels_at = where[f"{part}-images"], where[f"{part}-labels"]
        if images.shape[1:] != IMAGE_SHAPE:
            raise DatasetError(
                f"{images_at}: expected images of {IMAGE_SHAPE} pixels, found {images.shape[1:]}"
            )
        if len(images) != len(labels):
            raise DatasetError(
                f"{labels_at}: expected {len(images):,} labels, one for each image in {images_at}, "
                f"found {len(labels):,}"
            )
        if labels.max() >= CLASSES:
            raise DatasetError(
                f"{labels_at}: expected labels 0 to {CLASSES - 1}, "
                f"found {labels.max()} at position {labels.argmax()}"
            )
        arrays[f"{part}-labels"] = labels.astype(np.int32)
    return list(arrays.values())
