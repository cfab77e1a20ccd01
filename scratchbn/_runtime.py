"""What has to be right before, and around, ``import mxnet``.

:func:`prepare` runs before mxnet is imported, so this module never imports mxnet at its top.
:func:`resolve_device` chooses where to compute, and :func:`doctor_facts` says what was found.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SUPPORTED_NUMPY = "numpy>=1.21,<2"

# Every name mxnet 1.9.1 takes from numpy that numpy 1.24 removed: `bool` throughout mxnet.numpy,
# `int` in mxnet.test_utils.
NUMPY_ALIASES = ("bool", "int")

MXNET_DISTRIBUTIONS = (
    "mxnet",
    "mxnet-native",
    *(f"mxnet-cu{cuda}" for cuda in (92, 100, 101, 102, 110, 111, 112, 113, 114, 115, 116, 117)),
)
CUDA_DISTRIBUTION = "mxnet-cu112"

# (library, component), each after those it needs: the component comes from the distribution
# nvidia-<component>-cu11 and lies below site-packages/nvidia.
CUDA_LIBRARIES = (
    ("libcudart.so.11.0", "cuda-runtime"),
    ("libcublasLt.so.11", "cublas"),
    ("libcublas.so.11", "cublas"),
    ("libcufft.so.10", "cufft"),
    ("libcurand.so.10", "curand"),
    ("libcusparse.so.11", "cusparse"),
    ("libcusolver.so.11", "cusolver"),
    ("libnvrtc.so.11.2", "cuda-nvrtc"),
    ("libnvToolsExt.so.1", "nvtx"),
    ("libnccl.so.2", "nccl"),
    ("libcudnn.so.8", "cudnn"),
)
DRIVER_LIBRARY = "libcuda.so.1"

# The machine code in mxnet-cu112 1.9.1's libmxnet.so. There is no PTX beside it that a driver
# could compile for a newer card.
WHEEL_CAPABILITIES = ((5, 0), (6, 0), (7, 0), (8, 0), (8, 6))

DEBIAN_PACKAGES = {"libgomp.so.1": "libgomp1", "libquadmath.so.0": "libquadmath0"}

OPTIONAL_PACKAGES = (
    "gluoncv",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "mlxtend",
    "pooch",
    "tqdm",
    "rich",
    "hypothesis",
)
FEATURES = (
    "CUDA",
    "CUDNN",
    "NCCL",
    "CUDA_RTC",
    "MKLDNN",
    "OPENMP",
    "BLAS_OPEN",
    "BLAS_MKL",
    "BLAS_ATLAS",
    "BLAS_APPLE",
    "LAPACK",
    "OPENCV",
    "DIST_KVSTORE",
    "INT64_TENSOR_SIZE",
)
_ENVIRONMENT = re.compile(
    r"(MXNET|OMP|GOMP|KMP|OPENBLAS|MKL|DNNL)_\w+|CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH"
)
_MISSING_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
_PROBE_SECONDS = 120


class DeviceError(RuntimeError):
    """A GPU was asked for and cannot be used; the message says what was found."""


@dataclass(frozen=True)
class GPU:
    """One card as the CUDA driver describes it.

    Attributes
    ----------
    index : int
        Position in the driver's list, the ``1`` of ``gpu:1``.
    name : str
        Product name.
    capability : tuple of int
        Compute capability, (major, minor).
    """

    index: int
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, compute capability {_dotted(self.capability)})"


@dataclass(frozen=True)
class Driver:
    """The answer of the NVIDIA driver.

    Attributes
    ----------
    cuda_version : str or None
        Newest CUDA version the driver supports, such as ``'12.2'``.
    gpus : tuple of GPU
        The cards it offers to this process, possibly none.
    problem : str or None
        Why there are no cards, or None.
    """

    cuda_version: str | None
    gpus: tuple[GPU, ...]
    problem: str | None


def prepare() -> None:
    """Make ``import mxnet`` work where it otherwise would not; call it before that import.

    Supplies the numpy aliases that mxnet 1.9.1 uses and numpy 1.24 removed, and, where a CUDA 11
    build of mxnet is installed, loads the CUDA libraries that the ``nvidia-*-cu11`` packages
    brought, so that no ``LD_LIBRARY_PATH`` is needed. Calling it again is harmless. Missing
    libraries are left to ``import mxnet``, whose error :func:`import_error_help` explains. Two
    mxnet distributions installed at once are left to :func:`doctor_facts`, since the one installed
    last does work.

    Raises
    ------
    ImportError
        With numpy 2 or newer, with which mxnet 1.9.1 cannot be imported at all.
    """
    _supply_numpy_aliases()
    _preload_cuda()


def import_error_help(exc: BaseException) -> str | None:
    """Explain a failed ``import mxnet``.

    Parameters
    ----------
    exc : BaseException
        What the import raised.

    Returns
    -------
    str or None
        What is missing and what to do about it; None when the failure is not a known one.
    """
    if isinstance(exc, ModuleNotFoundError) and exc.name == "mxnet":
        return (
            "mxnet is not installed: pip install 'scratchbn[cpu]', or 'scratchbn[cu112]' "
            "for an NVIDIA GPU"
        )
    if isinstance(exc, ModuleNotFoundError) and exc.name == "distutils":
        return (
            f"mxnet 1.9.1 needs distutils, which Python {platform.python_version()} no longer "
            "has: use Python 3.9, 3.10 or 3.11"
        )
    missing = _MISSING_LIBRARY.search(str(exc)) if isinstance(exc, OSError) else None
    if missing is not None:
        return _missing_library_help(missing[1])
    installed = mxnet_distributions()
    if len(installed) > 1:
        return _several_distributions_help(installed)
    return None


def resolve_device(spec: str = "auto") -> Any:
    """Return the device to compute on.

    Parameters
    ----------
    spec : str
        ``'auto'`` is the first GPU that has just run a kernel, else the CPU, with a warning when
        there are GPUs and none of them is usable. ``'cpu'``, ``'cpu:1'``, ``'gpu'`` and ``'gpu:1'``
        name one device.

    Returns
    -------
    mxnet.Context
        The device.

    Raises
    ------
    TypeError
        If `spec` is not a string.
    ValueError
        If `spec` is none of the forms above.
    DeviceError
        If a GPU is named and cannot be used: mxnet without CUDA, no driver, no such index, a
        compute capability the mxnet wheel has no code for, or a kernel that failed.
    """
    kind, index = _parse_spec(spec)
    import mxnet as mx

    if kind == "cpu":
        return mx.cpu(index)
    if kind == "gpu":
        problem = _gpu_problem(index, query_driver())
        if problem is not None:
            raise DeviceError(f"device {spec!r} cannot be used: {problem}")
        return mx.gpu(index)
    driver = query_driver()
    device, reason = _choose_device(driver)
    if device.device_type == "cpu" and driver.gpus and _built_with_cuda():
        warnings.warn(f"device 'auto' is the CPU: {reason}", RuntimeWarning, stacklevel=2)
    return device


def query_driver() -> Driver:
    """Ask the CUDA driver, without mxnet, which GPUs there are.

    Returns
    -------
    Driver
        The cards, or the reason why there are none. Never raises for want of a GPU.
    """
    try:
        cuda = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as exc:
        return Driver(None, (), f"no NVIDIA driver ({exc})")
    version: str | None = None
    try:
        number = _driver_int(cuda, "cuDriverGetVersion")
        version = f"{number // 1000}.{number % 1000 // 10}"
        _driver_call(cuda, "cuInit", 0)
        count = _driver_int(cuda, "cuDeviceGetCount")
        gpus = tuple(_describe_gpu(cuda, index) for index in range(count))
    except (OSError, AttributeError) as exc:
        return Driver(version, (), f"the NVIDIA driver offers no GPU: {exc}{_visible_devices()}")
    if not gpus:
        return Driver(version, (), f"the NVIDIA driver lists no GPU{_visible_devices()}")
    return Driver(version, gpus, None)


def wheel_runs(capability: tuple[int, int]) -> bool:
    """Whether the mxnet-cu112 wheel has machine code for a card.

    Machine code runs on cards of the same major compute capability and the same or a higher minor
    one (CUDA C++ Programming Guide, "Binary Compatibility").

    Parameters
    ----------
    capability : tuple of int
        Compute capability of the card, (major, minor).

    Returns
    -------
    bool
        True if some code in the wheel fits.

    Examples
    --------
    >>> wheel_runs((7, 5)), wheel_runs((8, 9)), wheel_runs((9, 0))
    (True, True, False)
    """
    return any(
        capability[0] == major and capability[1] >= minor for major, minor in WHEEL_CAPABILITIES
    )


def mxnet_distributions() -> dict[str, str]:
    """Return the installed distributions that provide the module ``mxnet``.

    Returns
    -------
    dict of str to str
        Distribution name to version. More than one entry means that they overwrote each other.
    """
    versions = {name: _version(name) for name in MXNET_DISTRIBUTIONS}
    return {name: version for name, version in versions.items() if version is not None}


def find_cuda_libraries() -> dict[str, Path]:
    """Find the CUDA 11 libraries that ``nvidia-*-cu11`` packages installed.

    Returns
    -------
    dict of str to pathlib.Path
        Library name, in the order in which to load them, to file.
    """
    roots = [Path(entry, "nvidia") for entry in sys.path if entry]
    roots = [root for root in roots if root.is_dir()]
    found: dict[str, Path] = {}
    for library, component in CUDA_LIBRARIES:
        files = (root / component.replace("-", "_") / "lib" / library for root in roots)
        path = next((file for file in files if file.is_file()), None)
        if path is not None:
            found[library] = path
    return found


def doctor_facts() -> dict[str, Any]:
    """Collect what decides whether and where scratchbn runs.

    mxnet is imported in a child process, so that a build that kills its process (an illegal
    instruction, an abort while a GPU starts) is reported like any other.

    Returns
    -------
    dict
        JSON-serialisable. ``facts['mxnet']['error']`` is None exactly when mxnet can be imported;
        ``facts['advice']`` lists, in sentences, what is wrong and what to do.
    """
    driver = query_driver()
    mxnet = {"distributions": mxnet_distributions(), **_probe_mxnet()}
    device = mxnet.pop("device")
    facts: dict[str, Any] = {
        "scratchbn": _version("scratchbn"),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "numpy": np.__version__,
        "mxnet": mxnet,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if _ENVIRONMENT.fullmatch(name)
        },
        "cuda": {
            "libraries": _cuda_library_facts(),
            "driver_supports": driver.cuda_version,
            "problem": driver.problem,
            "gpus": [
                {
                    "index": gpu.index,
                    "name": gpu.name,
                    "capability": _dotted(gpu.capability),
                    "wheel_runs": _wheel_verdict(gpu),
                }
                for gpu in driver.gpus
            ],
        },
        "device": device,
        "packages": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "data": _data_facts(),
        "backend": _backend_facts(),
    }
    facts["advice"] = _advice(facts, driver)
    return facts


def mxnet_facts() -> dict[str, Any]:
    """Import mxnet in this process and describe it.

    Returns
    -------
    dict
        ``version``, ``path``, ``features`` (name to bool), ``device`` (what ``'auto'`` chooses and
        why), ``error`` and ``help``. If mxnet cannot be imported, `error` is the text of the
        failure and the first four are empty.
    """
    try:
        prepare()
        import mxnet as mx

        built = {feature.name: bool(feature.enabled) for feature in mx.runtime.feature_list()}
    except Exception as exc:
        return _broken_mxnet(f"{type(exc).__name__}: {exc}", import_error_help(exc))
    device, reason = _choose_device(query_driver())
    return {
        "version": mx.__version__,
        "path": str(Path(mx.__file__).parent),
        "features": {name: built[name] for name in FEATURES if name in built},
        "device": {"auto": str(device), "because": reason},
        "error": None,
        "help": None,
    }


def _supply_numpy_aliases() -> None:
    major, minor = (int(part) for part in re.findall(r"\d+", np.__version__)[:2])
    if major >= 2:
        raise ImportError(
            f"mxnet 1.9.1 cannot be imported with numpy {np.__version__}, which removed names it "
            f"uses: pip install '{SUPPORTED_NUMPY}' (scratchbn is developed with numpy 1.23.5)"
        )
    if (major, minor) < (1, 24):
        return
    for name in NUMPY_ALIASES:
        # vars(), because asking numpy itself for a removed name warns.
        if name not in vars(np):
            setattr(np, name, getattr(builtins, name))


def _preload_cuda() -> None:
    if "mxnet" in sys.modules or not _cuda11_distributions():
        return
    for path in find_cuda_libraries().values():
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError:
            continue


def _cuda11_distributions() -> list[str]:
    return [name for name in mxnet_distributions() if name.startswith("mxnet-cu11")]


def _missing_library_help(library: str) -> str | None:
    if library == DRIVER_LIBRARY:
        return (
            f"this mxnet is built for CUDA and needs the NVIDIA driver ({library}), which is not "
            "here. With an NVIDIA card: install its driver, 450.80.02 or newer (in a container: "
            "start it with GPU access, such as docker's --gpus all). Without one: pip uninstall "
            f"-y {' '.join(_cuda11_distributions()) or CUDA_DISTRIBUTION}, then pip install "
            "'scratchbn[cpu]'"
        )
    component = dict(CUDA_LIBRARIES).get(library)
    if component is not None:
        return _missing_cuda_library_help(library, component)
    package = DEBIAN_PACKAGES.get(library)
    if package is None:
        return None
    return f"mxnet needs {library}: apt-get install {package} (Debian and Ubuntu)"


def _missing_cuda_library_help(library: str, component: str) -> str:
    path = find_cuda_libraries().get(library)
    if path is None:
        return (
            f"this mxnet is built for CUDA and needs {library}: pip install "
            f"'nvidia-{component}-cu11{'<9' if component == 'cudnn' else ''}', or "
            "'scratchbn[cu112]' for all of them"
        )
    try:
        ctypes.CDLL(str(path))
    except OSError as exc:
        return f"this mxnet needs {library}; it is installed and cannot be loaded: {exc}"
    return (
        f"this mxnet needs {library}; it is installed as {path}: import scratchbn before mxnet, "
        "so that it is found"
    )


def _several_distributions_help(installed: dict[str, str]) -> str:
    return (
        f"the distributions {' and '.join(installed)} are both installed, share the module name "
        f"mxnet and overwrite each other's files: pip uninstall -y {' '.join(installed)}, then "
        "install one of them again"
    )


def _parse_spec(spec: str) -> tuple[str, int]:
    if not isinstance(spec, str):
        raise TypeError(f"device must be a string such as 'auto' or 'gpu:1', got {spec!r}")
    match = re.fullmatch(r"auto|(cpu|gpu)(?::([0-9]{1,3}))?", spec)
    if match is None:
        raise ValueError(f"device must be 'auto', 'cpu', 'cpu:N', 'gpu' or 'gpu:N', got {spec!r}")
    return match[1] or "auto", int(match[2] or 0)


def _choose_device(driver: Driver) -> tuple[Any, str]:
    import mxnet as mx

    if not _built_with_cuda():
        return mx.cpu(0), "mxnet is built without CUDA"
    problems = []
    for gpu in driver.gpus:
        problem = _gpu_problem(gpu.index, driver)
        if problem is None:
            return mx.gpu(gpu.index), f"{gpu} ran a kernel"
        problems.append(problem)
    return mx.cpu(0), "; ".join(problems) or str(driver.problem)


def _gpu_problem(index: int, driver: Driver) -> str | None:
    """Why nothing can run on GPU `index`; None after a kernel did."""
    if not _built_with_cuda():
        return _without_cuda_help()
    if driver.problem is not None:
        return driver.problem
    if index >= len(driver.gpus):
        listed = ", ".join(map(str, driver.gpus))
        return f"index {index} is out of range, the driver lists: {listed}{_visible_devices()}"
    gpu = driver.gpus[index]
    if _wheel_verdict(gpu) is False:
        carried = ", ".join(map(_dotted, WHEEL_CAPABILITIES))
        return (
            f"{CUDA_DISTRIBUTION} has no code for {gpu}: it carries {carried}, each of which "
            "runs on the same major version from that minor version on, and no PTX"
        )
    failure = _kernel_failure(index)
    return None if failure is None else f"a first kernel on {gpu} failed: {failure}"


def _kernel_failure(index: int) -> str | None:
    import mxnet as mx

    try:
        seen = mx.context.num_gpus()
        if index >= seen:
            return f"the CUDA runtime sees {seen} GPUs (driver too old for CUDA 11?)"
        values = (mx.nd.ones((2,), ctx=mx.gpu(index)) + 1).asnumpy()
    except mx.MXNetError as exc:
        return str(exc).strip().splitlines()[-1]
    return None if (values == 2).all() else f"1 + 1 gave {values.tolist()}"


def _wheel_verdict(gpu: GPU) -> bool | None:
    """Whether the wheel has code for the card; None for builds whose contents are not known."""
    if CUDA_DISTRIBUTION not in mxnet_distributions():
        return None
    return wheel_runs(gpu.capability)


def _built_with_cuda() -> bool:
    import mxnet as mx

    return bool(mx.runtime.Features().is_enabled("CUDA"))


def _driver_call(cuda: Any, name: str, *arguments: Any) -> None:
    status = getattr(cuda, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        meaning = text.value.decode() if text.value else "unknown error"
        raise OSError(f"{name} returned {status} ({meaning})")


def _driver_int(cuda: Any, name: str, *arguments: Any) -> int:
    value = ctypes.c_int()
    _driver_call(cuda, name, ctypes.byref(value), *arguments)
    return value.value


def _describe_gpu(cuda: Any, index: int) -> GPU:
    attribute_major, attribute_minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
    handle = _driver_int(cuda, "cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    _driver_call(cuda, "cuDeviceGetName", name, len(name), handle)
    major = _driver_int(cuda, "cuDeviceGetAttribute", attribute_major, handle)
    minor = _driver_int(cuda, "cuDeviceGetAttribute", attribute_minor, handle)
    return GPU(index, name.value.decode(errors="replace"), (major, minor))


def _visible_devices() -> str:
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f" (CUDA_VISIBLE_DEVICES is {value!r})"


def _probe_mxnet() -> dict[str, Any]:
    """Run :func:`mxnet_facts` in a child process with this process's import path."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from scratchbn import _runtime; print(json.dumps(_runtime.mxnet_facts()))"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path)]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return _broken_mxnet(f"import mxnet did not finish within {_PROBE_SECONDS} s", None)
    if child.returncode == 0:
        facts: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return facts
    said = child.stderr.strip().splitlines()
    last = f"; it last said: {said[-1]}" if said else ""
    return _broken_mxnet(f"a process importing mxnet {_ending(child.returncode)}{last}", None)


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    if returncode == -signal.SIGILL:
        return "died of SIGILL: this CPU lacks instructions the wheel was built for"
    return f"died of signal {-returncode}"


