"""The hooks that reach every training forward of a norm layer, in eager code and in graphs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, SymbolBlock

from .._graph.arrays import is_symbol
from .._hidden import hidden_norms, imported
from .._net import accepts, blocks_of, norm_layers, runs_own_graph
from .measure import MeasuredBatch
from .twin import GraphTwin

Array = Any
Measured = dict[Any, list[MeasuredBatch]]


class Observer:
    """Measures the norm layers of a net in each forward that is recorded in training mode."""

    def __init__(self, blocks: dict[Block, str]) -> None:
        self.is_on = True
        layers = [layer for layer, _ in norm_layers(blocks)]
        hidden = hidden_norms(blocks)
        self.layers: list[Any] = [*layers, *hidden]
        self._measured: Measured = defaultdict(list)
        self._twins: dict[HybridBlock, GraphTwin] = {}
        self._hooks = [layer.register_forward_hook(self._after_layer) for layer in layers]
        graphs = {block for block in imported(blocks) if hidden_norms({block: ""})}
        for block in _parents(blocks, set(layers) | graphs):
            self._hooks.append(block.register_forward_pre_hook(self._before_block))

    def take(self) -> Measured:
        """Return what was measured since the last call, by layer, in the order of the net."""
        mx.nd.waitall()  # graphs with static_shape write to the statistics behind the engine's back
        measured, self._measured = self._measured, defaultdict(list)
        return {layer: measured[layer] for layer in self.layers if layer in measured}

    def detach(self) -> None:
        """Remove all hooks, and give all blocks their own graphs."""
        for hook in self._hooks:
            hook.detach()
        for twin in self._twins.values():
            twin.leave()
        self._hooks, self._twins, self._measured = [], {}, {}

    def _is_listening(self) -> bool:
        return self.is_on and autograd.is_recording() and autograd.is_training()

    def _after_layer(self, layer: Any, inputs: tuple[Array, ...], output: Array) -> None:
        if self._is_listening() and not is_symbol(output):
            self._measure(layer, inputs[0], output)

    def _before_block(self, block: Any, inputs: tuple[Array, ...]) -> None:
        twin = self._twins.get(block)
        if twin is not None:
            twin.leave()  # if an error kept it from the call it was to observe
        if not self._is_listening() or not runs_own_graph(block) or not accepts(block, inputs):
            return  # what a block does not accept it refuses itself
        mx.nd.waitall()  # as in `take`
        if twin is None or not twin.is_current():
            twin = self._twins[block] = GraphTwin(block, inputs, self.layers, self._measure)
        twin.enter()

    def _measure(self, layer: Any, x: Array, y: Array) -> None:
        if x.size:
            with autograd.pause():
                self._measured[layer].append(MeasuredBatch(layer, x, y))


def _parents(blocks: dict[Block, str], layers: set[Any]) -> list[Block]:
    """Return the blocks that may run a graph with a norm: those above one, and imported ones."""
    return [
        block
        for block in blocks
        if isinstance(block, HybridBlock)
        and (block not in layers or isinstance(block, SymbolBlock))
        and not layers.isdisjoint(blocks_of(block))
    ]
