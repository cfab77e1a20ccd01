"""PyTorch's arrays for the operator, and PyTorch's batch normalization to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .operator import Tensor

TYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_NAMES = {kind: name for name, kind in TYPES.items()}


class TorchArrays:
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

    def put(self, values: Any) -> torch.Tensor:
        """Return an array with the values of one of NumPy."""
        return torch.from_numpy(values).to(self.device, copy=True)

    def take(self, array: torch.Tensor) -> Any:
        """Return an array's values as one of NumPy."""
        return array.detach().cpu().numpy()

    def draw(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return an array of random values."""
        return torch.randn(shape, device=self.device).to(TYPES[dtype])

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

    def reference(
        self, x: Any, dy: Any, state: dict[str, Any], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what PyTorch computes in float64 from arrays of NumPy, on any axis."""
        axis, training = options["axis"], float(state["flag"][0]) != 1
        near, back, *vectors = (
            torch.from_numpy(values).to(self.device).double()
            for values in (x, dy, *(state[name] for name in _STATE))
        )
        gamma, beta = (vector.requires_grad_() for vector in vectors[:2])
        wide = near.movedim(axis, 1).requires_grad_()
        over = [i for i in range(wide.dim()) if i != 1]
        rows = [1, -1] + [1] * (wide.dim() - 2)
        batch = (wide.mean(over), wide.var(over, unbiased=False))
        used = batch if training else vectors[2:]
        inverse = (used[1] + options["epsilon"]).rsqrt()
        z = (wide - used[0].view(rows)) * (inverse * gamma).view(rows) + beta.view(rows)
        y = z.clamp_min(0) if options["relu"] else z
        y.backward(back.movedim(axis, 1))
        keep = options["momentum"] if training else 1.0
        moved = (keep * old + (1 - keep) * new for old, new in zip(vectors[2:], used))
        results = {
            **{"y": y.movedim(1, axis), "dx": wide.grad.movedim(1, axis), "dgamma": gamma.grad},
            **{"dbeta": beta.grad, "z": z.movedim(1, axis)},
            **dict(zip(_STATE[2:], moved)),
        }
        return {name: self.take(value) for name, value in results.items()}


_STATE = ("gamma", "beta", "running_mean", "running_var")


class TorchPeer:
    """PyTorch's copy and batch normalization, which is cuDNN's where that is faster."""

    name = "torch"

    def copy(self, to: Any, source: Any) -> None:
        """Copy an array on the device."""
        to.copy_(source)

    def batch_norm(
        self, x: Any, dy: Any, state: dict[str, Any], axis: int
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return what computes a forward and a backward; channels_last if `axis` is the last."""
        a, da = (v.movedim(3, 1) if axis == 3 else v for v in (x, dy))
        a = a.detach().requires_grad_()
        gamma, beta = (state[name].clone().requires_grad_() for name in ("gamma", "beta"))
        mean, variance = state["running_mean"].clone(), state["running_var"].clone()

        def forward() -> Any:
            return torch.nn.functional.batch_norm(a, mean, variance, gamma, beta, True, 0.1, 1e-5)

        y = forward()

        def backward() -> Any:
            return torch.autograd.grad(y, (a, gamma, beta), da, retain_graph=True)

        return forward, backward
