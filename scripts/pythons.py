"""Run targets of the Makefile on each Python that MXNet can use, each in `.venv-VERSION`.

Interpreters are looked for on PATH and among pyenv's; what is not found is named and left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scratchbn._command import Parser, guarded, integer

HERE = Path(__file__).resolve().parent.parent
VERSIONS = ("3.9", "3.10", "3.11")
THIS = "{}.{}".format(*sys.version_info)
# What a `make` hands to its children, and these runs must not take for theirs.
OUTER = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS")
TAIL = 40  # lines of the log that are shown of a version that fails
_VERSION = "import sys; print('{}.{}'.format(*sys.version_info))"


def candidates(version: str) -> Iterator[str]:
    """Yield what may be an interpreter of a version."""
    yield f"python{version}"
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(root.glob(f"versions/{version}.*/bin/python"), reverse=True))


def find(version: str) -> str | None:
    """Return an interpreter of a version that starts, or None."""
    for name in candidates(version):
        try:
            told = subprocess.run([name, "-c", _VERSION], capture_output=True, text=True)
        except OSError:
            continue
        if told.returncode == 0 and told.stdout.strip() == version:
            return name
    return None


def run(version: str, targets: list[str]) -> bool:
    """Run the targets on a version, with a log in `build`, and say how it went."""
    python = find(version)
    if python is None:
        print(f"python {version}: not found, left out", flush=True)
        return True
    log = HERE / "build" / f"python-{version}.log"
    log.parent.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in OUTER}
    command = ["make", "--no-print-directory", "-C", str(HERE), *targets]
    command += [f"PYTHON={python}", f"VENV=.venv-{version}"]
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    lines = log.read_text("utf-8", "replace").splitlines()
    told = "passed" if done.returncode == 0 else f"FAILED, all of it in {log}"
    last = f": {lines[-1]}" if lines and done.returncode == 0 else ""
    shown = lines[-TAIL:] if done.returncode else []
    seconds = time.monotonic() - began
    print(f"python {version}: {told} in {seconds:.0f} s{last}", *shown, sep="\n  ", flush=True)
    return done.returncode == 0


def main() -> int:
    """Return the exit status: 0 if the targets were made on each version that was found."""
    parser = Parser(description=__doc__)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--others", action="store_true", help=f"all but this Python, {THIS}")
    parser.add_argument(
        "--jobs", type=integer(1), default=1, help="versions at a time (default: 1)"
    )
    options = parser.parse_args()
    versions = [version for version in VERSIONS if not (options.others and version == THIS)]
    print(f"{' '.join(options.targets)} on Python {', '.join(versions)}: minutes", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        passed = list(pool.map(lambda version: run(version, options.targets), versions))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(guarded("pythons.py", main))
