"""Training that can be stopped and resumed, on several devices and on several machines.

:class:`Run` is a net in training, :class:`Session` trains runs side by side with checkpoints,
:func:`join` makes the process a worker of a job. In a scheduler or server of such a job, import
this package before MXNet, whose import would serve and not return. :mod:`scratchbn.launch`
starts a job on this machine, :mod:`scratchbn.train.plot` draws the curves of runs.
"""

from . import _mxnet  # noqa: F401  (before any other module imports MXNet)
from .checkpoint import CheckpointError, Checkpoints, WriteError
from .cluster import ALONE, Alone, Cluster, ClusterError, Workers, end_on_error, join
from .options import add_arguments, make_directory, resolve_devices, workers_of
from .run import Run, read_values, write_values
from .session import Interrupted, Session

__all__ = [
    "ALONE",
    "Alone",
    "CheckpointError",
    "Checkpoints",
    "Cluster",
    "ClusterError",
    "Interrupted",
    "Run",
    "Session",
    "Workers",
    "WriteError",
    "add_arguments",
    "end_on_error",
    "join",
    "make_directory",
    "read_values",
    "resolve_devices",
    "workers_of",
    "write_values",
]
