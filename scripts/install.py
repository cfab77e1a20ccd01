"""Install the locked packages into the Python that runs this, with one line of progress.

Needs nothing but that Python and its pip.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
# The lock names every package; modules are compiled when they are first imported.
PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
PIP += ["--no-deps", "--no-compile"]


def collected(lines: Iterator[str]) -> Iterator[str]:
    """Yield the requirements that pip turns to, from what it prints."""
    for line in lines:
        for start in ("Collecting ", "Requirement already satisfied: "):
            if line.startswith(start):
                yield line[len(start) :].split(";")[0].split(" ")[0].strip()


def remembered(lines: Iterator[str], last: deque[str]) -> Iterator[str]:
    """Pass the lines on, and keep the last of them."""
    for line in lines:
        last.append(line)
        yield line


def install(lock: Path) -> int:
    """Install what a lock file names; return pip's exit status."""
    total = sum(1 for line in lock.read_text().splitlines() if line[:1] not in ("", "#"))
    began, last, shown = time.monotonic(), deque[str](maxlen=30), sys.stdout.isatty()
    print(f"installing the packages of {lock.name}: minutes, on a first time", flush=True)
    with subprocess.Popen(
        [*PIP, "--progress-bar", "off", "-r", str(lock)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pip:
        lines = remembered(iter(pip.stdout or ()), last)
        for number, name in enumerate(collected(lines), 1):
            if shown:
                seconds = time.monotonic() - began
                line = f"  {min(number, total)} of at most {total}, {seconds:.0f} s: {name}"
                print(f"\r{line[:78]:78}", end="", flush=True)
    if shown:
        print(f"\r{'':78}\r", end="")
    if pip.returncode:
        print("".join(last), end="", file=sys.stderr)
    else:
        print(f"installed in {time.monotonic() - began:.0f} s")
    return pip.returncode


if __name__ == "__main__":
    try:
        sys.exit(install(Path(sys.argv[1]) if sys.argv[1:] else LOCK))
    except KeyboardInterrupt:
        sys.exit(130)
