"""Processes that train one net together through MXNet's parameter server, and how they fail.

A job is a scheduler, servers and workers, told apart by the environment variables of MXNet's
launcher (``DMLC_ROLE`` and those below). MXNet waits forever for a process that is gone. The
processes therefore send ps-lite's heartbeats: the scheduler ends when it misses one of the others,
and the others end when they miss the scheduler.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Union

import mxnet as mx
import numpy as np
from mxnet.base import _LIB, check_call
from mxnet.kvstore import KVStoreBase

__all__ = ["ALONE", "Alone", "Cluster", "ClusterError", "Workers", "end_on_error", "join"]

ROLES = ("scheduler", "server", "worker")
_VARIABLES = ("DMLC_PS_ROOT_URI", "DMLC_PS_ROOT_PORT", "DMLC_NUM_WORKER", "DMLC_NUM_SERVER")
_ALL_NODES = 7  # ps-lite's groups of nodes, scheduler 1 + servers 2 + workers 4
_HEARTBEAT_SECONDS = 1
_NOT_FULL = "not all processes of the job have joined it"


class ClusterError(RuntimeError):
    """The environment does not describe a job."""


class Alone:
    """The only worker."""

    rank = 0
    size = 1

    def key_store(self, name: str) -> Any:
        """Return what sums a Trainer's gradients over the devices."""
        return "device"

    def gather(self, name: str, values: Any) -> np.ndarray:
        """Return the values of every worker, here of one, as float64, shape (1, ...)."""
        return np.asarray(values, np.float64)[np.newaxis]

    def leave(self, status: int) -> int:
        """Return `status`."""
        return status


class Cluster:
    """The workers of a job, seen from one of them.

    Parameters
    ----------
    store : mxnet.kvstore.KVStore
        Of kind ``dist_sync``.
    timeout : float
        Seconds after which a process that sends no heartbeat counts as lost.

    Attributes
    ----------
    rank : int
        The number of this worker; that of rank 0 writes the files.
    size : int
        How many workers there are.
    """

    def __init__(self, store: Any, timeout: float) -> None:
        self.store = store
        self.rank: int = store.rank
        self.size: int = store.num_workers
        self._timeout = timeout
        self._watch = _Watch(store.handle, "worker", timeout)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def key_store(self, name: str) -> Any:
        """Return what sums a Trainer's gradients over the workers; `name` sets its keys apart."""
        return _TrainerKeys(self, name)

    def gather(self, name: str, values: Any) -> np.ndarray:
        """Return the values of every worker; all of them call this, in the same order.

        Parameters
        ----------
        name : str
            The key, always used with values of the same shape.
        values : array_like

        Returns
        -------
        numpy.ndarray, float64, shape (size, ...)
            By rank, each value as it was, up to the range of float32.
        """
        parts = _float32_parts(np.asarray(values, np.float64))
        known = self._shapes.get(name)
        if known is not None and known != parts.shape:
            raise ValueError(
                f"values of {name!r} must be of shape {known[1:]}, got {parts.shape[1:]}"
            )
        table = mx.nd.zeros((self.size, *parts.shape))
        table[self.rank] = parts
        if known is None:
            self.store.init(f"gather:{name}", table.zeros_like())
            self._shapes[name] = parts.shape
        self.store.pushpull(f"gather:{name}", table)  # all others add zeros
        return table.asnumpy().astype(np.float64).sum(axis=1)

    def leave(self, status: int) -> int:
        """Leave the job: together with the others, or at once if `status` says it failed."""
        if status not in (0, 130, 143):  # 128 and the number of a signal
            _exit(status)
        self.store._barrier()  # others may still write files; the watch goes on until they are done
        self._watch.stop()
        with _deadline(self._timeout, "the job did not end"):
            self.store = None
        return status


ALONE = Alone()
Workers = Union[Alone, Cluster]


