"""PyTorch's arrays for the operator, and PyTorch's batch normalization to compare with."""

from __future__ import annotations

from typing import Any

import torch

from .operator import Tensor

TYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_NAMES = {kind: name for name, kind in TYPES.items()}


class TorchMemory:
    """Arrays of PyTorch on a device; work is put on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._workspace = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def stream(self) -> int:
        """The current CUDA stream."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return an array whose content is anything."""
        return torch.empty(shape, dtype=TYPES[dtype], device=self.device)

    def tensor(self, array: torch.Tensor) -> Tensor:
        """Describe an array, which must be contiguous."""
        if not array.is_contiguous():
            raise ValueError(f"an array of shape {tuple(array.shape)} is not contiguous")
        return Tensor(array.data_ptr(), tuple(array.shape), _NAMES[array.dtype])

    def allocate(self, size: int) -> int:
        """Return workspace; the calls of one stream share it, as they run one after another."""
        if self._workspace.numel() < size:
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        return int(self._workspace.data_ptr())


def reference(x: Any, dy: Any, state: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return what PyTorch computes in float64 from the same numbers, on any axis."""
    axis, training = options["axis"], float(state["flag"]) != 1
    wide = x.double().movedim(axis, 1).requires_grad_()
    gamma, beta = (state[name].double().requires_grad_() for name in ("gamma", "beta"))
    mean, variance = state["running_mean"].double(), state["running_var"].double()
    over = [i for i in range(wide.dim()) if i != 1]
    rows = [1, -1] + [1] * (wide.dim() - 2)
    used = (wide.mean(over), wide.var(over, unbiased=False)) if training else (mean, variance)
    inverse = (used[1] + options["epsilon"]).rsqrt()
    z = (wide - used[0].view(rows)) * (inverse * gamma).view(rows) + beta.view(rows)
    y = z.clamp_min(0) if options["relu"] else z
    y.backward(dy.double().movedim(axis, 1))
    keep = options["momentum"] if training else 1.0
    return {
        "y": y.detach().movedim(1, axis),
        "dx": wide.grad.movedim(1, axis),
        "dgamma": gamma.grad,
        "dbeta": beta.grad,
        "running_mean": keep * mean + (1 - keep) * used[0].detach(),
        "running_var": keep * variance + (1 - keep) * used[1].detach(),
        "z": z.detach().movedim(1, axis),
    }
