"""What the NVIDIA driver tells: its GPUs, or what failed."""

import ctypes

from scratchbn.environment import driver
from scratchbn.environment.driver import Driver, query_driver

import pytest
from pretended_machine import H100, T4, compile_library, needs_compiler, no_such_library


class FakeCuda:
    """libcuda.so.1 as ctypes shows it: functions that fill in references and return a status."""

    def __init__(self, gpus=(), failing=None, status=0):
        self.gpus = gpus
        self.failing = failing
        self.status = status

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.failing:
                return self.status
            return getattr(self, f"_{name}")(*arguments) or 0

        return call

    def _cuInit(self, flags):
        assert flags == 0

    def _cuDriverGetVersion(self, version):
        version._obj.value = 12020

    def _cuDeviceGetCount(self, count):
        count._obj.value = len(self.gpus)

    def _cuDeviceGet(self, device, index):
        device._obj.value = 40 + index

    def _cuDeviceGetName(self, name, length, device):
        name.value = self.gpus[device - 40].name.encode()[: length - 1]

    def _cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.gpus[device - 40].capability[{75: 0, 76: 1}[attribute]]

    def _cuGetErrorString(self, status, text):
        text._obj.value = {100: b"no CUDA-capable device is detected"}.get(status)
        return 0 if text._obj.value else 1


def plug_in(monkeypatch, cuda):
    def load(name, mode=ctypes.DEFAULT_MODE):
        assert name == "libcuda.so.1"
        return cuda

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_driver_lists_its_gpus(monkeypatch):
    plug_in(monkeypatch, FakeCuda([T4, H100]))
    assert query_driver() == Driver("12.2", (T4, H100), None)


def test_no_driver_library(monkeypatch):
    def load(name, mode=ctypes.DEFAULT_MODE):
        raise no_such_library(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    driver = query_driver()
    assert (driver.cuda_version, driver.gpus) == (None, ())
    assert driver.problem.startswith("no NVIDIA driver (libcuda.so.1: cannot open")


@pytest.mark.parametrize(
    ("function", "status", "meaning"),
    [
        ("cuInit", 100, "no CUDA-capable device is detected"),
        ("cuDeviceGetCount", 3, "unknown error"),
        ("cuDeviceGetName", 101, "unknown error"),
    ],
)
def test_a_failing_driver_says_what_failed(monkeypatch, function, status, meaning):
    plug_in(monkeypatch, FakeCuda([T4], function, status))
    driver = query_driver()
    assert (driver.cuda_version, driver.gpus) == ("12.2", ())
    assert f"{function} returned {status} ({meaning})" in driver.problem


def test_hidden_gpus_are_reported_with_the_variable_that_hides_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    plug_in(monkeypatch, FakeCuda([]))
    problem = query_driver().problem
    assert problem == "the NVIDIA driver lists no GPU (CUDA_VISIBLE_DEVICES is '5')"


DRIVER_SOURCE = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *version) { *version = 11080; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device ? "H100 PCIe" : "Tesla T4", length);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int table[2][2] = {{7, 5}, {9, 0}};
    *value = table[device][attribute - 75];
    return 0;
}
"""


@needs_compiler
def test_driver_calls_fit_the_c_interface(monkeypatch, tmp_path):
    library = compile_library(tmp_path, "libcuda.so.1", DRIVER_SOURCE)
    monkeypatch.setattr(driver, "DRIVER_LIBRARY", str(library))
    assert query_driver() == Driver("11.8", (T4, H100), None)
