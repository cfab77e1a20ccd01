"""Which code a card is given, and what is said where it takes none; on the stand-in of a driver."""

import os
import subprocess
import sys
from types import SimpleNamespace

from scratchbn import BackendError, native
from scratchbn.environment.driver import GPU, Driver
from scratchbn.native import cuda
from scratchbn.native.cuda import _compile, _load

# isort: split
import cuda_on_cpu
import mxnet as mx
import pytest
from gpu_kit import prepare
from gpu_kit.code import code_for

pytestmark = [
    pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        mx.runtime.Features().is_enabled("CUDA"), reason="a driver of its own is in the process"
    ),
]
NVRTC_11_8 = [35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90]


@pytest.fixture(scope="module")
def operator():
    return cuda_on_cpu.operator_on(cuda_on_cpu.Driver())


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """The files that `make gpu-kit` writes, by their names."""
    folder = tmp_path_factory.mktemp("kit")
    for capability in prepare.CAPABILITIES:
        (folder / f"sm_{capability}.cubin").write_bytes(cuda_on_cpu.machine_code(capability))
    (folder / "compute_90.ptx").write_bytes(cuda_on_cpu.ptx(90))
    return folder


@pytest.fixture
def card(monkeypatch):
    """A card of a compute capability, which is its number, as what was opened once stays open."""

    def plug_in(capability):
        monkeypatch.setenv("CUDA_ON_CPU_DEVICES", "1000")
        monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", str(capability))
        return capability

    return plug_in


@pytest.mark.parametrize("capability", [*NVRTC_11_8[2:], 120])
def test_the_kit_has_code_that_a_card_takes(operator, kit, card, capability):
    file = code_for(kit, divmod(capability, 10))
    operator.add_image(capability, file.read_bytes())
    operator.open(card(capability))
    assert file.suffix == (".ptx" if capability > 99 else ".cubin")


@pytest.mark.parametrize("capability", [51, 88, 100])
def test_the_backend_has_code_that_a_card_takes(operator, card, capability):
    target = _compile.choose_target(capability, NVRTC_11_8)
    made_for = int(target.architecture.partition("_")[2])
    make = cuda_on_cpu.machine_code if target.is_machine_code else cuda_on_cpu.ptx
    operator.add_image(capability, make(made_for))
    operator.open(card(capability))


def test_a_card_that_is_older_than_the_kit_is_named(kit):
    with pytest.raises(
        FileNotFoundError, match=r"no code for compute capability 3\.5, only compute"
    ):
        code_for(kit, (3, 5))


def test_text_for_newer_cards_is_not_given_to_an_older_one(tmp_path):
    for number in (70, 90, 75):
        (tmp_path / f"compute_{number}.ptx").write_bytes(cuda_on_cpu.ptx(number))
    assert code_for(tmp_path, (8, 6)).name == "compute_75.ptx"
    with pytest.raises(FileNotFoundError, match=r"6\.1, only compute_70\.ptx, compute_75\.ptx"):
        code_for(tmp_path, (6, 1))
    with pytest.raises(FileNotFoundError, match="only none at all: run make gpu-kit"):
        code_for(tmp_path / "nothing", (6, 1))


@pytest.mark.parametrize("image", [cuda_on_cpu.ptx(90), cuda_on_cpu.machine_code(70)])
def test_a_card_refuses_code_that_is_not_for_it(operator, card, image):
    operator.add_image(62, image)
    with pytest.raises(RuntimeError, match="cuModuleLoadData: CUDA error 209, no kernel image"):
        operator.open(card(62) + 100)


def test_auto_says_why_a_card_is_not_used(operator, card, monkeypatch):
    """As where a cache holds code that was compiled for another card."""
    number = card(63) + 100
    gpu = GPU(number, "a card", (6, 3))
    monkeypatch.setattr(_load, "query_driver", lambda: Driver("12.0", (gpu,), None))
    monkeypatch.setattr(_load, "_problems", {})
    monkeypatch.setattr(_load, "image", lambda capability: cuda_on_cpu.ptx(90))
    assert not cuda.available({number})
    assert "does not take the kernels: cuModuleLoadData: CUDA error 209" in cuda.facts()["problem"]
    with pytest.raises(BackendError, match=r"no kernel image .*build-native --force"):
        cuda.load({number})


def test_the_kit_keeps_no_code_of_other_sources(tmp_path, monkeypatch):
    nvrtc = SimpleNamespace(architectures=lambda: [80, 90], compile=lambda target: (b"new", ""))
    monkeypatch.setattr(prepare, "find_nvrtc", lambda: nvrtc)
    for name in ("sm_70.cubin", "sm_80.cubin", "compute_80.ptx"):
        (tmp_path / name).write_bytes(b"old")
    prepare.prepare(tmp_path, (86,))
    code = {file.name: file.read_bytes() for file in tmp_path.glob("*_*.*")}
    assert code == {"sm_80.cubin": b"new", "compute_90.ptx": b"new"}


def test_what_is_loaded_outlives_what_is_static(tmp_path):
    program = tmp_path / "at_exit"
    include = ["-I", str(cuda_on_cpu.SOURCES)]
    source = str(cuda_on_cpu.HERE / "at_exit.cc")
    command = [native.compiler(), "-std=c++17", *include, source, "-o", str(program), "-ldl"]
    subprocess.run(command, check=True)
    # What is freed is overwritten.
    more = {"SCRATCHBN_LIBCUDA": str(cuda_on_cpu.Driver().path), "MALLOC_PERTURB_": "165"}
    assert subprocess.run([program], env={**os.environ, **more}).returncode == 0


def test_the_kit_installs_a_compiler_where_there_is_none(monkeypatch, tmp_path):
    made, commands = [], []

    def nvrtc():
        made.append(True)
        if len(made) == 1:
            raise BackendError("no NVRTC")
        return "compiler"

    run = SimpleNamespace(run=lambda command, check: commands.append(command))
    monkeypatch.setattr(prepare, "Nvrtc", nvrtc)
    monkeypatch.setattr(prepare, "subprocess", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert prepare.find_nvrtc() == "compiler"
    ((*_, target, pin),) = commands
    assert target.endswith("nvrtc") and pin.startswith("nvidia-cuda-nvrtc-cu11==11.8")
    assert target in sys.path
    monkeypatch.setattr(prepare, "Nvrtc", lambda: "found")
    assert prepare.find_nvrtc() == "found" and len(commands) == 1
