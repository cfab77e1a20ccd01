"""Layers with weights: convolution of any rank, its transpose, dense layers."""

from __future__ import annotations

from math import ceil
from typing import Any

from .._emitter import Emitter
from .registry import translates

# Channels second; the others run on no CPU.
_LAYOUTS = (None, "NCW", "NCHW", "NCDHW")


def check_layout(t: Emitter) -> None:
    """Raise ValueError for a layout with the channels last."""
    layout = t.attributes.text("layout")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout {layout} has the channels last, which ONNX has not")


def window(t: Emitter) -> dict[str, Any]:
    """Return the attributes of a sliding window."""
    kernel = t.attributes.integers("kernel")
    lengths = kernel or t.tensors[1].shape[2:]
    return {
        "kernel_shape": list(lengths),
        "strides": list(t.attributes.integers("stride") or (1,) * len(lengths)),
        "dilations": list(t.attributes.integers("dilate") or (1,) * len(lengths)),
        "group": t.attributes.integer("num_group"),
    }


@translates("Convolution")
def convolution(t: Emitter) -> str:
    """Convolve."""
    check_layout(t)
    attrs = window(t)
    pad = t.attributes.integers("pad") or (0,) * len(attrs["kernel_shape"])
    return t.add("Conv", *t.inputs, pads=[*pad, *pad], **attrs)


@translates("Deconvolution")
def deconvolution(t: Emitter) -> str:
    """Convolve transposed."""
    check_layout(t)
    attrs = window(t)
    if any(t.attributes.integers("target_shape") or ()):
        raise ValueError("target_shape is not supported, state pad and adj instead")
    none = (0,) * len(attrs["kernel_shape"])
    pad = t.attributes.integers("pad") or none
    adjust = list(t.attributes.integers("adj") or none)
    return t.add("ConvTranspose", *t.inputs, pads=[*pad, *pad], output_padding=adjust, **attrs)


@translates("UpSampling")
def upsampling(t: Emitter) -> str:
    """Enlarge by repeating, or bilinearly: by a transposed convolution, with given weights."""
    scale = t.attributes.integer("scale")
    if t.attributes.text("sample_type") == "bilinear":
        kernel, pad = 2 * scale - scale % 2, ceil((scale - 1) / 2)
        return t.add(
            "ConvTranspose",
            *t.inputs,
            kernel_shape=[kernel] * 2,
            strides=[scale] * 2,
            pads=[pad] * 4,
            group=t.attributes.integer("num_filter"),
        )
    if len(t.inputs) > 1:
        raise ValueError("several inputs are not supported")
    scales = t.constant([1, 1, scale, scale], "float32")
    how: dict[str, Any] = {"mode": "nearest", "nearest_mode": "floor"}
    how["coordinate_transformation_mode"] = "asymmetric"
    region = "" if t.opset >= 13 else t.constant([], "float32")
    return t.add("Resize", t.inputs[0], region, scales, **how)


@translates("FullyConnected")
def dense(t: Emitter) -> str:
    """Multiply by a matrix all axes but the first, or the last axis alone."""
    x, weight, *bias = t.inputs
    if t.attributes.flag("flatten") or t.tensors[0].rank == 2:
        if t.tensors[0].rank != 2:
            x = t.add("Flatten", x)
        return t.add("Gemm", x, weight, *bias, transB=1)
    product = t.add("MatMul", x, t.add("Transpose", weight, perm=[1, 0]))
    return t.add("Add", product, *bias) if bias else product
