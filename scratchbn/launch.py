"""Run a command as a job of MXNet's parameter server on this machine.

The command is started once for each process of the job, a scheduler, servers and workers, with the
environment variables that tell it its role. The launcher itself does without MXNet.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TextIO

from ._command import Parser, add_job

__all__ = ["launch", "main"]

LAUNCHER = "SCRATCHBN_LAUNCHER"  # variable with the command that a local job's own comes after

EPILOG = """\
Example:
  python -m scratchbn launch --workers 2 -- \\
      python scripts/train_lenet.py --kvstore dist_sync --epochs 2

Every line of output begins with the process it comes from. When a process fails, all others are
ended. Ctrl-C and SIGTERM are passed on to the workers, which may save their work; a second one
ends all.

Exit status: 0 if all went well; otherwise that of the first process that failed, 1 if a signal
ended it; 2 for a command that cannot be run; 130 after Ctrl-C, 143 after SIGTERM."""

_LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
_printing = threading.Lock()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse a command line and run its job.

    Parameters
    ----------
    argv : sequence of str, optional
        The command line without the program's name; default: this process's.

    Returns
    -------
    int
        Exit status; ``--help`` says what it means.
    """
    parser = Parser(description=__doc__, epilog=EPILOG)
    add_job(parser.add_argument)
    options = parser.parse_args(argv)
    return launch(options.program, options.workers, options.servers)


def launch(command: Sequence[str], workers: int = 2, servers: int = 1) -> int:
    """Run a command as a job, and wait for its end.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments.
    workers, servers : int
        How many of each to start, beside one scheduler.

    Returns
    -------
    int
        Exit status: see :func:`main`.
    """
    if shutil.which(command[0]) is None:
        _say(f"error: no program {command[0]!r}")
        return 2
    interrupts: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: interrupts.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with ExitStack() as cleanup:
            processes = _start(command, workers, servers, cleanup)
            return _wait(processes, interrupts)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Process:
    name: str
    popen: subprocess.Popen[str]

    @property
    def is_worker(self) -> bool:
        return self.name.startswith("worker")

    def ending(self) -> str:
        """Return how it ended."""
        status = self.popen.returncode
        if status < 0:
            return f"{self.name} was ended by {signal.Signals(-status).name}"
        return f"{self.name} ended with status {status}"


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


def _start(
    command: Sequence[str], workers: int, servers: int, cleanup: ExitStack
) -> list[_Process]:
    """Start all processes; `cleanup` will end them and wait for their output."""
    again = [sys.executable, "-m", "scratchbn", "launch"]
    again += [f"--workers={workers}", f"--servers={servers}"]
    common = {
        **os.environ,
        "DMLC_PS_ROOT_URI": _LOOPBACK,
        "DMLC_PS_ROOT_PORT": str(free_port()),
        "DMLC_NODE_HOST": _LOOPBACK,
        "DMLC_NUM_WORKER": str(workers),
        "DMLC_NUM_SERVER": str(servers),
        LAUNCHER: f"{shlex.join(again)} -- ",
    }
    # Workers that each use all cores slow each other down.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    common.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // workers)))
    names = ["scheduler"]
    names += [f"server {i}" for i in range(servers)] + [f"worker {i}" for i in range(workers)]
    processes: list[_Process] = []
    forwards: list[threading.Thread] = []
    cleanup.callback(_join, forwards)
    cleanup.callback(_end, processes)
    for name in names:
        popen = subprocess.Popen(
            command,
            env={**common, "DMLC_ROLE": name.split()[0]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C in the terminal must not reach the servers
        )
        processes.append(_Process(name, popen))
        for source, target in ((popen.stdout, sys.stdout), (popen.stderr, sys.stderr)):
            thread = threading.Thread(target=_forward, args=(name, source, target), daemon=True)
            thread.start()
            forwards.append(thread)
    return processes


def free_port() -> int:
    """Return the number of a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _forward(name: str, source: Any, target: TextIO) -> None:
    for line in source:
        with _printing:  # or parts of two long lines would mix
            target.write(f"{name} | {line}" if line.endswith("\n") else f"{name} | {line}\n")
            target.flush()


def _wait(processes: list[_Process], interrupts: list[int]) -> int:
    """Wait for all processes, or for one to fail; return the exit status."""
    passed_on = False
    workers_done: float | None = None
    while True:
        running = [p for p in processes if p.popen.poll() is None]
        failed = [p for p in processes if p.popen.returncode not in (None, 0)]
        if len(interrupts) > 1:
            _say("interrupted again: ending the job")
            return 128 + interrupts[0]
        if interrupts and not passed_on:
            passed_on = True
            _say("interrupted: the workers may save their work")
            for process in running:
                if process.is_worker:
                    process.popen.send_signal(interrupts[0])
        if failed and not passed_on:
            _say(f"error: {failed[0].ending()}; ending the job")
            return max(failed[0].popen.returncode, 1)
        if not any(p.is_worker for p in running):
            if passed_on:
                return 128 + interrupts[0]
            if not running:
                return 0
            workers_done = workers_done or time.monotonic()
            if time.monotonic() - workers_done > _GRACE_SECONDS:
                _say(f"error: the workers are done, {running[0].name} is not; ending the job")
                return 1
        time.sleep(_POLL_SECONDS)


def _end(processes: list[_Process]) -> None:
    """End what still runs, with everything it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in processes:
            if process.popen.poll() is None:  # a worker would wait for the others to save
                os.killpg(process.popen.pid, signal.SIGKILL if process.is_worker else number)
        for process in processes:
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(_GRACE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
