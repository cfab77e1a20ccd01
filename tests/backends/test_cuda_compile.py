"""The CUDA kernels through NVIDIA's own compiler, for every generation of cards; needs no card."""

import ctypes
import re

from scratchbn import BackendError
from scratchbn.environment.driver import GPU, Driver
from scratchbn.native import cuda
from scratchbn.native.cuda import _compile, _load
from scratchbn.native.cuda._compile import Target, choose_target

# isort: split
import pytest
from helpers import SANITIZED

KERNELS = 24
# An SM has 65536 registers: with 80, 3 blocks of 256 threads fit, and 24 KiB are under way.
MOST_REGISTERS = 96
ONE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def nvrtc():
    if SANITIZED:
        pytest.skip("behind a preloaded AddressSanitizer NVRTC finds no libnvrtc-builtins")
    try:
        return _compile.Nvrtc()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def ptx(nvrtc):
    """What is made for cards newer than NVRTC, by kernel."""
    target = choose_target(999, nvrtc.architectures())
    assert not target.is_machine_code
    entries = re.split(r"\.entry ", nvrtc.compile(target)[0].decode())[1:]
    return {entry.partition("(")[0]: entry for entry in entries}


# From the oldest to the newest; the others take some 6 s each and differ from these by little.
@pytest.mark.parametrize("capability", [50, 75, 80, 90])
def test_kernels_compile_without_spills(nvrtc, capability):
    target = choose_target(capability, nvrtc.architectures())
    code, log = nvrtc.compile(target, ("--ptxas-options=-v",))
    assert code.startswith(b"\x7fELF")
    found = {name: tuple(map(int, numbers)) for name, *numbers in ONE.findall(log)}
    assert len(found) == KERNELS
    assert {name: n for name, n in found.items() if n[:2] != (0, 0)} == {}, "spills"
    assert {name: n[2] for name, n in found.items() if n[2] > MOST_REGISTERS} == {}


def test_for_newer_cards_there_is_ptx_whose_loads_are_vectors(ptx):
    assert len(ptx) == KERNELS
    wide = {"float_4": "v4.f32", "double_2": "v2.f64", "half_4": "v4.u16"}
    for name, entry in ptx.items():
        kind = next((kind for kind in wide if name.endswith(kind)), None)
        if kind is not None:
            assert f"ld.global.{wide[kind]}" in entry, name
        if name.endswith(("double", "double_1", "double_2")):
            assert not re.search(r"cvt\S*\.f32\.f64", entry), f"{name} computes in float32"


def test_the_last_block_sees_what_the_others_left(ptx):
    """What an emulation cannot show: fences on both sides of the count, loads past the cache."""
    words = r"bar\.sync|membar\.gl|atom\.global\.inc\.u32|ld\.volatile\.global\.f64"
    read = "ld.volatile.global.f64 " * 2  # both sums of an entry
    counted = f"membar.gl bar.sync atom.global.inc.u32 bar.sync membar.gl {read.strip()}"
    for name, entry in ptx.items():
        found = re.findall(words, entry)
        counts = 2 if name.startswith(("moments", "gradient_sums")) else 0
        assert found.count("atom.global.inc.u32") == counts, name
        assert " ".join(found).count(counted) == counts, name


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        (80, Target("sm_80", True)),
        (87, Target("sm_86", True)),  # machine code runs on later cards of its generation
        (100, Target("compute_90", False)),
        (120, Target("compute_90", False)),
    ],
)
def test_what_is_made_for_a_card(capability, target):
    assert choose_target(capability, [50, 80, 86, 90]) == target


def test_a_card_that_is_too_old_is_named():
    with pytest.raises(BackendError, match=r"capability 3\.5, only from 5\.0 on"):
        choose_target(35, [50, 80])


class Compiler:
    """In the place of NVRTC: code that can be told apart."""

    made = 0
    version, path = "11.8", "libnvrtc"

    def architectures(self):
        return [80, 90]

    def compile(self, target, options=()):
        Compiler.made += 1
        return f"{target.architecture} {Compiler.made}".encode(), ""


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(Compiler, "made", 0)
    for module in (_compile, _load):
        monkeypatch.setattr(module, "Nvrtc", Compiler)


