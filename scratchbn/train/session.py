"""Runs side by side on the same batches: resume, checkpoints, and what Ctrl-C and SIGTERM do."""

from __future__ import annotations

import importlib.util
import math
import signal
import tempfile
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
from .checkpoint import CheckpointError, Checkpoints, WriteError
from .run import Run

__all__ = ["Interrupted", "Session"]

_ENDINGS: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "ended by SIGTERM",
    signal.SIGPIPE: "nobody reads the output",
}


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or an output that nobody reads, after the runs were saved.

    Attributes
    ----------
    path : Path or None
        The checkpoint; None if none could be saved where checkpoints belong.
    status : int
        What the process should exit with: 128 and the number of the signal, 130, 143 or 141.
    """

    def __init__(self, message: str, path: Path | None = None, status: int = 130) -> None:
        super().__init__(message)
        self.path = path
        self.status = status


class Session:
    """Train runs side by side, epoch by epoch, so that they can be stopped and resumed.

    As a context manager it resumes on entry and has Ctrl-C and SIGTERM finish the step, save a
    checkpoint and raise :class:`Interrupted`; a second one is a ``KeyboardInterrupt`` at once. In
    a job all workers hold a session, and the one of rank 0 writes.

    A checkpoint that the disk refuses does not end the training: it is said, the runs stay in
    memory, and the next one is tried. At an interruption, at the end, and where a file error
    leaves the ``with`` block, the runs are then saved in a new directory for temporary files.

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
        a checkpoint of the same. The order of the examples, the backend and the versions are
        added to it.
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
    place : mapping, optional
        On what the runs are trained, by name, as JSON values. It may change, as the number of
        devices and workers may: that is said, and each starts with the average of the statistics.

    Attributes
    ----------
    runs : sequence of Run
    steps_per_epoch : int
    unsaved : str or None
        Why the newest checkpoint could not be written where checkpoints belong.

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
        place: Mapping[str, Any] | None = None,
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
                "order": orders[0],
                "backend": get_backend(),
                "versions": f"scratchbn {__version__}, mxnet {mx.__version__}",
            },
            {**(place or {}), "workers": self._workers.size},
        )
        self._seed = seed
        self._every = every
        self._resume = resume
        self._say = say
        self._progress = progress
        self.unsaved: str | None = None
        self._stop_signal = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Session:
        folder = self._checkpoint_to_resume()
        if folder is not None:
            self._load(folder)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._request_stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, OSError) and self._workers.size == 1 and self._steps():
                if isinstance(error, BrokenPipeError):
                    self._interrupt(signal.SIGPIPE)
                raise WriteError(f"{error}; {self._rescue(self._writer())}") from error
        finally:
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)

    def epochs(self) -> Iterator[tuple[Run, int, Iterator[np.ndarray]]]:
        """Yield what is left to do: a run, the number of an epoch from 1, and its batches.

        The caller trains on the batches, each an array of indices, and then calls
        :meth:`Run.end_epoch`.

        Raises
        ------
        Interrupted
            After Ctrl-C or SIGTERM, here or from the batches.
        CheckpointError
            If there are checkpoints of another run.
        """
        for epoch in range(len(self._orders)):
            for run in self.runs:
                if len(run.epochs) == epoch:  # or else it was done before the checkpoint
                    self._seed_generator(run)
                    yield run, epoch + 1, self._batches(run, epoch)
        if self._every and self._save() is None:
            self._say(f"warning: {self._rescue(self._writer())}")

    def interruption_point(self) -> None:
        """Stop here if a signal asks for it: for long work between steps, such as an evaluation.

        Does nothing in a job: only one worker measures, and the others would not know.
        """
        if self._stop_signal and self._workers.size == 1:
            self._interrupt(self._stop_signal)

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
        number = int(self._workers.gather("stop", self._stop_signal).max())
        if number:
            self._interrupt(number)
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

    # --- signals ------------------------------------------------------------------------------

    def _request_stop(self, number: int, _: Any) -> None:
        """Have a signal wait for the end of a step; a second one does not."""
        if self._stop_signal:
            raise KeyboardInterrupt
        self._stop_signal = number

    def _interrupt(self, number: int) -> None:
        word = _ENDINGS[number]
        try:
            path = self._save()
        except CheckpointError as error:
            message = f"{word}; no checkpoint was saved: {error}"
            raise Interrupted(message, None, 128 + number) from error
        saved = f"saved {path}" if path else f"{self.unsaved}; {self._rescue(self._writer())}"
        raise Interrupted(f"{word}; {saved}", path, 128 + number)

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

    def _save(self) -> Path | None:
        """Save a checkpoint of all runs; None if the disk refuses. All workers call this."""
        step = self._steps()
        write = self._writer()
        before, self.unsaved = self.unsaved, None
        if self._workers.rank == 0:
            try:
                self._checkpoints.save(step, write)
            except WriteError as error:
                self.unsaved = str(error)
                if before is None:
                    self._say(f"warning: {error}; training goes on with the nets in memory")
        refused = self._workers.gather("saved", float(self.unsaved is not None)).any()
        return None if refused else self._checkpoints.path(step)

    def _writer(self) -> Callable[[Path], None]:
        """Return what writes all runs to a folder; all workers call this."""
        statistics = [run.statistics() for run in self.runs]

        def write(folder: Path) -> None:
            for run, copies in zip(self.runs, statistics):
                run.save(folder, copies)

        return write

    def _rescue(self, write: Callable[[Path], None]) -> str:
        """Save the runs in a new directory for temporary files; return what to say of it."""
        if self._workers.rank != 0:
            return "the worker of rank 0 has the nets"
        try:
            place = self._checkpoints.beside(tempfile.mkdtemp(prefix="scratchbn-"))
            path = place.save(self._steps(), write)
        except (OSError, CheckpointError) as error:
            return f"nor could the nets be saved in a second place: {error}"
        return f"the nets are in {path}: move it to {self._checkpoints.directory}, add --resume"
