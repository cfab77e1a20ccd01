"""What is timed: nets and single norm layers, with the shape of their data."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mxnet.gluon import nn

from models.extra import channels_last, conv1d
from models.lenet import lenet
from models.mlp import mlp

from .entries import ENTRIES

_CHANNELS = 64
_TEXTBOOK_MOST = 2**23  # bytes; above, a step of it takes seconds

NormLayer = Callable[..., Any]


@dataclass(frozen=True)
class Net:
    """A net, or a single norm `layer`, and the shape of its data.

    `build` takes what makes norm layers; a `layer` has no loss, no trainer, and a memory floor;
    `needs` names a package. One that is `eager` is not hybridized.
    """

    name: str
    build: Callable[[NormLayer], Any]
    shape: tuple[int, ...]
    layer: bool = False
    needs: str = ""
    eager: bool = False

    @property
    def nbytes(self) -> int:
        """The size of the data, float32."""
        return 4 * math.prod(self.shape)

    @property
    def label(self) -> str:
        """The name, and whether it is eager."""
        return f"{self.name}, eager" if self.eager else self.name

    @property
    def title(self) -> str:
        """The name, and the size of a single layer's data."""
        return f"{self.label}, {self.nbytes / 2**20:.3g} MiB" if self.layer else self.label

    def with_batch(self, size: int) -> Net:
        """Return the net on a batch of another size."""
        return replace(self, shape=(size, *self.shape[1:]))

    @property
    def missing(self) -> bool:
        """Whether the package it needs is not installed."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None

    def entries(self, work: str, chosen: Sequence[str]) -> list[str]:
        """Return those of the chosen entries that take part."""
        names = [name for name in chosen if work in ENTRIES[name].works]
        if self.eager:
            names = [name for name in names if not ENTRIES[name].file]  # a file is a graph
        if not self.layer:
            return names
        left_out = ("none", "textbook") if self.nbytes > _TEXTBOOK_MOST else ("none",)
        return [name for name in names if name not in left_out]


def _zoo_net(name: str, shape: tuple[int, ...]) -> Net:
    def build(norm: NormLayer) -> Any:
        from models.zoo import get_model  # gluoncv is not always there

        return get_model(name, norm, classes=10)

    return Net(name, build, shape, needs="gluoncv")


def _mlp(norm: NormLayer) -> Any:
    return mlp(norm, hidden=(512, 512), activation="relu", use_bias=True)


NETS = {
    net.name: net
    for net in (
        Net("lenet", lenet, (64, 1, 28, 28)),
        Net("mlp", _mlp, (256, 784)),
        _zoo_net("cifar_resnet20_v1", (32, 3, 32, 32)),
        _zoo_net("resnet18_v1", (8, 3, 112, 112)),
        _zoo_net("mobilenet0.5", (8, 3, 128, 128)),
        _zoo_net("densenet121", (2, 3, 224, 224)),
        Net("channels_last", channels_last, (32, 16, 16, 32)),
        Net("conv1d", conv1d, (32, 16, 256)),
    )
}
# A layout of a single norm layer: the shape of a sample, and the channel axis.
LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "layer_nchw": ((_CHANNELS, 28, 28), 1),
    "layer_nhwc": ((28, 28, _CHANNELS), -1),
    "layer_2d": ((512,), 1),
}


def single_layer(layout: str, nbytes: int) -> Net:
    """Return a single norm layer on data of about `nbytes`; layouts are those of `LAYOUTS`."""
    sample, axis = LAYOUTS[layout]
    batch = max(2, round(nbytes / (4 * math.prod(sample))))

    def build(norm: NormLayer) -> Any:
        net = nn.HybridSequential()
        with net.name_scope():
            net.add(norm(axis=axis, in_channels=sample[axis % (len(sample) + 1) - 1]))
        return net

    return Net(layout, build, (batch, *sample), layer=True)
