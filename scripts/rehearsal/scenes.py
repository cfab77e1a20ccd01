"""What is run on the rehearsal's GPU for the checks: ``python -m rehearsal.scenes NAME OPTIONS``.

Prints JSON on the last line; the stand-ins write the journal beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from collections.abc import Callable
from typing import Any

import scratchbn
from scratchbn.variants import BatchRenorm, GhostBatchNorm

# isort: split
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

GPU = mx.gpu(0)
# name: (class, options) of the layers that a journal is kept of.
LAYERS: dict[str, tuple[type, dict[str, Any]]] = {
    "plain": (scratchbn.ScratchBatchNorm, {}),
    "momentum None": (scratchbn.ScratchBatchNorm, {"momentum": None}),
    "axis -1": (scratchbn.ScratchBatchNorm, {"axis": -1}),
    "axis 0": (scratchbn.ScratchBatchNorm, {"axis": 0}),
    "no scale": (scratchbn.ScratchBatchNorm, {"scale": False}),
    "no center": (scratchbn.ScratchBatchNorm, {"center": False}),
    "neither": (scratchbn.ScratchBatchNorm, {"scale": False, "center": False}),
    "unbiased": (scratchbn.ScratchBatchNorm, {"unbiased_variance": True}),
    "epsilon 0": (scratchbn.ScratchBatchNorm, {"epsilon": 0}),
    "fused ReLU": (scratchbn.ScratchBatchNormReLU, {}),
    "BatchRenorm": (BatchRenorm, {}),
    "BatchRenorm, momentum None": (
        BatchRenorm,
        {"momentum": None, "epsilon": 0, "unbiased_variance": True},
    ),
    "Ghost": (GhostBatchNorm, {"ghost_size": 3}),
    "Ghost, axis -1": (
        GhostBatchNorm,
        {"ghost_size": 3, "axis": -1, "unbiased_variance": True},
    ),
}
# name: (shape, axis of the channels), as they occur in nets.
LAYOUTS = {"NCHW": ((4, 16, 14, 14), 1), "NHWC": ((4, 14, 14, 16), 3), "dense": ((128, 64), 1)}
HYBRID: dict[str, dict[str, bool]] = {
    "hybrid": {},
    "static_alloc": {"static_alloc": True},
    "static_shape": {"static_alloc": True, "static_shape": True},
}


class Several(nn.HybridBlock):
    """Layers that all normalize one array; the results are added."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.layers = [make(name) for _ in range(count)]
        for layer in self.layers:
            self.register_child(layer)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Add the results."""
        return sum(layer(x) for layer in self.layers[1:]) + self.layers[0](x)


class Twice(nn.HybridSequential):
    """A layer that is called on its own result."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Call the only child twice."""
        return self[0](self[0](x * 2))


def mark(name: str) -> None:
    """Wait for all that was launched, and write a mark into the journal."""
    mx.nd.waitall()
    path = os.environ.get("SCRATCHBN_REHEARSAL_JOURNAL")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"MARK\t{name}\n")


def address(values: Any) -> int:
    """Return where an array's values are."""
    pointer = ctypes.c_void_p()
    mx.base.check_call(mx.base._LIB.MXNDArrayGetData(values.handle, ctypes.byref(pointer)))
    return int(pointer.value or 0)


def make(name: str, **more: Any) -> Any:
    """Make a layer of the list."""
    kind, options = LAYERS[name]
    return kind(**options, **more)


def batch(shape: tuple[int, ...], dtype: str) -> Any:
    """Return data on the GPU with a gradient, of the kind of array in use."""
    zeros = mx.np.zeros if mx.util.is_np_array() else mx.nd.zeros
    x = zeros(shape, ctx=GPU, dtype=dtype)
    x.attach_grad()
    return x


def step(net: Any, x: Any, name: str) -> None:
    """Train a step; the journal has marks before and after the forward and the backward."""
    mark(f"{name}: forward")
    with autograd.record():
        y = net(x)
    mark(f"{name}: backward")
    y.backward()
    mark(f"{name}: end")


def ready(net: Any, dtype: str, mode: str) -> Any:
    """Initialize a net on the GPU, in a mode that ``HYBRID`` or "eager" names."""
    net.initialize(ctx=GPU)
    net.cast(dtype)
    if mode != "eager":
        net.hybridize(**HYBRID[mode])
    return net


