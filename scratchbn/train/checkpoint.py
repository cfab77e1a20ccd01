"""Checkpoints on disk: complete or absent, checked when read, never mixed up with another run's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._writing import UNFINISHED, PathLike

__all__ = ["KEPT", "CheckpointError", "Checkpoints", "WriteError"]

KEPT = 3
"""How many checkpoints stay when another one is saved."""

_MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = "step-{:09d}"


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be used, or must not be added to."""


class WriteError(CheckpointError):
    """A checkpoint that the disk refused; those before it are as they were."""


class _DamagedError(Exception):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """The checkpoints of one run, each a directory ``step-000000123``.

    A directory gets its name when everything in it is on the disk, last of all a manifest with the
    SHA-256 of every file. The newest three are kept.

    Parameters
    ----------
    directory : str or path
        Created with the first checkpoint.
    identity : mapping
        Whatever decides the result of the run, by name, as JSON values and NumPy arrays, of which
        a digest is kept: only a run with the same identity can resume from a checkpoint.
    place : mapping, optional
        On what the run is done, by name, as JSON values: kept, and said where it has changed.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> checkpoints = Checkpoints(folder.name, {"seed": 1})
    >>> path = checkpoints.save(20, lambda new: (new / "state").write_text("half way"))
    >>> path.name, checkpoints.newest() == path
    ('step-000000020', True)
    >>> Checkpoints(folder.name, {"seed": 2}).newest()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    scratchbn.train.checkpoint.CheckpointError: ...step-000000020 is of another run: seed 1, now 2
    >>> folder.cleanup()
    """

    def __init__(
        self,
        directory: PathLike,
        identity: Mapping[str, Any],
        place: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._identity = json.loads(json.dumps(identity, default=_digest))
        self._place = dict(place or {})

    def beside(self, directory: PathLike) -> Checkpoints:
        """Return the checkpoints of the same run in another directory."""
        return Checkpoints(directory, self._identity, self._place)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, good or not, in order."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        numbers = [name[5:] for name in names if name.startswith("step-")]
        return sorted(int(n) for n in numbers if n.isdecimal() and _NAME.format(int(n))[5:] == n)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is."""
        return self.directory / _NAME.format(step)

    def newest(self, say: Callable[[str], None] = lambda line: None) -> Path | None:
        """Return the newest good checkpoint, or None if there are none at all.

        Parameters
        ----------
        say : callable
            Receives a line about each damaged checkpoint that is passed over, and about what has
            changed of the place.

        Raises
        ------
        CheckpointError
            If the newest good one is of another run, or if none is good.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                manifest = _verify(path)
            except _DamagedError as damage:
                say(f"{path} is damaged ({damage}), passed over")
                continue
            self._check_identity(path, manifest)
            before = manifest.get("place", {})
            for name, now in self._place.items():
                if before.get(name, now) != now:
                    say(f"{path} is of {name} {before[name]}, now {now}: it goes on, rounded anew")
            return path
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self.directory} is good"
            )
        return None

    def save(self, step: int, write: Callable[[Path], Any]) -> Path:
        """Write a checkpoint, and remove all but the newest three up to it.

        Parameters
        ----------
        step : int
            Not negative.
        write : callable
            Receives an empty directory and writes the files into it.

        Returns
        -------
        Path
            The checkpoint.

        Raises
        ------
        WriteError
            If the disk refuses; the other checkpoints stay.
        CheckpointError
            If there are checkpoints of another run.
        """
        path = self.path(step)
        try:
            self._refuse_other_runs()
            self.directory.mkdir(parents=True, exist_ok=True)
            for left_over in self.directory.glob(f"{UNFINISHED}*"):  # by a run that was killed
                shutil.rmtree(left_over, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.directory))
            try:
                write(staging)
                self._seal(staging, step)
                if path.exists():  # damaged, or the same: this run has been here before
                    shutil.rmtree(path)
                os.replace(staging, path)
                _sync(self.directory)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
        for old in [s for s in self.steps() if s <= step][:-KEPT]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return path

    def _refuse_other_runs(self) -> None:
        for step in self.steps():
            try:
                manifest = _verify(self.path(step))
            except _DamagedError:
                continue
            self._check_identity(self.path(step), manifest)

    def _seal(self, staging: Path, step: int) -> None:
        files = {file.name: _sha256(file) for file in sorted(staging.iterdir())}
        for name in files:
            _sync(staging / name)
        about = {"run": self._identity, "place": self._place}
        manifest = {"format": _FORMAT, "step": step, **about, "sha256": files}
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        _sync(staging / _MANIFEST)
        _sync(staging)

    def _check_identity(self, path: Path, manifest: dict[str, Any]) -> None:
        theirs, ours = manifest["run"], self._identity
        different = [
            f"{name} {theirs.get(name)!r}, now {ours.get(name)!r}"
            for name in dict.fromkeys([*ours, *theirs])
            if theirs.get(name) != ours.get(name) and name not in self._place
        ]
        if different:
            raise CheckpointError(f"{path} is of another run: {'; '.join(different)}")


def _verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all as they were written."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
        files = dict(manifest["sha256"])
        known = manifest["format"] == _FORMAT and isinstance(manifest["run"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"no manifest: {type(error).__name__}") from error
    if not known:
        raise _DamagedError(f"its format is not {_FORMAT}")
    for name, expected in files.items():
        try:
            actual = _sha256(path / name)
        except OSError as error:
            raise _DamagedError(f"{name}: {error.strerror}") from error
        if actual != expected:
            raise _DamagedError(f"{name} has changed")
    return manifest


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold a file or directory before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
