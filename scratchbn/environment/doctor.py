"""What ``scratchbn doctor`` finds: all that decides whether and where scratchbn runs.

``layout`` makes lines of it. The top of this room: nothing else in it imports the two.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from typing import Any

import numpy as np

from .. import datasets, native
from ..native import cuda
from .device import wheel_verdict
from .driver import Driver, dotted, fusion_problem, query_driver
from .help import several_distributions_help, without_cuda_help
from .prepare import CUDA_LIBRARIES, find_cuda_libraries, mxnet_distributions, version
from .probe import probe_mxnet

OPTIONAL_PACKAGES = (
    "gluoncv", "onnx", "onnxruntime", "matplotlib", "mlxtend", "pooch", "tqdm", "rich",
    "hypothesis",
)  # fmt: skip
_ENVIRONMENT = re.compile(
    r"(MXNET|OMP|GOMP|KMP|OPENBLAS|MKL|DNNL)_\w+|CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH"
)
_NO_BACKEND = {"chosen": "unknown", "problem": None, "inference_graph": "unknown"}


def doctor_facts() -> dict[str, Any]:
    """Collect the facts, such as JSON can hold; ``facts["mxnet"]["error"]`` is None if it works."""
    driver = query_driver()
    mxnet = {"distributions": mxnet_distributions(), **probe_mxnet()}
    device, backend = mxnet.pop("device"), mxnet.pop("backend")
    return {
        "scratchbn": version("scratchbn"),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "numpy": np.__version__,
        "mxnet": mxnet,
        "environment": {k: v for k, v in sorted(os.environ.items()) if _ENVIRONMENT.fullmatch(k)},
        "cuda": _cuda_facts(driver),
        "device": device,
        "packages": {name: version(name) for name in OPTIONAL_PACKAGES},
        "data": _data_facts(),
        "backend": _backend_facts(backend or _NO_BACKEND, mxnet),
        "advice": _advice(mxnet, device, driver),
    }


def _cuda_facts(driver: Driver) -> dict[str, Any]:
    components = dict(CUDA_LIBRARIES)
    return {
        "libraries": {
            library: {"path": str(path), "version": version(f"nvidia-{components[library]}-cu11")}
            for library, path in find_cuda_libraries().items()
        },
        "driver_supports": driver.cuda_version,
        "problem": driver.problem,
        "gpus": [
            {
                "index": gpu.index,
                "name": gpu.name,
                "capability": dotted(gpu.capability),
                "wheel_runs": wheel_verdict(gpu),
            }
            for gpu in driver.gpus
        ],
    }


def _data_facts() -> dict[str, str]:
    try:
        return datasets.available()
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}


def _backend_facts(backend: dict[str, Any], mxnet: dict[str, Any]) -> dict[str, Any]:
    """Add what 'auto' is, and what there is of the kernel, to the backend's choice."""
    kernel, on_gpu = native.facts(), cuda.facts()
    problem = backend["problem"] or kernel["problem"]
    if not mxnet["features"].get("CUDA", False):
        on_gpu["problem"] = "mxnet is built without CUDA"
    on_gpu["problem"] = problem or on_gpu["problem"]
    return {
        "chosen": backend["chosen"],
        "auto": "portable" if problem else "native",
        "auto_means": _auto_means(problem is None, backend["inference_graph"]),
        **kernel,
        "problem": problem,
        "gpu": {"auto": "portable" if on_gpu["problem"] else "native", **on_gpu},
    }


def _auto_means(kernel: bool, inference_graph: str) -> dict[str, str]:
    """Say in a line each what 'auto' runs on a CPU, with a kernel and without."""
    training = "the kernel, with the ReLU behind it" if kernel else "one graph for both modes"
    apart = "a graph of its own: convolutions in place of norms"
    one = {"on": "", "off": "switched off"}.get(inference_graph, inference_graph)
    if kernel:
        apart += ", the kernel where it is faster"
    return {
        "training": f"hybridized: {training}",
        "inference": f"hybridized: the graph of training ({one})"
        if one
        else f"hybridized: {apart}",
        "eager": "the kernel" if kernel else "stock operators, one by one",
    }


def _advice(mxnet: dict[str, Any], device: dict[str, str] | None, driver: Driver) -> list[str]:
    advice = [] if mxnet["help"] is None else [mxnet["help"]]
    if len(mxnet["distributions"]) > 1:
        advice.append(several_distributions_help(mxnet["distributions"]))
    if driver.gpus and device is not None and device["auto"].startswith("cpu"):
        built_with_cuda = mxnet["features"].get("CUDA", False)
        reason = device["because"] if built_with_cuda else without_cuda_help()
        advice.append(f"{len(driver.gpus)} GPU(s) present and none used: {reason}")
    if mxnet["features"].get("CUDA", False):
        advice += filter(None, [fusion_problem(driver)])
    return list(dict.fromkeys(advice))