def join(patience: float, timeout: float) -> Cluster:
    """Take this process's part in a job; only a worker returns.

    Parameters
    ----------
    patience : float
        Seconds to wait for the others to join.
    timeout : float
        Seconds after which a process that sends no heartbeat counts as lost.

    Raises
    ------
    ClusterError
        If the environment does not describe a job.
    SystemExit
        In a scheduler or server, when the workers are done.
    """
    role = _role()
    os.environ["PS_HEARTBEAT_INTERVAL"] = str(_HEARTBEAT_SECONDS)
    with _deadline(patience, _NOT_FULL):
        store = mx.kv.create("dist_sync")
    if role == "worker":
        return Cluster(store, timeout)
    watch = _Watch(store.handle, role, timeout, patience)
    mx.kvstore.KVStoreServer(store).run()
    watch.stop()
    sys.exit(0)


def end_on_error(workers: Workers) -> NoReturn:
    """Report the exception being handled; a process of a job ends without waiting for the rest."""
    if isinstance(workers, Cluster):
        traceback.print_exc()
        _exit(1)
    raise


def _float32_parts(values: np.ndarray) -> np.ndarray:
    """Return three float32 numbers for each float64 one, whose sum it is; shape (3, ...).

    MXNet's server adds up other types in float32, or not, as messages arrive.
    """
    parts = []
    for _ in range(3):
        parts.append(values.astype(np.float32))
        values = values - parts[-1]
    return np.stack(parts)


def _role() -> str:
    role = os.environ.get("DMLC_ROLE", "")
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if role not in ROLES:
        missing.insert(0, f"DMLC_ROLE ({', '.join(ROLES)})")
    if missing:
        raise ClusterError(
            f"--kvstore dist_sync needs the environment variables {', '.join(missing)}: "
            "scripts/launch_local.py sets them on one machine, docs/training.md is for several"
        )
    return role


def _exit(status: int) -> NoReturn:
    # A normal exit would wait in MXNet's destructors for workers that may never come.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _give_up(message: str) -> NoReturn:
    print(f"error: {message}; ending the job", file=sys.stderr, flush=True)
    _exit(1)


@contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """End the process if the block, a call into MXNet that cannot be stopped, takes longer."""
    timer = threading.Timer(seconds, _give_up, [f"{message} within {seconds:g} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Watch:
    """A thread that ends the process when another one is lost."""

    def __init__(self, handle: Any, role: str, timeout: float, patience: float = 0) -> None:
        self._handle = handle
        self._role = role
        self._timeout = timeout
        self._patience = patience
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread: it must not use the store's handle once the store is gone."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        joined = False
        while not self._done.wait(_HEARTBEAT_SECONDS):
            if not joined:
                # Nodes silent since a moment in the future: all, as soon as they have joined.
                joined = self._count_silent(-_ALL_NODES) > 0
                if not joined and time.monotonic() - began > self._patience:
                    _give_up(f"{_NOT_FULL} within {self._patience:g} s")
                continue
            silent = self._count_silent(max(1, round(self._timeout)))
            if silent and self._role == "scheduler":
                _give_up(f"{silent} of the workers and servers silent for {self._timeout:g} s")
            if silent:
                _give_up(
                    f"the scheduler is silent for {self._timeout:g} s: it ended, as it does when "
                    "a worker or server is lost"
                )

    def _count_silent(self, seconds: int) -> int:
        count = ctypes.c_int()
        check_call(
            _LIB.MXKVStoreGetNumDeadNode(
                self._handle, ctypes.c_int(_ALL_NODES), ctypes.byref(count), ctypes.c_int(seconds)
            )
        )
        return count.value


class _TrainerKeys(KVStoreBase):
    """A store for one Trainer: each counts its parameters from 0, on the one store of the job."""

    type = "dist_sync"

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster  # not its store: on leaving, the cluster gives up the only one
        self._name = name

    @property
    def rank(self) -> int:
        return self._cluster.rank

    @property
    def num_workers(self) -> int:
        return self._cluster.size

    def broadcast(self, key: Any, value: Any, out: Any, priority: int = 0) -> None:
        self._cluster.store.broadcast(f"{self._name}:{key}", value, out, priority)
        # The server keeps gradients under the same key: a value still on its way when they arrive
        # would be replaced by their sum.
        for copy in out if isinstance(out, list) else [out]:
            copy.wait_to_read()

    def pushpull(self, key: Any, value: Any, out: Any = None, priority: int = 0) -> None:
        self._cluster.store.pushpull(f"{self._name}:{key}", value, out, priority)

    def is_capable(self, capability: str) -> bool:
        return False  # every worker applies the summed gradients itself
