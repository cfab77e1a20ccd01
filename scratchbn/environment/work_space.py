"""Work space for CPUs that wait for each other: MXNet reads it when it first computes.

The operators of all CPU devices in a process take their work space from a few buffers in turn, and
whoever waits keeps its turn. So where one device waits for another, the other needs a buffer that
none of those waiting has.
"""

from __future__ import annotations

import os

WORK_SPACE = "MXNET_CPU_TEMP_COPY"
_BUFFERS = 4096
_LEAST = 64


def give_work_space() -> None:
    """Ask for more buffers than wait at a time, unless the user has asked for some number."""
    os.environ.setdefault(WORK_SPACE, str(_BUFFERS))


def has_work_space() -> bool:
    """Tell whether enough buffers were asked for."""
    text = os.environ.get(WORK_SPACE, "")
    return text.isdigit() and int(text) >= _LEAST
