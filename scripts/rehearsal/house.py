"""The rehearsal's virtual environment: mxnet-cu112, NVRTC, and no other CUDA library."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import locked_venv

from .standins import build

REPOSITORY = Path(__file__).resolve().parents[2]
VENV = REPOSITORY / ".venv-rehearse"
PYTHON = VENV / "bin" / "python"
BUILD = REPOSITORY / "build" / "rehearsal"
# Of the extra cu112, what is real here; the stand-ins take the place of the rest.
WANTED = ("mxnet-cu112", "nvidia-cuda-nvrtc-cu11")
# What checks the code, and what the tests that are rehearsed do without.
UNUSED = ("mxnet", "mypy", "ruff", "onnx", "onnxruntime", "kiwisolver", "uv")


def requirements(lock: str, project: str) -> str:
    """Return what to install: the locked packages, with mxnet-cu112 and NVRTC for mxnet.

    Raises ValueError if ``pyproject.toml`` does not pin the two in its extra cu112.
    """
    kept = [line for line in lock.splitlines() if line.partition("==")[0] not in (*UNUSED, *WANTED)]
    pins = [re.search(rf'"({re.escape(name)}==[^"]+)"', project) for name in WANTED]
    if None in pins:
        raise ValueError(f"pyproject.toml must pin {' and '.join(WANTED)} in its extra cu112")
    return "\n".join([*kept, *(pin[1] for pin in pins if pin)]) + "\n"


def make_venv() -> None:
    """Install the packages; nothing if that is done already."""
    lock = (REPOSITORY / "requirements.lock").read_text("utf-8")
    wanted = requirements(lock, (REPOSITORY / "pyproject.toml").read_text("utf-8"))
    note = "mxnet-cu112 (500 MB) and NVRTC"
    locked_venv.make_venv(VENV, wanted, "--no-deps", "--quiet", note=note)


def site_packages() -> Path:
    """Return where the environment's packages are."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True)
    return Path(run.stdout.strip())


def stage(compiler: str) -> dict[str, str]:
    """Make the environment and the stand-ins; return the variables in which a child finds them."""
    make_venv()
    packages = site_packages()
    standins = build(compiler, packages / "mxnet" / "libmxnet.so", BUILD / "standins")
    nvrtc = packages / "nvidia" / "cuda_nvrtc" / "lib"
    paths = [str(standins), str(nvrtc), os.environ.get("LD_LIBRARY_PATH", "")]
    imports = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("SCRATCHBN_REHEARSAL")},
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)),
        "PYTHONPATH": os.pathsep.join(imports),
        "SCRATCHBN_REHEARSAL_DEVICES": "2",  # for nets on several
        "SCRATCHBN_CACHE": str(BUILD / "cache"),
        "SCRATCHBN_TEST_PATIENCE": "10",  # NVRTC takes its time in every child process
        "OMP_NUM_THREADS": "1",
        # What no kernel wrote is 0, as the stand-ins hand it out, and not what was there before.
        "MXNET_GPU_MEM_POOL_TYPE": "Unpooled",
        "MXNET_CUDNN_LIB_CHECKING": "0",
        "CI": "1",  # hypothesis draws the same examples in every run
    }
