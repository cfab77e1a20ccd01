"""A GPU that is this CPU: the kernels' own source, compiled by a C++ compiler behind a driver."""

import ctypes
import hashlib
import os
import shlex
import subprocess

from scratchbn import native
from scratchbn._writing import staged

import numpy as np
from gpu_kit.operator import Operator, Tensor
from helpers import REPOSITORY

HERE = REPOSITORY / "tests" / "cuda_on_cpu"
SOURCES = REPOSITORY / "scratchbn" / "native" / "cuda"
CAPABILITY = 80


class HostMemory:
    """Arrays of NumPy as a device's memory, seen from the operator."""

    stream = 0x51

    def __init__(self):
        self._kept = []

    def empty(self, shape, dtype):
        return np.full(shape, 7, dtype)  # what is not written shows

    def tensor(self, array):
        return Tensor(array.ctypes.data, array.shape, array.dtype.name)

    def allocate(self, size):
        self._kept.append(np.full(size, 0xFF, np.uint8))  # NaN in every type
        return self._kept[-1].ctypes.data


class Driver:
    """The driver's stand-in, built once for each state of its sources.

    The variable CUDA_ON_CPU_CXXFLAGS adds flags: ``-mfma -ffp-contract=fast`` for products and sums
    that are rounded once, as on a card, or ``-g -fsanitize=thread``, see ``cuda_on_cpu.h``.
    """

    def __init__(self):
        flags = os.environ.get("CUDA_ON_CPU_CXXFLAGS", "")
        digest = hashlib.sha256(f"{native.compiler()} {flags}".encode())
        for folder in (HERE, SOURCES):
            for file in sorted(folder.glob("*.*")):
                if file.suffix in (".cc", ".cu", ".h"):
                    digest.update(file.read_bytes())
        self.path = REPOSITORY / "build" / "cuda-on-cpu" / f"{digest.hexdigest()[:16]}.so"
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with staged(self.path) as library:
                command = [
                    native.compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", "-pthread",
                    "-Wno-unknown-pragmas", *shlex.split(flags),
                    "-I", HERE, "-I", SOURCES, HERE / "libcuda.cc", "-o", library,
                ]  # fmt: skip
                subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(self.path))
        self._library.launches.restype = ctypes.c_char_p

    def launches(self):
        """What was launched since the last call: names of kernels, each with what it was given."""
        lines = self._library.launches().decode().splitlines()
        found = []
        for line in lines:
            name, *fields = line.split()
            found.append((name, dict(field.split("=") for field in fields)))
        return found


def machine_code(capability):
    """A file that says for which card it is, and holds nothing."""
    return b"\x7fELF".ljust(48, b"\0") + bytes([capability]) + bytes(15)


def ptx(capability):
    """The same as text."""
    return f".version 7.8\n.target sm_{capability}\n.address_size 64\n".encode()


def operator_on(driver):
    """The operator of the product's library, on the stand-in."""
    os.environ["SCRATCHBN_LIBCUDA"] = str(driver.path)
    try:
        operator = Operator(native.build())
        operator.add_image(CAPABILITY, machine_code(CAPABILITY))
        operator.open(0)
    finally:
        del os.environ["SCRATCHBN_LIBCUDA"]
    return operator
