"""Fourth pass: fold norms into the weights, or the norm, before them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .._ir import Node, Output
from .._report import Outcome
from .state import Lowering, Norm, rounded
from .weights import fused_weights

_PRODUCERS = {"Convolution", "Deconvolution", "FullyConnected"}


def fold(lowering: Lowering, norms: list[Norm]) -> list[tuple[Norm, str]]:
    """Fold norms into what is before them; return the others, each with the reason."""
    uses = lowering.graph.uses()
    remaining: dict[Node, tuple[Norm, str]] = {}
    replacements: dict[Output, Output] = {}
    computes: dict[Node, Node] = {}
    for norm in norms:
        source = norm.node.inputs[0]
        while source in replacements:
            source = replacements[source]
        norm.node.inputs[0] = source
        producer = source.node
        merging = producer in remaining
        if merging:
            reason = _merge(remaining[producer][0], norm, uses[producer])
        else:
            reason = _obstacle(lowering, producer, norm, uses)
            reason = reason or _fuse(lowering, producer, norm, uses)
        if reason is not None:
            remaining[norm.node] = norm, reason
            continue
        word = "merged" if merging else "folded"
        lowering.folded.append(Outcome(norm.node.name, f"{word} into {producer.name}"))
        result = norm.with_relu(source) if norm.relu and not merging else source
        uses[producer] = 1
        uses[result.node] = uses[norm.node]
        replacements[Output(norm.node)] = result
        computes[norm.node] = result.node
    for head, name in zip(lowering.graph.heads, lowering.outputs):
        if head.node in computes:  # programs find outputs by name
            computes[head.node].name = name
    lowering.graph.replace(replacements)
    return list(remaining.values())


def _merge(first: Norm, second: Norm, uses: int) -> str | None:
    """Merge two norms in a row into the first, or return why not."""
    if first.relu:
        return f"a relu lies between {first.node.name} and it"
    if uses > 1:
        return f"the output of {first.node.name} is used {uses} times"
    if first.channel_axis() != second.channel_axis():
        return f"{first.node.name} has axis {first.axis} and it has axis {second.axis}"
    first.shift = second.scale * first.shift + second.shift
    first.scale = second.scale * first.scale
    first.original = None
    first.relu = second.relu
    return None


def _obstacle(lowering: Lowering, producer: Node, norm: Norm, uses: Counter[Node]) -> str | None:
    """Say why a norm cannot be folded into the node before it, if that is so."""
    name = producer.name
    if producer.is_variable:
        return f"its input is {name}, not a convolution or dense layer"
    if producer.op not in _PRODUCERS:
        return f"it follows {name} ({producer.op})"
    if producer in (head.node for head in lowering.graph.heads):
        return f"the output of {name} is an output of the graph"
    if uses[producer] > 1:
        return f"the output of {name} is used {uses[producer]} times"
    if not _same_axis(producer, norm):
        return f"axis {norm.axis} is not the channel axis of {name}"
    for parameter in (source.node for source in producer.inputs[1:]):
        if parameter.name not in lowering.values or not parameter.is_variable:
            return f"{parameter.name} is not a parameter"
        if uses[parameter] > 1:
            return f"{parameter.name} is used by several layers"
    return None


def _same_axis(producer: Node, norm: Norm) -> bool:
    """Tell whether a norm's axis is the one that the weights of `producer` belong to."""
    if producer.op == "FullyConnected" and not producer.flag("flatten", True):
        last = -1 if norm.rank is None else norm.rank - 1
        return norm.channel_axis() == last
    rank = 2 + len(producer.integers("kernel"))
    layout = producer.attrs.get("layout", "None")
    axis = 1 if layout == "None" else layout.index("C")
    return norm.axis % rank == axis and (axis == 1 or producer.op == "Convolution")


def _fuse(lowering: Lowering, producer: Node, norm: Norm, uses: Counter[Node]) -> str | None:
    """Fold a norm into the weights of the node before it, or return why not."""
    names = [source.node.name for source in producer.inputs[1:]]
    weight = lowering.value(names[0])
    bias = lowering.value(names[1]) if len(names) > 1 else None
    groups, transposed = int(producer.attrs.get("num_group", 1)), producer.op == "Deconvolution"
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if channels != len(norm.scale):
        raise ValueError(
            f"parameters do not match: {names[0]!r} of shape {weight.shape} has {channels} "
            f"output channels, {norm.node.name!r} has {len(norm.scale)}"
        )
    dtype = np.dtype(lowering.values[names[0]].dtype)
    fused = fused_weights(weight, bias, norm.scale, norm.shift, groups, transposed)
    arrays = [rounded(value, dtype) for value in fused]
    if any(array is None for array in arrays):
        return f"the folded weights of {producer.name} do not fit {dtype.name}"
    if bias is None:
        source = lowering.variable(f"{names[0].removesuffix('_weight')}_bias", arrays[1])
        producer.inputs.append(source)
        uses[source.node] += 1
    lowering.values.update(zip(names, arrays))
    producer.attrs["no_bias"] = "False"
    return None
