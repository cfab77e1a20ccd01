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
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_kit.code import code_for
from gpu_kit.on_torch import TYPES, TorchMemory, reference
from gpu_kit.operator import DEFAULTS, Operator
from gpu_kit.steps import backward, forward, gradients_for, outputs_for

KIT = Path(__file__).resolve().parents[1] / "build" / "gpu-kit"
CLOSE = {"float64": 1e-13, "float32": 2e-6, "float16": 6e-4}
PASSES = {"forward": 3, "backward": 5}  # over the array, reading or writing
SHAPES = [((4, 3), 1), ((32, 64, 28, 28), 1), ((5, 50, 5, 5), 1), ((32, 28, 28, 64), 3),
          ((4096, 7), 1), ((256, 1000), 1), ((2, 3, 99991), 1), ((6, 5, 3), 0)]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"training": False}, {"relu": True}, {"relu": True, "training": False}, {"mean": 1e5},
]  # fmt: skip


def load(kit: Path, device: torch.device) -> Operator:
    """Return the operator with the code for the card."""
    if (kit / "libgomp.so.1").exists():
        ctypes.CDLL(str(kit / "libgomp.so.1"), ctypes.RTLD_GLOBAL)
    operator = Operator(kit / "operator.so")
    major, minor = (8, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)
    operator.add_image(10 * major + minor, code_for(kit, (major, minor)).read_bytes())
    operator.open(0)
    return operator


def make_state(channels: int, dtype: str, memory: TorchMemory, mean: float, flag: float) -> Any:
    """Return Parameters of random values."""
    kind = torch.float32 if dtype == "float16" else TYPES[dtype]
    draw = {
        "gamma": torch.rand(channels) * 1.5 + 0.5,
        "beta": torch.randn(channels),
        "running_mean": torch.randn(channels) + mean,
        "running_var": torch.rand(channels) + 0.5,
    }
    state = {name: value.to(memory.device, kind) for name, value in draw.items()}
    return {**state, "flag": torch.full((1,), flag, device=memory.device)}


def errors(
    operator: Operator, memory: TorchMemory, shape: tuple[int, ...], axis: int, dtype: str,
    mean: float = 0.0, training: bool = True, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Take a step; return how far each result is from PyTorch's, over what the type allows."""
    chosen = {**DEFAULTS, "axis": axis, **options}
    state = make_state(shape[axis], dtype, memory, mean, 0.0 if training else 1.0)
    x = (torch.randn(shape, dtype=torch.float64) * 1.5 + mean).to(memory.device, TYPES[dtype])
    dy = torch.randn(shape).to(memory.device, TYPES[dtype])
    # The reference sees data without their mean, exactly: float64 would lose digits to it too.
    near = x.double() - mean
    nearby = {**state, "running_mean": state["running_mean"].double() - mean}
    if chosen["relu"]:  # elements at the kink, where rounding decides, take no part
        dy[reference(near, dy, nearby, chosen)["z"].abs() < 1e-3] = 0
    want = reference(near, dy, nearby, chosen)
    terms = reference(near, dy, {**nearby, "flag": torch.ones(1)}, chosen)["dx"].abs().max()
    outputs = forward(operator, memory, x, state, chosen)
    gradients = backward(operator, memory, dy, x, state, outputs, chosen)
    want["running_mean"] += mean
    got = {"y": outputs.y, **gradients._asdict(), **state}
    sums = (x.numel() / shape[axis]) ** 0.5  # of terms that cancel
    floor = {"dx": float(terms), "dgamma": sums, "dbeta": sums}
    exact = CLOSE["float32" if dtype == "float16" else dtype]
    found = {}
    for name in ("y", "dx", "dgamma", "dbeta", "running_mean", "running_var"):
        scale = max(float(want[name].abs().max()), floor.get(name, 0.0), 1e-30)
        error = float((got[name].double() - want[name]).abs().max()) / scale
        found[name] = error / (CLOSE[dtype] if name in ("y", "dx") else exact)
    return found


def check_numbers(operator: Operator, memory: TorchMemory) -> tuple[list[str], int]:
    """Return rows of the table, and how many results are wrong."""
    rows, wrong = ["| type | options | largest error / allowed | where |", "| - | - | - | - |"], 0
    for dtype in TYPES:
        for options in OPTIONS:
            if "mean" in options and dtype == "float16":
                continue  # it does not hold 1e5
            worst, where = 0.0, "-"
            for shape, axis in SHAPES:
                for name, error in errors(operator, memory, shape, axis, dtype, **options).items():
                    wrong += not error <= 1
                    if not error <= worst:
                        worst, where = error, f"{name} of {shape}, axis {axis}"
            label = ", ".join(f"{k}={v}" for k, v in options.items()) or "-"
            rows.append(f"| {dtype} | {label} | {worst:.2f} | {where} |")
    return rows, wrong


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = 15) -> float:
    """Return the median time of a call on the device."""
    times = []
    for _ in range(3):
        call()
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
    return statistics.median(times)


