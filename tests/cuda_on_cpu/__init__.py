"""A GPU that is this CPU: the kernels' own source, compiled by a C++ compiler behind a driver."""

import ctypes
import os
import subprocess

from scratchbn import native

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
    """The driver's stand-in, built into a directory."""

    def __init__(self, directory):
        self.path = directory / "libcuda-on-cpu.so"
        command = [
            native.compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas",
            "-I", HERE, "-I", SOURCES, HERE / "libcuda.cc", "-o", self.path,
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


def operator_on(driver):
    """The operator of the product's library, on the stand-in."""
    os.environ["SCRATCHBN_LIBCUDA"] = str(driver.path)
    try:
        operator = Operator(native.build())
        operator.add_image(CAPABILITY, b"\x7fELF, of no use to a CPU")
        operator.open(0)
    finally:
        del os.environ["SCRATCHBN_LIBCUDA"]
    return operator
