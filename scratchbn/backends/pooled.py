"""What the compiled operator puts out in plain order is pooled in the order of oneDNN's own.

On plain arrays oneDNN pools by a loop that takes several times as long: the max pooling of
ResNet-18, with a batch of 8, 41 ms and not 7. A 1x1 depthwise convolution with ones changes the
order and no value, forward or backward.
"""

from __future__ import annotations

from typing import NamedTuple

import mxnet as mx

from .._graph.nodes import Graph, Node, Output
from ..native import OPERATOR


class Plain(NamedTuple):
    """What is known of an array in plain order: its channels, and as many ones of its type."""

    channels: int
    ones: Output


def block_before_pooling(graph: Graph) -> bool:
    """Put a convolution with ones before each 2-D pooling of what the operator put out.

    Where the number of channels cannot be seen in the graph, or is none that oneDNN has an order
    of its own for, the pooling stays as it is. Returns whether one did not.
    """
    if mx.context.num_gpus():  # there nothing has an order of its own
        return False
    pooled = [node for node in graph.nodes() if _is_pooling(node)]
    found = [(node, _plain(node.inputs[0])) for node in pooled]
    changed = False
    for number, (node, plain) in enumerate(found):
        if plain is not None and plain.channels % 8 == 0:
            node.inputs[0] = _convolved(node.inputs[0], plain, f"pooling{number}_blocked")
            changed = True
    return changed


def _is_pooling(node: Node) -> bool:
    """Tell whether a node pools windows of two axes by oneDNN; a global one costs little."""
    return (
        node.op == "Pooling"
        and len(node.integers("kernel")) == 2
        and node.attrs.get("pool_type", "max") in ("max", "avg")
        and _has_channels_second(node)
        and not node.flag("global_pool", False)
    )


def _convolved(source: Output, plain: Plain, name: str) -> Output:
    shape = {"shape": "(-1, 1, 1, 1)"}
    weight = Output(Node("Reshape", f"{name}_weight", shape, [plain.ones]))
    channels = str(plain.channels)
    attrs = {"kernel": "(1, 1)", "num_filter": channels, "num_group": channels, "no_bias": "True"}
    return Output(Node("Convolution", name, attrs, [source, weight]))


def _plain(source: Output) -> Plain | None:
    """Return what is known of an output in plain order; None if it may have another, or of none."""
    node = source.node
    if node.op in ("Activation", "LeakyReLU", "relu"):
        return _plain(node.inputs[0])
    if node.op == "Concat" and node.integer("dim", 1) == 1:
        return _joined(node)
    kernel = node.inputs[0].node if node.op == "reshape_like" else node
    if kernel is node or kernel.op != OPERATOR or kernel.attrs["axis"] != "1":
        return None
    before = kernel.inputs[0].node
    while before.op in ("_copy", "Reshape"):
        before = before.inputs[0].node
    if before.op != "Convolution" or not _has_channels_second(before):
        return None
    ones = Output(Node("ones_like", f"{node.name}_ones", {}, [node.inputs[1]]))
    return Plain(before.integer("num_filter", 0), ones)


def _joined(concat: Node) -> Plain | None:
    """Return what is known of arrays side by side, each of them plain, or pooled from what is."""
    parts = []
    for source in concat.inputs:
        part = _plain(source.node.inputs[0] if _is_pooling(source.node) else source)
        if part is None:
            return None
        parts.append(part)
    attrs = {"dim": "0", "num_args": str(len(parts))}
    ones = Node("Concat", f"{concat.name}_ones", attrs, [part.ones for part in parts])
    return Plain(sum(part.channels for part in parts), Output(ones))


def _has_channels_second(node: Node) -> bool:
    return node.attrs.get("layout", "None") in ("None", "NCHW")
