"""The options of a script that trains: devices, checkpoints, and its part in a job."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .. import resolve_device
from .._command import integer
from .cluster import ALONE, ClusterError, Workers, join

__all__ = ["add_arguments", "make_directory", "resolve_devices", "workers_of"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, those of a session's checkpoints and those of a job to a parser."""
    add = parser.add_argument
    add(
        "--device",
        default="auto",
        help="auto (a GPU if usable), cpu, gpu, gpu:1, or several that divide every batch among "
        "them, as gpu:0,gpu:1 (default: auto)",
    )
    add(
        "--checkpoint-every",
        type=integer(1),
        metavar="STEPS",
        help="save a checkpoint in DIR/checkpoints after so many training steps, those of all nets "
        "together, and at the end",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the newest good checkpoint in DIR/checkpoints, if there is any",
    )
    add(
        "--kvstore",
        choices=("dist_sync",),
        help="train as a worker of a job on MXNet's parameter server; scripts/launch_local.py "
        "starts one on this machine, docs/training.md is for several machines",
    )
    for name, least, default, meaning in (
        ("--timeout", 2, 60, "how long a process may be silent before the job ends"),
        ("--join-timeout", 1, 300, "how long the processes may take to join the job"),
    ):
        add(
            name,
            type=integer(least),
            default=default,
            metavar="SECONDS",
            help=f"with --kvstore, {meaning} (default: {default})",
        )


def workers_of(options: argparse.Namespace) -> Workers:
    """Join the job if ``--kvstore`` says so; only a worker returns.

    Raises
    ------
    ClusterError
        If options and environment do not agree on whether there is a job.
    """
    if options.kvstore is not None:
        return join(options.join_timeout, options.timeout)
    if os.environ.get("DMLC_ROLE"):
        raise ClusterError("DMLC_ROLE is set: add --kvstore dist_sync, or unset it")
    return ALONE


def resolve_devices(spec: str) -> list[Any]:
    """Return the devices of ``--device``.

    Parameters
    ----------
    spec : str
        One device as :func:`scratchbn.resolve_device` takes it, or several with commas between
        them, ``'gpu:0,gpu:1'``.

    Returns
    -------
    list of mxnet.Context

    Raises
    ------
    ValueError
        If a device cannot be parsed, is given twice, or is of another kind than the others.
    DeviceError
        If a GPU cannot be used.

    Examples
    --------
    >>> resolve_devices("cpu:0,cpu:1")
    [cpu(0), cpu(1)]
    """
    names = spec.split(",")
    devices = [resolve_device(name) for name in names]
    if len(devices) > 1 and "auto" in names:
        raise ValueError(f"argument --device: auto is one device, it cannot be in {spec!r}")
    if len(set(devices)) < len(devices):
        raise ValueError(f"argument --device: {spec!r} has a device twice")
    if len({device.device_type for device in devices}) > 1:
        raise ValueError(f"argument --device: {spec!r} has devices of two kinds")
    return devices


def make_directory(path: Path) -> None:
    """Make the directory of ``--out``, before the work whose results go there.

    Raises
    ------
    ValueError
        If it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot be a directory ({error.strerror})"
        raise ValueError(f"argument --out: {str(path)!r} {reason}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"argument --out: {str(path)!r} is not writable")
