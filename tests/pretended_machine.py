"""A machine that is pretended: its GPUs and driver, its wheels, and its CUDA libraries."""

import shutil
import subprocess

from scratchbn.environment import device, doctor, prepare
from scratchbn.environment.driver import GPU, Driver

import pytest

T4 = GPU(0, "Tesla T4", (7, 5))
H100 = GPU(1, "H100 PCIe", (9, 0))
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
NO_DRIVER = Driver(None, (), "no NVIDIA driver (libcuda.so.1: cannot open)")


def pretend_installed(monkeypatch, **versions):
    installed = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(prepare, "version", installed.get)


def compile_library(folder, name, source, *options):
    folder.mkdir(parents=True, exist_ok=True)
    code = folder / f"{name}.c"
    code.write_text(source)
    output = folder / name
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", str(code), "-o", str(output)]
    subprocess.run([*command, *map(str, options)], check=True)
    return output


def install_cuda_files(root, *libraries):
    components = dict(prepare.CUDA_LIBRARIES)
    for library in libraries:
        folder = root / "nvidia" / components[library].replace("-", "_") / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / library).touch()


def no_such_library(name):
    return OSError(f"{name}: cannot open shared object file: No such file or directory")


def machine(monkeypatch, *, driver, cuda=True, kernels=None, wheel="mxnet_cu112"):
    """Pretend to be a machine; `kernels` maps a GPU index to how its first kernel fails."""
    pretend_installed(monkeypatch, **{wheel: "1.9.1"})
    monkeypatch.setattr(device, "_built_with_cuda", lambda: cuda)
    monkeypatch.setattr(device, "query_driver", lambda: driver)
    monkeypatch.setattr(doctor, "query_driver", lambda: driver)
    monkeypatch.setattr(device, "_kernel_failure", (kernels or {}).get)
