"""The near side of ``torch_worker.py``: starts it, asks it for samples."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from .runner import Seconds

# Threads of either side spin for a while after their work; the other side would pay for it.
_REST = 0.05  # seconds
_WORKER = Path(__file__).with_name("torch_worker.py")


class TorchError(RuntimeError):
    """PyTorch cannot be used, or does not run the same net."""


class TorchWorker:
    """A process with PyTorch that holds one net at a time.

    PyTorch and MXNet need not agree on a numpy or fit into one process, so it has its own.
    `python` is an interpreter that has torch; if it has none, TorchError says so.
    """

    def __init__(self, python: str) -> None:
        self._python = python
        # A file, as a pipe could fill up; closed on exit.
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
        except OSError as error:
            self._said.close()
            raise TorchError(f"{python} cannot be started: {error.strerror}") from error
        self.pid = self._process.pid
        hello = self._answer()
        self.version: str = hello["version"]
        self.threads: int = hello["threads"]

    def __enter__(self) -> TorchWorker:
        return self

    def __exit__(self, *_error: Any) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def build(
        self, net: str, work: str, shape: tuple[int, ...], parameters: int | None = None
    ) -> None:
        """Build a net and let it run a few times; it must train as many `parameters`."""
        count = self._ask(do="build", net=net, work=work, shape=shape)["parameters"]
        if parameters not in (None, count):
            raise TorchError(f"{net} trains {count} numbers in PyTorch, {parameters} in MXNet")

    def sample(self, steps: int) -> Seconds:
        """Return the seconds that `steps` steps take together; process time is the worker's."""
        time.sleep(_REST)
        answer = self._ask(do="run", steps=steps)
        time.sleep(_REST)
        return Seconds(float(answer["seconds"]), float(answer["process"]))

    def _ask(self, **request: Any) -> dict[str, Any]:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # that there is no answer will say why
                print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            answer = dict(json.loads(line))
            if "error" in answer:
                raise TorchError(answer["error"])
            return answer
        status = self._process.wait()
        self._said.seek(0)
        last = (self._said.read().strip().splitlines() or [f"ended with status {status}"])[-1]
        raise TorchError(f"{self._python}: {last}")
