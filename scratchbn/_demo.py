"""``scratchbn demo``: the training script of the repository, on a few digits.

A wheel carries the script and its net below ``scratchbn/example``, as they are in the repository.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .environment.install import python_command

EPOCHS = 5
OUT = "scratchbn-demo"
_SCRIPT = Path("scripts", "train_lenet.py")
_NET = Path("models", "lenet.py")


def example() -> Path:
    """Return the folder that holds the script and its net; FileNotFoundError without them."""
    package = Path(__file__).resolve().parent
    for folder in (package / "example", package.parent):
        if (folder / _SCRIPT).is_file():
            return folder
    raise FileNotFoundError(f"{package / 'example'} is missing: install scratchbn again")


def run_demo(data: str, epochs: int, out: str, device: str) -> int:
    """Run the script in this process, and say what to do next; return its exit status."""
    folder = example()
    script = folder / _SCRIPT
    options = ["--data", data, "--epochs", str(epochs), "--out", out, "--device", device]
    status = _run(script, options)
    if status == 0:
        print(_next_steps(folder, data, out))
    return status


def _run(script: Path, options: Sequence[str]) -> int:
    """Run a script as Python would by name; return its exit status."""
    before, sys.argv = sys.argv, [str(script), *options]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


def _next_steps(folder: Path, data: str, out: str) -> str:
    again = [] if data == "mnist" else ["--data", "mnist", "--epochs", "1", "--out", f"{out}-mnist"]
    more = python_command("-m", "scratchbn", "demo", *again)
    lines = [
        "next:",
        f"  look at   {Path(out, 'curves.png')}",
        f"  read      {folder / _NET}",
        f"            {folder / _SCRIPT}",
        f"  all of MNIST, 11 MB to download:\n            {more}" if again else "",
        f"  more options:\n            {python_command(str(folder / _SCRIPT), '--help')}",
        "  in a net of yours: from scratchbn import ScratchBatchNorm, in place of nn.BatchNorm,",
        "            or net = scratchbn.to_scratch(net)",
    ]
    return "\n".join(filter(None, lines))
