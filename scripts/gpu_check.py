"""Check the compiled operator on a GPU: its numbers and its speed. Needs PyTorch, and no MXNet.

``make gpu-kit`` prepares build/gpu-kit where this repository is set up; then, on the machine with
the card, ``python scripts/gpu_check.py`` prints a Markdown table and ends with status 1 if a number
is wrong. The operator is called through the functions that MXNet calls, with PyTorch's memory and
stream; numbers are compared with PyTorch's in float64, times with a copy on the device and with
PyTorch's batch normalization (cuDNN) in the same layout.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path

try:
    import torch
    from gpu_kit.code import code_for
    from gpu_kit.on_torch import TYPES, TorchArrays, TorchPeer
    from gpu_kit.operator import Operator
    from gpu_kit.report import report
    from gpu_kit.speed import Clock, EventClock
except ModuleNotFoundError as error:
    if error.name not in ("numpy", "torch"):
        raise
    sys.exit(f"gpu_check: needs {error.name}: {sys.executable} -m pip install numpy torch")

KIT = Path(__file__).resolve().parents[1] / "build" / "gpu-kit"


def load(kit: Path, capability: tuple[int, int], device: int) -> Operator:
    """Return the operator with the code for the card."""
    code = code_for(kit, capability)
    if (kit / "libgomp.so.1").exists():
        ctypes.CDLL(str(kit / "libgomp.so.1"), ctypes.RTLD_GLOBAL)
    operator = Operator(kit / "operator.so")
    operator.add_image(10 * capability[0] + capability[1], code.read_bytes())
    operator.open(device)
    return operator


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", type=Path, default=KIT, help="what make gpu-kit made")
    parser.add_argument("--mebibytes", type=float, nargs="*", default=[1, 4, 16, 32, 128, 512])
    parser.add_argument("--types", nargs="*", choices=TYPES, default=["float32", "float16"])
    parser.add_argument("--out", type=Path, help="write the tables to this file, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: PyTorch finds no NVIDIA GPU here", file=sys.stderr)
        return 1
    device = torch.device("cuda", 0)
    capability = torch.cuda.get_device_capability(device)
    title = f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    clock = EventClock(torch.cuda, time.perf_counter)
    return check(options, device, capability, title, clock)


def check(
    options: argparse.Namespace,
    device: torch.device,
    capability: tuple[int, int],
    title: str,
    clock: Clock,
) -> int:
    """Print the tables for a device; return the exit status."""
    torch.manual_seed(0)
    arrays = TorchArrays(device)
    try:
        operator = load(options.kit, capability, device.index or 0)
    except (OSError, RuntimeError) as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    parts = (operator, arrays, arrays.reference, TorchPeer(), clock)
    text, wrong = report(title, *parts, options.mebibytes, options.types)
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
