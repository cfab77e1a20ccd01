"""Runs side by side on the same batches: resume, checkpoints, and what Ctrl-C does."""

from __future__ import annotations

import importlib.util
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import mxnet as mx
import numpy as np

from .. import __version__, get_backend
from .._checks import check_integer
from .._writing import PathLike
from .checkpoint import CheckpointError, Checkpoints
from .run import Run

__all__ = ["Interrupted", "Session"]


class Interrupted(Exception):
    """Ctrl-C, after the runs were saved.

    Attributes
    ----------
    path : Path or None
        The checkpoint; None if none could be saved.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class Session:
    """Train runs side by side, epoch by epoch, so that they can be stopped and resumed.

    As a context manager it resumes on entry and has Ctrl-C finish the step, save a checkpoint and
    raise :class:`Interrupted`; a second Ctrl-C is a ``KeyboardInterrupt`` at once. In a job all
    workers hold a session, and the one of rank 0 writes.

    Parameters
    ----------
    runs : sequence of Run
    orders : sequence of numpy.ndarray
        For each epoch the order of the examples, the same in every run and worker.
    batch_size : int
        Examples per step, over all devices of all workers.
    folder : str or path
        Where the checkpoints are; see :class:`Checkpoints`.
    identity : mapping
        Whatever else decides the result, by name, as JSON values and arrays: runs resume only from
        a checkpoint of the same. The order of the examples, the number of workers, the backend and
        the versions are added to it.
    seed : int, default 0
        For MXNet's random generator. Its state cannot be read, so it is seeded anew wherever a
        run can be resumed: at the start of an epoch and after each checkpoint.
    every : int, optional
        Save a checkpoint after so many steps, counted over all runs, and at the end.
    resume : bool, default False
        Continue from the newest good checkpoint, if there is any.
    say : callable, default print
        Receives a line about the checkpoints found.
    progress : bool, default True
        Show a bar, on a terminal and where tqdm is installed.

    Attributes
    ----------
    runs : sequence of Run
    steps_per_epoch : int

    Raises
    ------
    CheckpointError
        On entry, if the checkpoints in `folder` cannot be resumed from or must not be added to.

    Examples
    --------
    >>> import tempfile
    >>> from mxnet.gluon import loss, nn
    >>> net = nn.Dense(1, in_units=1)
    >>> net.initialize(mx.init.Zero())
    >>> run = Run("line", net, loss.L2Loss(), optimizer_params={"learning_rate": 0.1})
    >>> x, y = np.float32([[1], [2], [3]]), np.float32([2, 4, 6])
    >>> orders = [np.array([2, 0, 1]), np.array([0, 1, 2])]  # one for each epoch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Session([run], orders, 2, folder, {"lr": 0.1}, progress=False) as session:
    ...         for run, epoch, batches in session.epochs():
    ...             for batch in batches:
    ...                 _ = run.step(x[batch], y[batch])
    ...             print(epoch, f"{run.end_epoch(seen=len(y))['loss']:.2f}")
    1 9.90
    2 9.71
    """

    def __init__(
        self,
        runs: Sequence[Run],
        orders: Sequence[np.ndarray],
        batch_size: int,
        folder: PathLike,
        identity: Mapping[str, Any],
        *,
        seed: int = 0,
        every: int | None = None,
        resume: bool = False,
        say: Callable[[str], None] = print,
        progress: bool = True,
    ) -> None:
        check_integer("batch_size", batch_size, least=1)
        if every is not None:
            check_integer("every", every, least=1)
        names = [run.name for run in runs]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"runs must be at least one, of different names, got {names}")
        if not len(orders):
            raise ValueError("orders must hold an order for each epoch, got none")
        self.runs = runs
        self.steps_per_epoch = math.ceil(len(orders[0]) / batch_size)
        self._workers = runs[0].workers
        self._orders = orders
        self._batch_size = batch_size
        self._checkpoints = Checkpoints(
            folder,
            {
                **identity,
                "workers": self._workers.size,
                "order": orders[0],
                "backend": get_backend(),
                "versions": f"scratchbn {__version__}, mxnet {mx.__version__}",
            },
        )
        self._seed = seed
        self._every = every
        self._resume = resume
        self._say = say
        self._progress = progress
        self._stop_requested = False
        self._previous_handler: Any = None

    def __enter__(self) -> Session:
        folder = self._checkpoint_to_resume()
        if folder is not None:
            self._load(folder)
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._request_stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)

    def epochs(self) -> Iterator[tuple[Run, int, Iterator[np.ndarray]]]:
        """Yield what is left to do: a run, the number of an epoch from 1, and its batches.

        The caller trains on the batches, each an array of indices, and then calls
        :meth:`Run.end_epoch`.

        Raises
        ------
        Interrupted
            After Ctrl-C, here or from the batches.
        CheckpointError
            If a checkpoint cannot be saved.
        """
        for epoch in range(len(self._orders)):
            for run in self.runs:
                if len(run.epochs) == epoch:  # or else it was done before the checkpoint
                    self._seed_generator(run)
                    yield run, epoch + 1, self._batches(run, epoch)
        if self._every:
            self._save()

    def interruption_point(self) -> None:
        """Stop here if Ctrl-C asks for it: for long work between steps, such as an evaluation.

        Does nothing in a job: only one worker measures, and the others would not know.
        """
        if self._stop_requested and self._workers.size == 1:
            self._interrupt()

    # --- steps --------------------------------------------------------------------------------

    def _batches(self, run: Run, epoch: int) -> Iterator[np.ndarray]:
        order = self._orders[epoch]
        done = len(run.losses) - epoch * self.steps_per_epoch
        mx.nd.waitall()
        with self._bar(f"epoch {epoch + 1} {run.name}", done) as bar:
            for start in range(done * self._batch_size, len(order), self._batch_size):
                yield order[start : start + self._batch_size]
                self._after_step(run)
                if bar is not None:
                    bar.set_postfix(loss=f"{run.losses[-1]:.4f}", refresh=False)
                    bar.update()
        with run.timed():
            mx.nd.waitall()

    def _after_step(self, run: Run) -> None:
        if self._workers.gather("stop", self._stop_requested).any():
            self._interrupt()
        if self._every and self._steps() % self._every == 0:
            self._save()
            self._seed_generator(run)

    def _bar(self, title: str, done: int) -> Any:
        if not self._progress or importlib.util.find_spec("tqdm") is None:
            return nullcontext()
        from tqdm import tqdm

        return tqdm(
            desc=title,
            total=self.steps_per_epoch,
            initial=done,
            unit="batch",
            leave=False,
            disable=None,  # where there is no terminal
        )

    def _steps(self) -> int:
        return sum(len(run.losses) for run in self.runs)

    def _seed_generator(self, run: Run) -> None:
        sequence = np.random.SeedSequence((self._seed, len(run.losses)))
        mx.random.seed(int(sequence.generate_state(1)[0]) % 2**31)

    # --- Ctrl-C -------------------------------------------------------------------------------

    def _request_stop(self, *_: Any) -> None:
        """Have Ctrl-C asked for, not thrown into the middle of a step; a second one is thrown."""
        if self._stop_requested:
            raise KeyboardInterrupt
        self._stop_requested = True

    def _interrupt(self) -> None:
        try:
            path = self._save()
        except CheckpointError as error:
            raise Interrupted(f"interrupted; no checkpoint was saved: {error}") from error
        raise Interrupted(f"interrupted; saved {path}", path)

    # --- checkpoints --------------------------------------------------------------------------

    def _checkpoint_to_resume(self) -> Path | None:
        folder = None
        if self._resume:
            folder = self._checkpoints.newest(lambda line: self._say(f"note: {line}"))
            if folder is None:
                self._say(f"no checkpoint in {self._checkpoints.directory}: starting afresh")
        elif self._every and self._checkpoints.steps():
            raise CheckpointError(
                f"{self._checkpoints.directory} has checkpoints already: add --resume to go on "
                "from them, or choose another --out"
            )
        steps = self._workers.gather("resumed", -1 if folder is None else int(folder.name[5:]))
        if len(set(steps.tolist())) > 1:
            raise CheckpointError(
                f"the workers found different checkpoints, of steps {steps.tolist()}: --out must "
                "be a directory that all of them share"
            )
        return folder

    def _load(self, folder: Path) -> None:
        for run in self.runs:
            run.load(folder)
            if len(run.losses) > len(self._orders) * self.steps_per_epoch:
                raise CheckpointError(
                    f"{folder} is beyond the end of --epochs {len(self._orders)}: its "
                    f"{run.name} net has taken {len(run.losses)} steps"
                )
        self._say(f"resumed from {folder}")

    def _save(self) -> Path:
        """Save a checkpoint of all runs; all workers call this."""
        step = self._steps()
        statistics = [run.statistics() for run in self.runs]

        def write(folder: Path) -> None:
            for run, copies in zip(self.runs, statistics):
                run.save(folder, copies)

        if self._workers.rank == 0:
            self._checkpoints.save(step, write)
        self._workers.gather("saved", 0)
        return self._checkpoints.path(step)
