"""Build what `gpu_check.py` takes to a machine with a GPU: the operator, and code for cards.

``make gpu-kit`` runs this; it needs a C++ compiler, MXNet's headers and NVRTC, which it installs
into build/nvrtc if there is none, and no card.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scratchbn import native
from scratchbn.native.cuda._compile import Nvrtc, choose_target

REPOSITORY = Path(__file__).resolve().parents[2]
KIT = REPOSITORY / "build" / "gpu-kit"
# Machine code also runs on later cards of its generation: 5.2 takes that for 5.0.
CAPABILITIES = (50, 60, 61, 70, 75, 80, 86, 89, 90)
NEWER = 999  # a card of the future: PTX


def prepare(folder: Path, capabilities: tuple[int, ...]) -> None:
    """Write the operator's library, the library of threads that it needs, and code for cards."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("sm_*.cubin"), *folder.glob("compute_*.ptx")):
        old.unlink()  # code of other sources than the operator's would be given the wrong arguments
    shutil.copyfile(native.build(), folder / "operator.so")
    command = [native.compiler() or "c++", "-print-file-name=libgomp.so.1"]
    threads = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if Path(threads).is_file():
        shutil.copyfile(threads, folder / "libgomp.so.1")
    nvrtc = find_nvrtc()
    for capability in (*capabilities, NEWER):
        target = choose_target(capability, nvrtc.architectures())
        code, _ = nvrtc.compile(target)
        name = f"{target.architecture}.{'cubin' if target.is_machine_code else 'ptx'}"
        (folder / name).write_bytes(code)
        print(f"{name}: {len(code)} bytes", flush=True)


def find_nvrtc() -> Nvrtc:
    """Return NVRTC; install the version that the extra cu112 pins if there is none."""
    folder = REPOSITORY / "build" / "nvrtc"
    sys.path.append(str(folder))
    try:
        return Nvrtc()
    except native.BackendError:
        project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
        pin = re.search(r'"(nvidia-cuda-nvrtc-cu11==[^"]+)"', project)
        if pin is None:
            raise
    print(f"installing {pin[1]} into {folder}", flush=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), pin[1]]
    subprocess.run([sys.executable, *install], check=True)
    return Nvrtc()


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=KIT)
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    arguments = parser.parse_args()
    try:
        prepare(arguments.folder, tuple(arguments.capability))
    except (OSError, subprocess.CalledProcessError, native.BackendError) as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in arguments.folder.iterdir())
    print(f"{arguments.folder}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