def variants(dtype: str, mode: str) -> dict[str, Any]:
    """Every layer of the list: three steps and an inference; where its statistics are."""
    found: dict[str, Any] = {}
    nets: dict[str, tuple[Any, Any]] = {
        name: (layer, layer) for name in LAYERS for layer in [make(name)]
    }
    for name in ("plain", "momentum None", "BatchRenorm"):
        layer, net = make(name), Twice()
        net.add(layer)
        nets[f"{name}, twice"] = (net, layer)
    for name, (net, layer) in nets.items():
        try:
            ready(net, dtype, mode)
            x = batch((8, 3, 6, 6), dtype)
            for k in range(3):
                step(net, x, f"{name}, step {k}")
            net(x)
            mark(f"{name}: inference")
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error)[-400:]}"}
            continue
        parameters = ("running_mean", "running_var", "num_batches")
        held = [p for p in parameters if hasattr(layer, p)]
        found[name] = {p: address(getattr(layer, p).data(GPU)) for p in held}
    return found


def shared(dtype: str, mode: str) -> dict[str, Any]:
    """Two and three layers on one array: in inference, in training, recorded."""
    found = {}
    for kind in ("plain", "BatchRenorm", "fused ReLU", "momentum None"):
        for count in (2, 3):
            for scope in ("inference", "train_mode", "record"):
                net = ready(Several(kind, count), dtype, mode)
                x = batch((4, 3, 5, 5), dtype)
                try:
                    if scope == "record":
                        step(net, x, "shared")
                    elif scope == "train_mode":
                        with autograd.train_mode():
                            net(x)
                    else:
                        net(x.copy())
                    mx.nd.waitall()
                except Exception as error:
                    found[f"{count} x {kind}, {scope}"] = str(error)[-300:]
    return found


def products(dtype: str, mode: str) -> dict[str, Any]:
    """Train a step with arrays of the kind in use; the journal has each product's math mode."""
    for shape in ((8, 3, 6, 6), (8, 3)):
        layer = ready(make("plain"), dtype, mode)
        step(layer, batch(shape, dtype), str(shape))
        layer(batch(shape, dtype))
    mx.nd.waitall()
    return {}


def empty(dtype: str, mode: str) -> dict[str, Any]:
    """Batches without elements, under np_shape: training, backward, inference."""
    behind = [(0, 3), (0, 3, 2), (4, 3, 0), (0, 3, 4, 4)]
    shapes = dict.fromkeys(("plain", "fused ReLU", "BatchRenorm", "momentum None"), behind)
    shapes.update({"axis -1": [(0, 3), (4, 0, 3)], "Ghost": [(4, 3, 0)]})
    for name, listed in shapes.items():
        for shape in listed:
            layer = ready(make(name, in_channels=3), dtype, mode)
            x = batch(shape, dtype)
            print(f"{name} {shape}", flush=True)
            step(layer, x, name)
            layer(x)
            mx.nd.waitall()
    return {}


def launches(dtype: str, mode: str) -> dict[str, Any]:
    """Nets of one to three layers, ours and the built-in, in every layout, for three steps."""
    for layout, (shape, axis) in LAYOUTS.items():
        for kind, layer in (("ours", scratchbn.ScratchBatchNorm), ("built-in", nn.BatchNorm)):
            for count in (1, 2, 3):
                net = nn.HybridSequential()
                net.add(*(layer(axis=axis) for _ in range(count)))
                ready(net, dtype, mode)
                x = batch(shape, dtype)
                for k in range(3):
                    step(net, x, f"{count} x {kind}, {layout}, step {k}")
    return {layout: shape for layout, (shape, _) in LAYOUTS.items()}


def lenet(dtype: str, mode: str) -> dict[str, Any]:
    """Train LeNet for three steps with a Trainer."""
    net = nn.HybridSequential()
    net.add(nn.Conv2D(20, 5), make("plain"), nn.Activation("relu"), nn.MaxPool2D(2, 2))
    net.add(nn.Conv2D(50, 3), make("plain"), nn.Activation("relu"), nn.MaxPool2D(2, 2))
    net.add(nn.Flatten(), nn.Dense(128), make("plain"), nn.Activation("relu"), nn.Dense(10))
    ready(net, dtype, mode)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01})
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    x = batch((16, 1, 28, 28), dtype)
    labels = mx.nd.array(np.arange(16) % 10, ctx=GPU)
    for k in range(3):
        mark(f"step {k}")
        with autograd.record():
            value = loss(net(x), labels)
        value.backward()
        trainer.step(16)
        mark(f"step {k}: end")
    return {}


SCENES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    scene.__name__: scene for scene in (variants, shared, products, empty, launches, lenet)
}


def main() -> None:
    """Run the scene that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scene", choices=sorted(SCENES))
    parser.add_argument("--backend", default="portable")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mode", choices=("eager", *HYBRID), default="hybrid")
    parser.add_argument("--numpy", action="store_true", help="NumPy semantics, as npx.set_np sets")
    options = parser.parse_args()
    if options.numpy:
        mx.npx.set_np()
    scratchbn.set_backend(options.backend)
    found = SCENES[options.scene](options.dtype, options.mode)
    mx.nd.waitall()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