@pytest.fixture
def no_compiler(monkeypatch):
    def missing():
        raise BackendError("no NVRTC")

    for module in (_compile, _load):
        monkeypatch.setattr(module, "Nvrtc", missing)


def test_code_is_compiled_once(kernel_cache, compiler):
    assert _compile.image(80) == _compile.image(80) == b"sm_80 1"
    assert _compile.image(86) == b"sm_80 2", "another card"
    assert _compile.image(80, force=True) == b"sm_80 3"
    assert sorted(p.name.split("-")[1] for p in kernel_cache.iterdir()) == ["sm_80", "sm_86"]


def test_the_name_of_the_code_follows_the_source(kernel_cache, compiler, monkeypatch, tmp_path):
    before = _compile.image_path(80)
    monkeypatch.setattr(_compile, "OPTIONS", ("--std=c++17",))
    assert _compile.image_path(80) != before


def test_what_is_in_the_cache_needs_no_compiler(kernel_cache, compiler, monkeypatch, no_compiler):
    with pytest.raises(BackendError, match="no NVRTC"):
        _compile.image(80)
    kernel_cache.mkdir()
    _compile.image_path(80).write_bytes(b"kept")
    assert _compile.image(80) == b"kept"


def test_a_cache_that_cannot_be_written_is_named(compiler, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCRATCHBN_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="the kernels could not be kept in"):
        _compile.image(80)


# What is loaded, and what is said of it

ONE_CARD = Driver("12.0", (GPU(0, "a card", (8, 0)),), None)
NO_CARD = Driver(None, (), "no NVIDIA driver (not found)")


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(_load, "_problems", {})


def test_without_a_driver_the_reason_is_kept(fresh, compiler, monkeypatch):
    monkeypatch.setattr(_load, "query_driver", lambda: NO_CARD)
    assert not cuda.available({0})
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        cuda.load({0})
    assert cuda.facts()["problem"] == "no NVIDIA driver (not found)"
    assert cuda.build() == {}


def test_a_card_that_is_not_listed_is_refused(fresh, compiler, monkeypatch):
    monkeypatch.setattr(_load, "query_driver", lambda: ONE_CARD)
    with pytest.raises(BackendError, match="lists no GPU 3"):
        cuda.load({3})


def test_a_card_without_a_compiler(fresh, kernel_cache, no_compiler, monkeypatch):
    monkeypatch.setattr(_load, "query_driver", lambda: ONE_CARD)
    assert cuda.facts() == {"nvrtc": None, "code": {"8.0": None}, "problem": "no NVRTC"}
    kernel_cache.mkdir()
    _compile.image_path(80).write_bytes(b"kept")
    assert cuda.facts()["problem"] is None


class Library:
    """The operator's library: what it is handed, and a device that refuses if told so."""

    def __init__(self, refusal=b""):
        self.refusal, self.images = refusal, {}

    def scratchbn_gpu_add_image(self, capability, code, size):
        self.images[capability] = code[: size.value]

    def scratchbn_gpu_open(self, device, reason, size):
        reason.value = self.refusal
        return bool(self.refusal)


def test_code_for_all_cards_is_handed_over(fresh, kernel_cache, compiler, monkeypatch):
    """A net that is traced with arrays of one device runs on all that hold its Parameters."""
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    two = Driver("12.0", (*ONE_CARD.gpus, GPU(1, "another", (9, 0))), None)
    monkeypatch.setattr(_load, "query_driver", lambda: two)
    cuda.load({0})
    assert library.images == {80: b"sm_80 1", 90: b"sm_90 2"}
    assert cuda.build() == {c: str(_compile.image_path(n)) for c, n in (("8.0", 80), ("9.0", 90))}


def test_a_card_that_does_not_take_the_code_is_not_used(fresh, kernel_cache, compiler, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library(b"PTX too new"))
    monkeypatch.setattr(_load, "query_driver", lambda: ONE_CARD)
    assert not cuda.available({0})
    assert "does not take the kernels: PTX too new" in cuda.facts()["problem"]
