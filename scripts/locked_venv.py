"""A virtual environment with other packages than the one that this runs in."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from scratchbn._writing import write_text


def make_venv(venv: Path, pins: str, *options: str, note: str, key: str = "") -> None:
    """Install the packages of a requirements file's text; nothing if that is done already.

    `options` are more of pip's; `key` is what else the environment is made from, so that it is made
    again if that changes; `note` says what is installed.
    """
    wanted = hashlib.sha256((pins + key).encode()).hexdigest()
    ready = venv / ".ready"
    if ready.exists() and ready.read_text() == wanted:
        return
    print(f"installing {note} into {venv}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    requirements = venv / "requirements.txt"
    requirements.write_text(pins)
    install = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*install, "-r", str(requirements), *options], check=True)
    write_text(ready, wanted)
