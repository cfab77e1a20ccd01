"""Code for a card: compiled by NVRTC, and kept in the cache.

A cubin is machine code for one generation of cards. For cards newer than the NVRTC at hand it is
PTX, which the driver compiles when it loads it.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..._writing import staged
from ...environment.driver import dotted
from ...environment.install import python_command
from .._build import BackendError, cache_directory

SOURCE = "batch_norm.cu"
HEADERS = ("sums.h", "walk.h", "call.h")
OPTIONS = ("--std=c++14",)
# Of CUDA 11, 12 and 13; a package of PyPI keeps the first below nvidia/cuda_nvrtc or nvidia/cu13.
LIBRARIES = ("libnvrtc.so.11.2", "libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so")
_HERE = Path(__file__).resolve().parent


class Target(NamedTuple):
    """What NVRTC is to make for a card."""

    architecture: str
    is_machine_code: bool


class Nvrtc:
    """The compiler, from PyPI's package or the system.

    Raises
    ------
    BackendError
        If there is none.
    """

    def __init__(self) -> None:
        self.path, self._library = _find()

    @property
    def version(self) -> str:
        """Its version, of CUDA."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def architectures(self) -> list[int]:
        """Return what it makes machine code for, ascending, 86 for compute capability 8.6."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return sorted(found)

    def compile(self, target: Target, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
        """Return the code and what the compiler says; BackendError if it refuses."""
        program = ctypes.c_void_p()
        texts = [(_HERE / name).read_bytes() for name in HEADERS]
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            (_HERE / SOURCE).read_bytes(),
            SOURCE.encode(),
            len(HEADERS),
            _strings(texts),
            _strings([name.encode() for name in HEADERS]),
        )
        try:
            chosen = [f"--gpu-architecture={target.architecture}", *OPTIONS, *options]
            given = _strings([option.encode() for option in chosen])
            with ThreadPoolExecutor(1) as pool:  # NVRTC leaves a thread in the locale C
                compiling = pool.submit(
                    self._library.nvrtcCompileProgram, program, len(chosen), given
                )
                status = compiling.result()
            log = self._result("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if status:
                raise BackendError(f"{self.path} could not compile {SOURCE}:\n{log.strip()}")
            code = self._result("CUBIN" if target.is_machine_code else "PTX", program)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return code, log

    def _result(self, kind: str, program: Any) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(max(size.value, 1))
        self._call(f"nvrtcGet{kind}", program, text)
        return text.raw[: size.value]

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise BackendError(f"{name} of {self.path} returned {status}")


def choose_target(capability: int, architectures: list[int]) -> Target:
    """Return what to make for a card, of what an NVRTC can make.

    Parameters
    ----------
    capability : int
        86 for compute capability 8.6.
    architectures : list of int

    Returns
    -------
    Target
        Machine code for the card, or for an older one of its generation, which it runs too; PTX
        if the card's generation is newer.

    Raises
    ------
    BackendError
        If the card is older than all that NVRTC knows.

    Examples
    --------
    >>> choose_target(89, [80, 86, 90])
    Target(architecture='sm_86', is_machine_code=True)
    >>> choose_target(120, [80, 86, 90])
    Target(architecture='compute_90', is_machine_code=False)
    """
    older = [known for known in architectures if known <= capability]
    if not older:
        raise BackendError(
            f"this NVRTC makes no code for compute capability {dotted(divmod(capability, 10))}, "
            f"only from {dotted(divmod(min(architectures), 10))} on"
        )
    best = max(older)
    alike = best // 10 == capability // 10
    return Target(f"{'sm' if alike else 'compute'}_{best}", alike)


def image_path(capability: int) -> Path:
    """Return where the code for cards of a compute capability is, or would be."""
    digest = hashlib.sha256()
    for name in (SOURCE, *HEADERS):
        digest.update((_HERE / name).read_bytes())
    digest.update(" ".join(OPTIONS).encode())
    return cache_directory() / f"batch_norm-sm_{capability}-{digest.hexdigest()[:16]}.cubin"


def image(capability: int, force: bool = False) -> bytes:
    """Return the code for cards of a compute capability; compile it if it is not in the cache.

    Parameters
    ----------
    capability : int
        86 for compute capability 8.6.
    force : bool
        Compile even if it is.

    Returns
    -------
    bytes

    Raises
    ------
    BackendError
        If there is no NVRTC, or it has no code for such a card, or the cache cannot be written.
    """
    path = image_path(capability)
    try:
        if path.exists() and not force:
            return path.read_bytes()
        nvrtc = Nvrtc()
        code, _ = nvrtc.compile(choose_target(capability, nvrtc.architectures()))
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as file:
            file.write_bytes(code)
    except OSError as error:
        raise BackendError(f"the kernels could not be kept in {path}: {error}") from error
    return code


def _find() -> tuple[str, Any]:
    below = ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib")
    files = [
        Path(entry, folder, library)
        for library in LIBRARIES
        for entry in sys.path
        for folder in below
        if entry
    ]
    for name in (*(str(file) for file in files if file.is_file()), *LIBRARIES):
        try:
            return name, ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendError(
        f"no NVRTC, CUDA's run-time compiler (looked for {', '.join(LIBRARIES)}): "
        + python_command("-m", "pip", "install", "nvidia-cuda-nvrtc-cu11")
    )


def _strings(texts: list[bytes]) -> Any:
    return (ctypes.c_char_p * len(texts))(*texts)
