"""Fourth pass: fold norms into the weights, or the norm, before them, else into what follows."""

from __future__ import annotations

from ..._graph.nodes import Node, Output
from .._report import Outcome
from .after import fold_into_followers
from .before import Plan
from .state import Lowering, Norm, Obstacle


def fold(lowering: Lowering, norms: list[Norm]) -> list[tuple[Norm, str]]:
    """Fold norms into their neighbours; return the others, each with the reason."""
    heads = list(lowering.graph.heads)
    pending = {norm.node: norm for norm in norms}
    remaining: dict[Node, tuple[Norm, str]] = {}
    computes: dict[Node, Node] = {}
    while pending:
        norm = pending[next(iter(pending))]
        try:
            plan = Plan(lowering, norm, pending, {node: n for node, (n, _) in remaining.items()})
        except Obstacle as obstacle:
            remaining[norm.node] = norm, str(obstacle)
            del pending[norm.node]
            continue
        result = plan.carry_out()
        for folded in plan.norms:
            lowering.folded.append(Outcome(folded.node.name, result))
            source = folded.node.inputs[0]
            replacement = folded.with_relu(source) if folded.relu else source
            lowering.graph.replace({Output(folded.node): replacement})
            computes[folded.node] = replacement.node
            del pending[folded.node]
    for head, name in zip(heads, lowering.outputs):
        if head.node in computes:  # programs find outputs by name
            computes[head.node].name = name
    kept = []
    for norm, reason in remaining.values():
        followers = fold_into_followers(lowering, norm)
        if followers:
            names = ", ".join(node.name for node in followers)
            lowering.folded.append(Outcome(norm.node.name, f"folded into {names}"))
        else:
            kept.append((norm, reason))
    return kept
