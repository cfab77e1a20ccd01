"""Fold a norm into what is before it: layers with weights, another norm, and what lies between.

Between may be what commutes with one scale and one shift per channel: arithmetic with scalars,
which disappears as well, a concatenation of channels, and a reshape that keeps the channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..._graph.nodes import Node, Output
from .affine import SCALARS, Affine, arithmetic, keeps_channels
from .layers import check_parameters, fitting, on_channel_axis, set_weights
from .state import Lowering, Norm, Obstacle
from .weights import fused_weights

_PRODUCERS = {"Convolution", "Deconvolution", "FullyConnected"}


class Plan:
    """What has to change so that a norm is not needed any more; an Obstacle if nothing can.

    `norms` are the norms that disappear, several where one layer is called several times with the
    same norm after each call. `pending` are the norms that are still to be folded, `kept` those
    that cannot be.
    """

    def __init__(
        self,
        lowering: Lowering,
        norm: Norm,
        pending: Mapping[Node, Norm],
        kept: Mapping[Node, Norm],
    ) -> None:
        self.norms = [norm]
        self._lowering, self._pending, self._kept = lowering, pending, kept
        self._uses = lowering.graph.uses()
        self._layers: list[tuple[list[Node], list[Any]]] = []
        self._merged: list[tuple[Norm, Affine]] = []
        self._between: dict[Output, Output] = {}
        self._reach(norm.node.inputs[0], Affine(norm.scale, norm.shift, norm.axis, norm.rank))

    def carry_out(self) -> str:
        """Change the graph and its parameters; return what happened to the norm."""
        for nodes, arrays in self._layers:
            _set_weights(self._lowering, nodes, arrays)
        for norm, affine in self._merged:
            norm.shift = affine.scale * norm.shift + affine.shift
            norm.scale = affine.scale * norm.scale
            norm.original = None
        self._lowering.graph.replace(self._between)
        word = "folded" if self._layers else "merged"
        layers = [nodes[0].name for nodes, _ in self._layers]
        return f"{word} into {', '.join([*layers, *(norm.node.name for norm, _ in self._merged)])}"

    def _reach(self, output: Output, affine: Affine, *, reshaped: bool = False) -> None:
        """Plan to apply `affine` to an output, in what computes it."""
        node = output.node
        if node.is_variable:
            raise Obstacle(f"its input is {node.name}, not a convolution or dense layer")
        if node in self._kept:
            self._merge(self._kept[node], affine)
        elif node.op in _PRODUCERS:
            self._fuse(node, affine, reshaped)
        elif node.op in SCALARS:
            self._check_use(node)
            self._between[output] = node.inputs[0]
            self._reach(node.inputs[0], affine.after(*arithmetic(node)), reshaped=reshaped)
        elif node.op == "Concat" and affine.has_axis(node.integer("dim", 1)):
            self._split(node, affine, reshaped)
        elif keeps_channels(node) and affine.has_axis(1):
            self._check_use(node)
            inner = Affine(affine.scale, affine.shift, 1, None)
            self._reach(node.inputs[0], inner, reshaped=True)
        else:
            raise Obstacle(f"it follows {node.name} ({node.op})")

    def _check_use(self, node: Node) -> None:
        if node in (head.node for head in self._lowering.graph.heads):
            raise Obstacle(f"the output of {node.name} is an output of the graph")
        if self._uses[node] > 1:
            raise Obstacle(f"the output of {node.name} is used {self._uses[node]} times")

    def _split(self, node: Node, affine: Affine, reshaped: bool) -> None:
        """Plan for each input of a concatenation."""
        self._check_use(node)
        counts = [self._channels(source) for source in node.inputs]
        if None in counts or sum(filter(None, counts)) != len(affine.scale):
            raise Obstacle(f"it follows {node.name} ({node.op})")
        start = 0
        for source, count in zip(node.inputs, counts):
            self._reach(source, affine.part(start, start + (count or 0)), reshaped=reshaped)
            start += count or 0

    def _channels(self, output: Output) -> int | None:
        """Return how many channels an output has, where a norm can be folded."""
        node = output.node
        if node in self._kept:
            return len(self._kept[node].scale)
        if node.op in _PRODUCERS:
            return node.integer("num_hidden" if node.op == "FullyConnected" else "num_filter", 0)
        if node.op == "Concat":
            counts = [self._channels(source) for source in node.inputs]
            return None if None in counts else sum(filter(None, counts))
        known = node.op in SCALARS or keeps_channels(node)
        return self._channels(node.inputs[0]) if known else None

    def _merge(self, norm: Norm, affine: Affine) -> None:
        """Plan to change a norm that is computed anyway."""
        name = norm.node.name
        if norm.relu:
            raise Obstacle(f"a relu lies between {name} and it")
        self._check_use(norm.node)
        if not affine.has_axis(norm.channel_axis()):
            raise Obstacle(f"{name} has axis {norm.axis} and it has axis {affine.axis}")
        if len(norm.scale) != len(affine.scale):
            raise Obstacle(f"{name} has {len(norm.scale)} channels, it has {len(affine.scale)}")
        self._merged.append((norm, affine))

    def _fuse(self, node: Node, affine: Affine, reshaped: bool) -> None:
        """Plan to change the weights of a layer."""
        self._check_use(node)
        if not on_channel_axis(node, affine):
            raise Obstacle(f"axis {affine.axis} is not the channel axis of {node.name}")
        check_parameters(self._lowering, node)
        calls = self._calls(node)
        names = [source.node.name for source in node.inputs[1:]]
        weight = self._lowering.value(names[0])
        bias = self._lowering.value(names[1]) if len(names) > 1 else None
        groups, transposed = node.integer("num_group", 1), node.op == "Deconvolution"
        channels = weight.shape[1] * groups if transposed else weight.shape[0]
        if channels != len(affine.scale):
            if reshaped:
                raise Obstacle(f"between {node.name} and it, channels are mixed")
            raise ValueError(
                f"parameters do not match: {names[0]!r} of shape {weight.shape} has {channels} "
                f"output channels, {self.norms[0].node.name!r} has {len(affine.scale)}"
            )
        fused = fused_weights(weight, bias, affine.scale, affine.shift, groups, transposed)
        self._layers.append((calls, fitting(self._lowering, node, fused)))

    def _calls(self, node: Node) -> list[Node]:
        """Return the calls of a layer, each of which has the same norm after it."""
        parameters = node.inputs[1:]
        shared = [p.node for p in parameters if self._uses[p.node] > 1]
        if not shared:
            return [node]
        refusal = Obstacle(f"{shared[0].name} is used by several layers")
        norm = self.norms[0]
        calls = [n for n in self._lowering.graph.nodes() if n.inputs[1:] == parameters]
        if norm.node.inputs[0].node is not node or any(
            self._uses[p.node] != len(calls) for p in parameters
        ):
            raise refusal
        after = {n.inputs[0]: other for n, other in self._pending.items()}
        for call in calls:
            other = after.get(Output(call))
            same = (
                other is not None
                and _is_same(norm, other)
                and on_channel_axis(call, Affine(other.scale, other.shift, other.axis, other.rank))
            )
            alike = call.op == node.op and call.integer("num_group", 1) == node.integer(
                "num_group", 1
            )
            if not same or not alike or self._uses[call] > 1:
                raise refusal
            if other is not None and other is not norm:
                self.norms.append(other)
        return calls


def _set_weights(lowering: Lowering, nodes: list[Node], arrays: list[Any]) -> None:
    """Give the calls of a layer new weight and bias."""
    set_weights(lowering, nodes[0], arrays)
    for node in nodes[1:]:
        node.inputs[1:] = nodes[0].inputs[1:]
        node.attrs["no_bias"] = "False"


def _is_same(one: Norm, other: Norm) -> bool:
    return np.array_equal(one.scale, other.scale) and np.array_equal(one.shift, other.shift)
