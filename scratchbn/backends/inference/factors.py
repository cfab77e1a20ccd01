"""What the layers of a graph multiply with and subtract: computed for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np

from ... import functional
from ..._graph.nodes import Graph, Node, Output
from .calls import Call


@dataclass(frozen=True)
class Fact:
    """What is known of the input of a call."""

    rank: int | None
    channels: int | None
    dtype: np.dtype[Any] | None

    def along(self, axis: int) -> tuple[int, ...]:
        """Return the shape that lays a vector along an axis of the input."""
        shape = [1] * (self.rank or 0)
        shape[axis] = -1
        return tuple(shape)


class Vectors(NamedTuple):
    """The factor of a call, in the shape asked for, and ``-running_mean``, shape (C,)."""

    factor: Output
    shift: Output


def vectors(
    calls: Sequence[Call], facts: Sequence[Fact], shapes: Sequence[tuple[int, ...]]
) -> list[Vectors]:
    """Return the vectors of each call; `shapes`, with one -1, are those of the factors.

    Layers of one epsilon, type and shape share one chain: the Parameters are concatenated, and
    the results cut again. So a net has a few operators more, where each layer would have four.
    """
    chains: dict[Any, dict[Any, Fact]] = {}
    keys = []
    for call, fact, shape in zip(calls, facts, shapes):
        one = tuple(v.node for v in call.parameters), call.scale
        alone = one if fact.channels is None else None  # where to cut is not known
        chain = call.epsilon, fact.dtype, shape, alone
        chains.setdefault(chain, {})[one] = fact
        keys.append((chain, one))
    found = {}
    with mx.name.Prefix("norms_"), mx.AttrScope():
        for chain, members in chains.items():
            epsilon, _, shape, _ = chain
            channels = [fact.channels for fact in members.values()]
            results = _chain(list(members), epsilon, shape, channels)
            found.update({(chain, one): result for one, result in zip(members, results)})
    return [found[key] for key in keys]


def _chain(
    members: list[Any], epsilon: float, shape: tuple[int, ...], channels: list[Any]
) -> list[Vectors]:
    """Build one chain; `members` are pairs of parameters' nodes and whether gamma counts."""
    F = mx.sym
    # Variables of the chain by position: the names belong to the graph it is for.
    variables: dict[str, Node] = {}

    def variable(node: Node) -> Any:
        variables[f"v{len(variables)}"] = node
        return F.var(f"v{len(variables) - 1}")

    def together(arrays: list[Any]) -> Any:
        return arrays[0] if len(arrays) == 1 else F.Concat(*arrays, dim=0)

    gammas = [
        variable(gamma) if scale else F.ones_like(variable(gamma)) for (gamma, *_), scale in members
    ]
    mean = together([variable(nodes[2]) for nodes, _ in members])
    variance = together([variable(nodes[3]) for nodes, _ in members])
    factor = together(gammas) * functional.inverse_std(F, variance, epsilon)
    factor = F.reshape(factor, shape=shape)
    shift = F.negative(mean)
    if len(members) > 1:
        cuts = tuple(int(n) for n in np.cumsum(channels[:-1]))
        factor = F.split_v2(factor, cuts, axis=shape.index(-1))
        shift = F.split_v2(shift, cuts, axis=0)
    chain = Graph(F.Group([factor, shift]), amp_casts=False)
    for node in chain.nodes():
        node.inputs = [
            Output(variables[s.node.name]) if s.node.is_variable else s for s in node.inputs
        ]
    heads = chain.heads
    return list(map(Vectors, heads[: len(members)], heads[len(members) :]))
