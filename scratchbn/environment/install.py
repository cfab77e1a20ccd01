"""Commands that messages name: those that work with the Python that runs, here."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of a clone, where the package is used from one


def python_command(*arguments: str) -> str:
    """Return a command line that starts the Python that runs.

    >>> python_command("-m", "pip", "install", "numpy<2").split(maxsplit=1)[1]
    "-m pip install 'numpy<2'"
    """
    return shlex.join([_python(), *arguments])


def install_command(*extras: str) -> str:
    """Return the command that installs extras of this package, from its clone if it is in one."""
    where, chosen = "scratchbn", f"[{','.join(extras)}]"
    if not is_clone():
        return python_command("-m", "pip", "install", where + chosen)
    return python_command("-m", "pip", "install", "-e", (_below_here(ROOT) or str(ROOT)) + chosen)


def uninstall_command(distributions: Sequence[str]) -> str:
    """Return the command that removes distributions."""
    return python_command("-m", "pip", "uninstall", "-y", *distributions)


def is_clone() -> bool:
    """Tell whether the package is used from a clone of its repository."""
    return (ROOT / "pyproject.toml").is_file()


def _python() -> str:
    """Return what to type for this Python: its name if that is found first, else its path."""
    if not sys.executable:
        return "python"
    for name in ("python", "python3"):
        # Not what links lead to: a virtual environment's Python is a link to another one.
        if shutil.which(name) == sys.executable:
            return name
    below = _below_here(Path(sys.executable))
    return sys.executable if below is None else os.path.join(*[] if os.sep in below else ".", below)


def _below_here(path: Path) -> str | None:
    """Return a path from the working directory, if it is below it."""
    try:
        here = os.getcwd()
    except OSError:  # it has been deleted
        return None
    return os.path.relpath(path, here) if path.is_relative_to(here) else None