def speed_rows(
    operator: Operator, memory: TorchMemory, mebibytes: list[float], dtype: str
) -> Iterator[str]:
    """Yield rows: bandwidth of a copy, and of forward and backward, ours and PyTorch's."""
    device, size = memory.device, torch.empty(0, dtype=TYPES[dtype]).element_size()
    yield (
        "| type, layout | MiB | copy GB/s | "
        + " | ".join(f"{kind} GB/s | of copy | torch GB/s | torch / ours" for kind in PASSES)
        + " |"
    )
    yield "| - " * 11 + "|"
    for layout, axis in (("NCHW", 1), ("NHWC", 3)):
        for mebi in mebibytes:
            samples = max(int(mebi * 2**20 / size / (64 * 56 * 56)), 1)
            shape = (samples, 64, 56, 56) if axis == 1 else (samples, 56, 56, 64)
            x, dy = (torch.randn(shape, device=device).to(TYPES[dtype]) for _ in range(2))
            state = make_state(64, dtype, memory, 0.0, 0.0)
            options = {"axis": axis}
            out, into = outputs_for(operator, memory, x, options), gradients_for(memory, x, state)
            nbytes = x.numel() * size
            copy = 2 * nbytes / seconds(partial(out.y.copy_, x), device) / 1e9
            calls = (
                partial(forward, operator, memory, x, state, options, out),
                partial(backward, operator, memory, dy, x, state, out, options, into),
            )
            ours = [seconds(call, device) for call in calls]
            theirs = torch_seconds(x, dy, state, axis, device)
            cells = [f"{dtype}, {layout}", f"{nbytes / 2**20:.1f}", f"{copy:.0f}"]
            for passes, mine, other in zip(PASSES.values(), ours, theirs):
                rate = passes * nbytes / mine / 1e9
                cells += [f"{rate:.0f}", f"{rate / copy:.2f}"]
                cells += [f"{passes * nbytes / other / 1e9:.0f}", f"{other / mine:.2f}"]
            yield "| " + " | ".join(cells) + " |"


def torch_seconds(
    x: Any, dy: Any, state: dict[str, Any], axis: int, device: torch.device
) -> tuple[float, float]:
    """Return the times of PyTorch's forward and backward on the same memory."""
    a, da = (v.movedim(3, 1) if axis == 3 else v for v in (x, dy))  # channels_last if NHWC
    a = a.detach().requires_grad_()
    gamma, beta = (state[name].clone().requires_grad_() for name in ("gamma", "beta"))
    mean, variance = state["running_mean"].clone(), state["running_var"].clone()

    def call() -> Any:
        return torch.nn.functional.batch_norm(a, mean, variance, gamma, beta, True, 0.1, 1e-5)

    ahead = seconds(call, device)
    y = call()
    back = seconds(lambda: torch.autograd.grad(y, (a, gamma, beta), da, retain_graph=True), device)
    return ahead, back


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", type=Path, default=KIT, help="what make gpu-kit made")
    parser.add_argument("--device", default="cuda", help="cpu: with a stand-in for the driver")
    parser.add_argument("--mebibytes", type=float, nargs="*", default=[1, 4, 16, 32, 128, 512])
    parser.add_argument("--types", nargs="*", choices=TYPES, default=["float32", "float16"])
    parser.add_argument("--out", type=Path, help="write the tables to this file, too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    memory, start = TorchMemory(device), time.perf_counter()
    name = "a stand-in on a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    lines = [f"# scratchbn on {name}", "", f"PyTorch {torch.__version__}", ""]
    operator = load(arguments.kit, device)
    rows, wrong = check_numbers(operator, memory)
    lines += ["## Numbers", "", *rows, "", f"{wrong} results are wrong.", "", "## Speed", ""]
    for dtype in arguments.types:
        lines += [*speed_rows(operator, memory, arguments.mebibytes, dtype), ""]
    lines.append(f"{time.perf_counter() - start:.0f} s in all.")
    text = os.linesep.join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + os.linesep)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
