"""Activations with parameters, softmax under its many names, and losses, which are heads."""

from __future__ import annotations

from math import prod, sqrt

from .._emitter import Emitter
from .registry import translates


@translates("LeakyReLU")
def leaky(t: Emitter) -> str:
    """Pass what is positive; what is negative depends on the kind."""
    kind, x = t.attributes.text("act_type"), t.inputs[0]
    if kind == "prelu":
        slope = t.inputs[1]
        if t.tensors[1].rank == 1 and t.tensors[0].rank > 2:
            slope = t.per_channel(slope, 1, t.tensors[0].rank)
        return t.add("PRelu", x, slope)
    if kind == "elu":
        return t.add("Elu", x, alpha=t.attributes.number("slope"))
    if kind == "selu":
        return t.add("Selu", x)
    if kind == "gelu":
        error = t.add("Erf", t.add("Mul", x, t.constant(1 / sqrt(2))))
        half = t.add("Mul", x, t.constant(0.5))
        return t.add("Mul", half, t.add("Add", error, t.constant(1)))
    if kind == "rrelu":  # the mean of the range, once it does not train
        bounds = t.attributes.number("lower_bound"), t.attributes.number("upper_bound")
        return t.add("LeakyRelu", x, alpha=sum(bounds) / 2)
    return t.add("LeakyRelu", x, alpha=t.attributes.number("slope"))


@translates("SoftmaxActivation")
def softmax_activation(t: Emitter) -> str:
    """Softmax along the channels, or along the last axis."""
    axis = 1 if t.attributes.text("mode") == "channel" else -1
    return t.softmax(t.inputs[0], axis, t.tensors[0].rank)


@translates("SoftmaxOutput")
def softmax_output(t: Emitter) -> str:
    """Softmax along the channels, along the last axis, or along all axes but the first."""
    x, rank = t.inputs[0], t.tensors[0].rank
    if t.attributes.flag("multi_output"):
        return t.softmax(x, 1, rank)
    if t.attributes.flag("preserve_shape") or rank == 2:
        return t.softmax(x, -1, rank)
    flat = t.softmax(t.add("Flatten", x), 1, 2)
    return t.reshape(flat, t.out.shape)


@translates("softmax", "softmin", "log_softmax")
def softmax(t: Emitter) -> str:
    """Softmax along one axis, at a temperature."""
    if len(t.inputs) > 1:
        raise ValueError("lengths (use_length=True) are not supported")
    (x,) = t.inputs
    if t.out.dtype != t.dtype:
        x = t.cast(x, t.out.dtype)
    temperature = float(t.attributes.text("temperature") or 1)
    if t.node.op == "softmin":
        temperature = -temperature
    if temperature != 1:
        x = t.add("Div", x, t.constant(temperature, t.out.dtype))
    y = t.softmax(x, t.attributes.integer("axis"), t.tensors[0].rank)
    return t.add("Log", y) if t.node.op == "log_softmax" else y


@translates("LogisticRegressionOutput")
def logistic_output(t: Emitter) -> str:
    """Sigmoid of what the loss was trained on."""
    return t.add("Sigmoid", t.inputs[0])


@translates("LinearRegressionOutput", "MAERegressionOutput", "SVMOutput", "MakeLoss", "make_loss")
def output(t: Emitter) -> str:
    """Pass on what the loss was trained on."""
    return t.add("Identity", t.inputs[0])


@translates("Flatten")
def flatten(t: Emitter) -> str:
    """Join all axes but the first."""
    lengths = t.tensors[0].shape[1:]
    if t.tensors[0].rank > 1 and None not in lengths:
        return t.reshape(t.inputs[0], (t.out.shape[0], prod(n or 1 for n in lengths)))
    return t.add("Flatten", t.inputs[0])
