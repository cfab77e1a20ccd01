"""The benchmark's nets in PyTorch, run on request: one JSON object a line in, one out.

``scripts/benchmark.py --against torch`` starts this program with a Python that has torch; it needs
neither MXNet nor scratchbn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

torch: Any = import_module("torch")
nn: Any = torch.nn

_WARM_UP = 3


class _Block(nn.Module):
    """Two convolutions around a shortcut: BasicBlockV1 of GluonCV."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(before, channels, 3, stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            _convolution(channels, channels, 3, 1),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or before != channels:
            self.shortcut = nn.Sequential(
                _convolution(before, channels, 1, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Any) -> Any:
        return torch.relu(self.body(x) + self.shortcut(x))


class _MeanOver(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Any) -> Any:
        return x.mean(self.axis)


def _convolution(before: int, channels: int, kernel: int, stride: int) -> Any:
    return nn.Conv2d(before, channels, kernel, stride, kernel // 2, bias=False)


def _stages(before: int, channels: Sequence[int], blocks: int) -> list[Any]:
    layers = []
    for i, n in enumerate(channels):
        for j in range(blocks):
            layers.append(_Block(before, n, 2 if i and not j else 1))
            before = n
    return layers


def _lenet(shape: Sequence[int]) -> Any:
    return nn.Sequential(
        *(nn.Conv2d(shape[1], 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)),
    )


def _mlp(shape: Sequence[int]) -> Any:
    return nn.Sequential(
        *(nn.Linear(shape[1], 512), nn.BatchNorm1d(512), nn.ReLU()),
        *(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10)),
    )


def _cifar_resnet20(shape: Sequence[int]) -> Any:
    return nn.Sequential(
        *(_convolution(shape[1], 16, 3, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *_stages(16, (16, 32, 64), 3),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def _resnet18(shape: Sequence[int]) -> Any:
    return nn.Sequential(
        *(_convolution(shape[1], 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
        *_stages(64, (64, 128, 256, 512), 2),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)),
    )


def _channels_last(shape: Sequence[int]) -> Any:
    positions = shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(0, 2),
        *(nn.Linear(shape[3], 64), nn.BatchNorm1d(64), nn.ReLU()),
        *(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()),
        *(nn.Unflatten(0, (-1, positions)), _MeanOver(1), nn.Linear(64, 10)),
    )


def _conv1d(shape: Sequence[int]) -> Any:
    return nn.Sequential(
        *(nn.Conv1d(shape[1], 32, 5, 2), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Conv1d(32, 64, 5, 2), nn.BatchNorm1d(64), nn.ReLU()),
        *(_MeanOver(2), nn.Linear(64, 10)),
    )


_NETS: dict[str, Callable[[Sequence[int]], Any]] = {
    "lenet": _lenet,
    "mlp": _mlp,
    "cifar_resnet20_v1": _cifar_resnet20,
    "resnet18_v1": _resnet18,
    "channels_last": _channels_last,
    "conv1d": _conv1d,
    "layer_nchw": lambda shape: nn.BatchNorm2d(shape[1]),
    "layer_nhwc": lambda shape: nn.BatchNorm2d(shape[3]),
    "layer_2d": lambda shape: nn.BatchNorm1d(shape[1]),
}


def _build(name: str, work: str, shape: Sequence[int]) -> tuple[Callable[[], Any], int]:
    """Return what does one step of a work, and how many numbers the net trains."""
    if name not in _NETS:
        raise ValueError(f"{name} is not among the nets for PyTorch")
    torch.manual_seed(0)
    net = _NETS[name](shape)
    count = sum(p.numel() for p in net.parameters())
    x = torch.randn(*shape)
    if name == "layer_nhwc":  # the same memory under torch's name for it
        x = x.permute(0, 3, 1, 2)
    if work != "train":
        net.eval()
        if work == "folded":
            net = import_module("torch.fx.experimental.optimization").fuse(net)

        def infer() -> None:
            with torch.inference_mode():
                net(x)

        return infer, count
    if name.startswith("layer_"):
        x.requires_grad_()
        dy = torch.randn_like(x)

        def layer_step() -> None:
            x.grad = None
            net.zero_grad()
            net(x).backward(dy)

        return layer_step, count
    labels = torch.arange(shape[0]) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()

    return step, count


def _sample(step: Callable[[], Any], steps: int) -> dict[str, float]:
    wall, process = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return {"seconds": time.perf_counter() - wall, "process": time.process_time() - process}


def main() -> None:
    """Answer requests until there are no more."""
    _answer(version=torch.__version__, threads=torch.get_num_threads())
    step: Callable[[], Any] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "run" and step is not None:
            _answer(**_sample(step, request["steps"]))
            continue
        step = None  # one net at a time
        try:
            step, count = _build(request["net"], request["work"], request["shape"])
            _sample(step, _WARM_UP)
            _answer(parameters=count)
        except (RuntimeError, ValueError) as error:
            _answer(error=f"{type(error).__name__}: {error}")


def _answer(**content: Any) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
