"""What is compared: ways to normalize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import scratchbn
from scratchbn import ScratchBatchNorm

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn
from mxnet.gluon.contrib.nn import Identity

WORKS = ("train", "inference", "folded")
REFERENCE = "builtin"
TORCH = {"torch": "PyTorch, eager", "torch-folded": "PyTorch, norms fused by torch.fx"}


class Textbook(nn.BatchNorm):
    """Algorithm 1 as one writes it down on first reading: means and broadcasts, no view, no shift.

    It has the built-in's Parameters and never moves the running statistics. Its rank is that of its
    first call, which must be eager, and its mode that of the call it is traced in.
    """

    def _alias(self) -> str:
        return "batchnorm"  # the built-in's prefix: parameters are copied by name

    def infer_shape(self, x: Any) -> None:
        """Take the number of channels from an input."""
        for parameter in self.params.values():
            parameter.shape = (x.shape[self._kwargs["axis"]],)

    def hybrid_forward(
        self, F: Any, x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any
    ) -> Any:
        """Normalize a batch; `F` is ``mxnet.nd`` or ``mxnet.sym``."""
        axis, epsilon = self._kwargs["axis"], self._kwargs["eps"]
        if F is mx.nd:
            self._channel = tuple(-1 if i == axis % x.ndim else 1 for i in range(x.ndim))
        if autograd.is_training():
            over = {"axis": axis, "exclude": True, "keepdims": True}
            mean = F.mean(x, **over)
            variance = F.mean(F.square(F.broadcast_sub(x, mean)), **over)
        else:
            mean, variance = (v.reshape(self._channel) for v in (running_mean, running_var))
        x_hat = F.broadcast_div(F.broadcast_sub(x, mean), F.sqrt(variance + epsilon))
        scaled = F.broadcast_mul(x_hat, gamma.reshape(self._channel))
        return F.broadcast_add(scaled, beta.reshape(self._channel))


def _no_norm(**_options: Any) -> Any:
    return Identity()


@dataclass(frozen=True)
class Entry:
    """A way to normalize: what makes the layer, a legend, and where and how it takes part.

    A net is traced in scratchbn's `backend`; one that names a `file` runs as it is written there:
    'folded' by ``export_inference``, 'shared' by ``write_inference_symbol``.
    """

    norm: Callable[..., Any]
    about: str
    backend: str | None = None
    file: str = ""
    works: tuple[str, ...] = ("train", "inference")


ENTRIES = {
    REFERENCE: Entry(nn.BatchNorm, "`nn.BatchNorm`, live", works=WORKS),
    "control": Entry(nn.BatchNorm, "the same again: how far equal things differ", works=WORKS),
    "none": Entry(_no_norm, "no normalization: the ceiling", works=WORKS),
    "textbook": Entry(Textbook, "means and broadcasts, without running averages"),
    "portable": Entry(ScratchBatchNorm, "scratchbn from stock operators", "portable"),
    "native": Entry(ScratchBatchNorm, "scratchbn's compiled kernel", "native"),
    "auto": Entry(ScratchBatchNorm, "scratchbn as it comes", "auto"),
    "file": Entry(
        ScratchBatchNorm,
        "what `write_inference_symbol` writes, imported",
        "portable",
        file="shared",
        works=("inference",),
    ),
    "builtin-folded": Entry(
        nn.BatchNorm, "`nn.BatchNorm` through `export_inference`", file="folded", works=("folded",)
    ),
    "folded": Entry(
        ScratchBatchNorm,
        "scratchbn through `export_inference`",
        "portable",
        file="folded",
        works=("folded",),
    ),
}
ABOUT = {**{name: entry.about for name, entry in ENTRIES.items()}, **TORCH}


def missing_backend(name: str) -> str | None:
    """Return why an entry's backend cannot be used here, or None."""
    backend = ENTRIES[name].backend
    if backend is None:
        return None
    try:
        with scratchbn.use_backend(backend):
            return None
    except scratchbn.BackendError as error:
        return " ".join(str(error).split())
