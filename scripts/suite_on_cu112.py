"""Run the test suite, or a script, on the mxnet-cu112 wheel, in a virtual environment of its own.

The wheel cannot be imported without the NVIDIA driver's libcuda.so.1; where there is none, a stub
stands in for it and the suite runs in CPU contexts. Arguments are handed to pytest, or to the
script that ``--run`` names.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scratchbn._command import Parser, fail
from scratchbn._writing import staged

import locked_venv

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
    packages = ["-e", f"{REPOSITORY}[cu112]"]
    note = "mxnet-cu112 and the CUDA libraries, several GB,"
    locked_venv.make_venv(VENV, pins, *packages, key=project, note=note)


def wants_gpu(arguments: Sequence[str]) -> bool:
    """Tell whether ``--device`` names a GPU."""
    values = [
        value if flag == "--device" else flag.partition("=")[2]
        for flag, value in zip(arguments, [*arguments[1:], ""])
        if flag == "--device" or flag.startswith("--device=")
    ]
    return any(value.startswith("gpu") for value in values)


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
    """Install, compile the stub if need be, and return the status of what ran, or 1."""
    parser = Parser(
        prog="suite_on_cu112",
        description=__doc__,
        usage="%(prog)s [-h] [--run SCRIPT] [arguments of pytest or of the script ...]",
    )
    parser.add_argument("--run", metavar="SCRIPT", help="run this in place of the tests")
    options, passed_on = parser.parse_known_args(arguments)
    real_driver = has_driver()
    if wants_gpu(passed_on) and not real_driver:
        return fail(
            parser.prog,
            1,
            f"a GPU is asked for ({' '.join(passed_on)}) and there is no NVIDIA driver here "
            f"({DRIVER_LIBRARY} cannot be loaded); nothing was installed",
        )
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not real_driver and compiler is None:
        return fail(
            parser.prog,
            1,
            f"no NVIDIA driver ({DRIVER_LIBRARY}) and no C compiler (cc, gcc) to build a stub of "
            "it with; on Debian: apt-get install gcc libc6-dev",
        )
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
    what = options.run or "the tests"
    print(f"running {what} on mxnet-cu112 with {driver}", flush=True)
    program = [options.run] if options.run else ["-m", "pytest", "-n", "2"]
    command = [PYTHON, *program, *passed_on]
    return subprocess.run(command, cwd=REPOSITORY, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
