"""Where it was measured: CPU, caches, memory, versions."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import scratchbn

import cpuinfo
import mxnet as mx
import psutil

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHES = {2: 2**20, 3: 2**25}  # bytes, where the system does not say


def describe() -> dict[str, Any]:
    """Return what the report says about the machine."""
    caches = {f"L{level}": f"{nbytes / 2**20:g} MiB" for level, nbytes in cache_sizes().items()}
    return {
        "CPU": cpuinfo.get_cpu_info().get("brand_raw") or platform.machine(),
        "cores": os.cpu_count(),
        **caches,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load average before": load_average(),
    }


def load_average() -> float:
    """Return how many processes ran or waited in the last minute."""
    return round(psutil.getloadavg()[0], 2)


def versions() -> dict[str, str]:
    """Return the versions of what takes part."""
    found = {
        "scratchbn": scratchbn.__version__,
        "mxnet": mx.__version__,
        "numpy": metadata.version("numpy"),
        "Python": platform.python_version(),
        platform.system(): platform.release(),
    }
    if importlib.util.find_spec("gluoncv"):
        found["gluoncv"] = metadata.version("gluoncv")
    return found


def available_memory() -> int:
    """Return how many bytes can still be had."""
    return psutil.virtual_memory().available


def cache_sizes(directory: Path = _CACHES) -> dict[int, int]:
    """Return the bytes of the level 2 and level 3 caches of the first CPU.

    A level that Linux does not describe in `directory` gets a usual size.
    """
    # By hand: py-cpuinfo adds the level 2 caches of all cores, and takes one of them for level 3.
    sizes = dict(_USUAL_CACHES)
    for cache in sorted(directory.glob("index*")):
        try:
            level = int((cache / "level").read_text())
            text = (cache / "size").read_text().strip()
            nbytes = int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        except (OSError, ValueError):
            continue
        if level in sizes:
            sizes[level] = nbytes
    return sizes
