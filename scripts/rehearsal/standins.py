"""Build stand-ins for the CUDA libraries that libmxnet.so of mxnet-cu112 is linked with."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from scratchbn._writing import staged, write_text

SOURCES = Path(__file__).with_name("standins")
# What our own kernels are given, for the order of their reads and writes.
KERNELS = Path(__file__).resolve().parents[2] / "scratchbn" / "native" / "cuda"
# What a library's functions are called, and the sources that hold those with something to answer.
LIBRARIES = {
    "libcuda.so.1": (r"cu[A-Z]", "cuda.cc"),
    "libcudart.so.11.0": (r"cuda[A-Z]|__cuda", "cudart.cc"),
    "libcublas.so.11": (r"cublas", "cublas.cc"),
    "libcudnn.so.8": (r"cudnn", "cudnn.cc"),
    "libcurand.so.10": (r"curand", "others.cc"),
    "libcufft.so.10": (r"cufft", "others.cc"),
    "libcusolver.so.11": (r"cusolver", "others.cc"),
    "libnccl.so.2": (r"nccl", "others.cc"),
    "libnvToolsExt.so.1": (r"nvtx", "others.cc"),
}
# Without an answer written for them: graphs, and whatever hands a number back through a pointer.
_UNSUPPORTED = re.compile(r"cu(da)?Graph|cudaStream(Begin|End)Capture|\w+_bufferSize|\w*Get[A-Z]")
_SILENT = re.compile(r"\w*(Destroy|Set[A-Z]|DeriveBN|Restore)")
_CREATES = re.compile(r"\w*Create[A-Z]?")


def imported_symbols(library: Path) -> list[str]:
    """Return the functions that a shared library expects of others, without their versions."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted({line.split()[-1].partition("@")[0] for line in lines if line.strip()})


def default_function(name: str) -> str:
    """Return C++ for a function that nothing was written for; one that is written replaces it."""
    weak = 'extern "C" __attribute__((weak, visibility("default"))) int'
    if _UNSUPPORTED.match(name):
        body = f'{{ rehearsal::note("MISSING\\t{name}"); return rehearsal::NOT_SUPPORTED; }}'
        return f"{weak} {name}() {body}"
    if _CREATES.match(name):
        return f"{weak} {name}(void** created) {{ return *created = rehearsal::handle(), 0; }}"
    body = "return 0;" if _SILENT.match(name) else f'rehearsal::note_call("{name}"); return 0;'
    return f"{weak} {name}() {{ {body} }}"


def build(compiler: str, libmxnet: Path, folder: Path) -> Path:
    """Compile the stand-ins into `folder`, unless they are there; return it.

    Raises subprocess.CalledProcessError if the compiler or ``nm`` fails.
    """
    symbols = imported_symbols(libmxnet)
    ready, wanted = folder / "ready", _fingerprint(symbols)
    if ready.exists() and ready.read_text() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for soname, (pattern, source) in LIBRARIES.items():
        names = [name for name in symbols if re.match(pattern, name)]
        defaults, versions = folder / f"{soname}.cc", folder / f"{soname}.map"
        lines = ['#include "journal.h"', *map(default_function, names)]
        write_text(defaults, "\n".join(lines) + "\n")
        write_text(versions, f"{soname} {{ global: *; }};\n")
        options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", f"-I{SOURCES}"]
        options += [f"-I{KERNELS}"]
        options += [f"-Wl,-soname,{soname}", f"-Wl,--version-script={versions}"]
        inputs = [str(SOURCES / source), str(defaults)]
        with staged(folder / soname) as library:
            subprocess.run([compiler, *options, *inputs, "-o", str(library)], check=True)
    write_text(ready, wanted)
    return folder


def _fingerprint(symbols: Iterable[str]) -> str:
    parts = ["\n".join(symbols), Path(__file__).read_text("utf-8")]
    parts += [file.read_text("utf-8") for file in (*sorted(SOURCES.iterdir()), KERNELS / "call.h")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
