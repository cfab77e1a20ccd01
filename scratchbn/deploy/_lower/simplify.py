"""First pass: remove what does nothing in inference, and the training branch of our layers."""

from __future__ import annotations

from ..._graph.nodes import Node, Output
from ...backends.marker import KEY as MARKER
from .._norm_nodes import descriptions, out_of_reach
from .._report import Outcome
from .._training_graph import ends_layer, in_inference, is_zero, running_means, undescribed
from .state import Lowering

_PASS_THROUGH = {"BlockGrad", "_copy"}


def simplify(lowering: Lowering) -> None:
    """Remove Dropout, what passes its input through, and the training branch of our layers."""
    graph = lowering.graph
    means = running_means(graph)
    replacements: dict[Output, Output] = {}
    zeros: set[Node] = set()
    for node in graph.nodes():
        _check_loop(lowering, node)
        node.inputs = [replacements.get(source, source) for source in node.inputs]
        if node.op == "Dropout" and node.attrs.get("mode", "training") != "training":
            outcome = Outcome(node.name, "left as Dropout", "it has mode='always'")
            lowering.kept.append(outcome)
        elif node.inputs:
            same = _same(node, zeros)
            if same is not None:
                replacements[Output(node)] = same
            elif is_zero(node, zeros):
                zeros.add(node)
    graph.replace(replacements)
    described = {description["running_mean"] for description in descriptions(graph)}
    result = "inference branch of its training graph"
    lowering.kept += [
        Outcome(layer, result, "the graph has no description of the layer")
        for layer in undescribed(means, described)
    ]


def _same(node: Node, zeros: set[Node]) -> Output | None:
    """Return what a node is equal to in inference, if that is simpler."""
    if ends_layer(node):
        marker = Node("_copy", node.name, {MARKER: node.attrs[MARKER]}, [node.inputs[1]])
        return Output(marker)
    first = node.inputs[0]
    if node.op == "Dropout":
        return first
    if node.op in _PASS_THROUGH:
        return None if MARKER in node.attrs or first.node.is_variable else first
    return in_inference(node, zeros)


def _check_loop(lowering: Lowering, node: Node) -> None:
    if MARKER in node.body:
        raise ValueError(
            f"the layer inside loop {node.name!r} ({node.op}) cannot be exported for "
            "inference: take the batch normalization out of the loop body"
        )
    for op, reason in out_of_reach(node, "Dropout"):
        word = "as" if op == node.op else "with"
        lowering.kept.append(Outcome(node.name, f"left {word} {op}", reason))
