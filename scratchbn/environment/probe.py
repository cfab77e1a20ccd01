"""What mxnet says of itself, asked in a process of its own: a broken build may kill its process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .device import choose_device
from .driver import query_driver
from .help import import_error_help
from .prepare import prepare

FEATURES = (
    "CUDA", "CUDNN", "NCCL", "CUDA_RTC", "MKLDNN", "OPENMP", "BLAS_OPEN", "BLAS_MKL", "BLAS_ATLAS",
    "BLAS_APPLE", "LAPACK", "OPENCV", "DIST_KVSTORE", "INT64_TENSOR_SIZE",
)  # fmt: skip
_NOTHING = dict.fromkeys(("version", "path", "device", "backend", "error", "help"))
_SECONDS = 300  # a first import on a crowded machine took more than 120


def probe_mxnet() -> dict[str, Any]:
    """Run :func:`mxnet_facts` in a child process with this process's import path."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        f"from {__name__} import mxnet_facts; print(json.dumps(mxnet_facts()))"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path)]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return _broken(f"import mxnet did not finish within {_SECONDS} s")
    if child.returncode == 0:
        facts: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return facts
    said = child.stderr.strip().splitlines()
    last = f"; it last said: {said[-1]}" if said else ""
    return _broken(f"a process importing mxnet {_ending(child.returncode)}{last}")


def mxnet_facts() -> dict[str, Any]:
    """Import mxnet in this process and describe it, or say in `error` and `help` why not."""
    try:
        prepare()
        import mxnet as mx

        built = {feature.name: bool(feature.enabled) for feature in mx.runtime.feature_list()}
    except Exception as exc:
        return _broken(f"{type(exc).__name__}: {exc}", import_error_help(exc))
    device, reason = choose_device(query_driver())
    return {
        **_NOTHING,
        "version": mx.__version__,
        "path": str(Path(mx.__file__).parent),
        "features": {name: built[name] for name in FEATURES if name in built},
        "device": {"auto": str(device), "because": reason},
        "backend": _backend(),
    }


def _backend() -> dict[str, str | None]:
    """Return the backend that is chosen; only here, because its room may import mxnet."""
    from ..backends import get_backend, inference_graph

    found: dict[str, str | None] = {"chosen": "unknown", "problem": None, "inference_graph": "on"}
    try:
        found["chosen"] = get_backend()
    except ValueError as error:
        found["problem"] = str(error)
    try:
        if not inference_graph():
            found["inference_graph"] = "off"
    except ValueError as error:
        found["inference_graph"] = str(error)
    return found


def _broken(error: str, advice: str | None = None) -> dict[str, Any]:
    return {**_NOTHING, "features": {}, "error": error, "help": advice}


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    if returncode == -signal.SIGILL:
        return "died of SIGILL: this CPU lacks instructions the wheel was built for"
    return f"died of signal {-returncode}"
