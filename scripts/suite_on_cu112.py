"""Run the test suite on the mxnet-cu112 wheel, in a virtual environment of its own.

The wheel cannot be imported without the NVIDIA driver's libcuda.so.1; where there is none, a stub
stands in for it and the suite runs in CPU contexts. Arguments are handed to pytest.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scratchbn._command import Parser
from scratchbn._writing import staged, write_text

REPOSITORY = Path(__file__).resolve().parent.parent
VENV = REPOSITORY / ".venv-cu112"
PYTHON = str(VENV / "bin" / "python")
DRIVER_LIBRARY = "libcuda.so.1"
STUB_SOURCE = Path(__file__).with_name("libcuda_stub.c")
CUDA_CHECK = (
    "import sys, scratchbn, mxnet; sys.exit(not mxnet.runtime.Features().is_enabled('CUDA'))"
)


def pins_without_mxnet(lock: str) -> str:
    """Drop the CPU build of mxnet from the text of a lock file."""
    lines = lock.splitlines(keepends=True)
    others = [line for line in lines if not line.startswith("mxnet==")]
    if len(others) == len(lines):
        raise ValueError("requirements.lock must pin the CPU build in a line 'mxnet==...'")
    return "".join(others)


def make_venv() -> None:
    """Install the locked packages, with mxnet-cu112 for mxnet; nothing if that is done already."""
    pins = pins_without_mxnet((REPOSITORY / "requirements.lock").read_text())
    project = (REPOSITORY / "pyproject.toml").read_text()
    wanted = hashlib.sha256((pins + project).encode()).hexdigest()
    ready = VENV / ".ready"
    if ready.exists() and ready.read_text() == wanted:
        return
    print(f"installing mxnet-cu112 and the CUDA libraries, several GB, into {VENV}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    requirements = VENV / "requirements.txt"
    requirements.write_text(pins)
    install = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    packages = ["-r", str(requirements), "-e", f"{REPOSITORY}[cu112]"]
    subprocess.run([*install, *packages], check=True)
    write_text(ready, wanted)


def has_driver() -> bool:
    """Whether the driver's library can be loaded, with or without a card behind it."""
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def compile_stub(compiler: str) -> Path:
    """Compile the stand-in for the driver's library; return its folder, for LD_LIBRARY_PATH."""
    folder = VENV / "stub"
    folder.mkdir(exist_ok=True)
    options = ["-shared", "-fPIC", f"-Wl,-soname,{DRIVER_LIBRARY}"]
    with staged(folder / DRIVER_LIBRARY) as library:
        subprocess.run([compiler, *options, STUB_SOURCE, "-o", library], check=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, compile the stub if need be, and return pytest's exit status, or 1 without it."""
    parser = Parser(description=__doc__, usage="%(prog)s [-h] [pytest's arguments ...]")
    _, pytest_arguments = parser.parse_known_args(arguments)
    real_driver = has_driver()
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not real_driver and compiler is None:
        print(
            f"no NVIDIA driver ({DRIVER_LIBRARY}) and no C compiler (cc, gcc) to build a stub of "
            "it with; on Debian: apt-get install gcc libc6-dev",
            file=sys.stderr,
        )
        return 1
    environment = dict(os.environ)
    try:
        make_venv()
        if not real_driver and compiler is not None:
            stub = compile_stub(compiler)
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(
                filter(None, [str(stub), os.environ.get("LD_LIBRARY_PATH")])
            )
    except subprocess.CalledProcessError as exc:
        print(f"failed with status {exc.returncode}: {exc.cmd[0]}", file=sys.stderr)
        return 1
    check = [PYTHON, "-c", CUDA_CHECK]
    if subprocess.run(check, cwd=REPOSITORY, env=environment).returncode:
        print(f"{VENV} has no mxnet with CUDA: delete it and run this again", file=sys.stderr)
        return 1
    driver = "the driver of this machine" if real_driver else "a stub driver"
    print(f"testing mxnet-cu112 with {driver}", flush=True)
    suite = [PYTHON, "-m", "pytest", "-n", "2", *pytest_arguments]
    return subprocess.run(suite, cwd=REPOSITORY, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
