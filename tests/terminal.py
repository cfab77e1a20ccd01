"""Commands in a pseudo terminal of a given width, as a person would see them."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from dataclasses import dataclass

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]")


@dataclass
class Seen:
    """What a command showed: `text` without colours; `lines` as they stand on the screen."""

    status: int
    text: str

    @property
    def lines(self):
        """The lines, of those written over each other the last."""
        ends = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in self.text.split("\n")]
        return ends[:-1] if ends[-1] == "" else ends

    @property
    def widest(self):
        return max(len(part) for part in re.split(r"[\r\n]", self.text))


def in_terminal(command, columns, *, cwd=None, env=None, timeout=120, until=None, then=None):
    """Run a command; once `until` is in what it shows, call `then` with its process."""
    timeout *= float(os.environ.get("SCRATCHBN_TEST_PATIENCE", 1))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    given = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        list(map(str, command)),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=cwd,
        env={**given, "TERM": "xterm-256color", **(env or {})},
        start_new_session=True,
    )
    os.close(slave)
    shown, end = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            if select.select([master], [], [], 0.2)[0]:
                try:
                    chunk = os.read(master, 65536)
                except OSError:  # the last process that wrote to it has ended
                    break
                if not chunk:
                    break
                shown += chunk
            if then is not None and until.encode() in shown:
                then(process)
                then = None
        status = process.wait(timeout=max(1, end - time.monotonic()))
    finally:
        process.kill()
        os.close(master)
    text = _ESCAPES.sub("", shown.decode("utf-8", "replace")).replace("\r\n", "\n")
    return Seen(status, text)