def _broken_mxnet(error: str, advice: str | None) -> dict[str, Any]:
    return {
        "version": None,
        "path": None,
        "features": {},
        "device": None,
        "error": error,
        "help": advice,
    }


def _cuda_library_facts() -> dict[str, dict[str, str | None]]:
    components = dict(CUDA_LIBRARIES)
    return {
        library: {"path": str(path), "version": _version(f"nvidia-{components[library]}-cu11")}
        for library, path in find_cuda_libraries().items()
    }


def _backend_facts() -> dict[str, Any]:
    """Say what is chosen, what 'auto' would be on a CPU, and what there is of the kernel."""
    facts: dict[str, Any] = importlib.import_module("scratchbn.native").facts()
    try:
        chosen = importlib.import_module("scratchbn.backends").get_backend()
    except ValueError as error:
        chosen, facts["problem"] = "unknown", str(error)
    return {"chosen": chosen, "auto": "portable" if facts["problem"] else "native", **facts}


def _data_facts() -> dict[str, str]:
    try:
        found: dict[str, str] = importlib.import_module("scratchbn.datasets").available()
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return found


def _advice(facts: dict[str, Any], driver: Driver) -> list[str]:
    mxnet = facts["mxnet"]
    advice = [] if mxnet["help"] is None else [mxnet["help"]]
    if len(mxnet["distributions"]) > 1:
        advice.append(_several_distributions_help(mxnet["distributions"]))
    device = facts["device"]
    if driver.gpus and device is not None and device["auto"].startswith("cpu"):
        built_with_cuda = mxnet["features"].get("CUDA", False)
        reason = device["because"] if built_with_cuda else _without_cuda_help()
        advice.append(f"{len(driver.gpus)} GPU(s) present and none used: {reason}")
    return list(dict.fromkeys(advice))


def _without_cuda_help() -> str:
    installed = mxnet_distributions()
    text = ", ".join(f"{name} {version}" for name, version in installed.items()) or "no wheel"
    uninstall = f"pip uninstall -y {' '.join(installed)}, then " if installed else ""
    return (
        f"mxnet is built without CUDA (installed: {text}); for an NVIDIA GPU: {uninstall}"
        "pip install 'scratchbn[cu112]'"
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
