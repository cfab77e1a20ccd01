"""The graph that runs a block by the compiled operator, with fewer nodes.

A layer writes its operator for any place in a graph. Once the graph is whole it can be seen what
its place is: a ReLU behind it is computed by the operator itself, which then need not keep what is
between the two; and the identity that keeps the operator's gradient from overwriting that of
others is not needed where there are no others. In a graph that only infers there is no gradient
and no mode to ask for. Names, files and what a block remembers are those of the graph as it was
traced.

What oneDNN laid out is put in plain order once, before the operator. Else MXNet does it in the
forward and again in the backward, and each executor keeps its copy until its next run.
"""

from __future__ import annotations

from typing import Any

import mxnet as mx

from .._graph.nodes import Graph, Node, Output
from ..native import OPERATOR
from .pooled import block_before_pooling

# What may put out an array in a layout of oneDNN's own.
_ONEDNN = {
    "Convolution",
    "Deconvolution",
    "Pooling",
    "Activation",
    "Concat",
    "elemwise_add",
    "add_n",
}


def leaner(symbol: Any) -> Any | None:
    """Return the graph with fewer nodes, its inputs in the same order; None if there are none."""
    graph = Graph(symbol, amp_casts=True)
    found = _merge_relus(graph)
    uses = graph.uses()
    for number, node in enumerate(graph.nodes()):
        if node.op == OPERATOR:
            source = node.inputs[0].node
            if source.op == "_copy" and uses[source] == 1 and _is_alone(source.inputs[0], uses):
                node.inputs[0] = source.inputs[0]
                found = True
            if _may_be_blocked(node.inputs[0], uses):
                plain = Node("Reshape", f"norm{number}_plain", {"shape": "(-2,)"}, node.inputs[:1])
                node.inputs[0] = Output(plain)
                found = True
    found |= block_before_pooling(graph)
    if not found:
        return None
    result = graph.symbol()
    if result.list_inputs() != symbol.list_inputs():
        return None
    return result if type(symbol) is type(result) else result.as_np_ndarray()


def infer_only(graph: Graph) -> set[str]:
    """Leave of the compiled operators in a graph that only infers what inference needs.

    Returns the names of the running means of those that there are.
    """
    _merge_relus(graph)
    infers = Output(Node("_ones", "norms_infers", {"shape": "(1,)"}))
    replaced: dict[Output, Output] = {}
    found = set()
    for node in graph.nodes():
        if node.op == OPERATOR:
            node.inputs[:3] = [_behind_identity(source) for source in node.inputs[:3]]
            node.inputs[5] = infers
            found.add(node.inputs[3].node.name)
        elif node.op == "reshape_like" and node.inputs[0].node.op == OPERATOR:
            kernel = node.inputs[0].node
            kernel.name = node.name
            replaced[Output(node)] = Output(kernel)
    graph.replace(replaced)
    return found


def _merge_relus(graph: Graph) -> bool:
    """Let the operator compute the relu behind it where nothing else uses what it normalized."""
    uses = graph.uses()
    replaced: dict[Output, Output] = {}
    for node in graph.nodes():
        if _is_relu(node):
            last = node.inputs[0].node  # the reshape behind the operator
            kernel = last.inputs[0].node if last.op == "reshape_like" else last
            if (
                kernel.op == OPERATOR
                and kernel is not last
                and uses[last] == 1
                and kernel.attrs["relu"] == "False"
            ):
                kernel.attrs["relu"] = "Activation"
                replaced[Output(node)] = Output(last)
    graph.replace(replaced)
    return bool(replaced)


def _behind_identity(source: Output) -> Output:
    return source.node.inputs[0] if source.node.op == "_copy" else source


def _may_be_blocked(source: Output, uses: Any) -> bool:
    """Tell whether oneDNN may have laid out an output, and a GPU would copy nothing."""
    computed = _behind_identity(source).node
    return computed.op in _ONEDNN and (uses[source.node] == 1 or not mx.context.num_gpus())


def _is_alone(source: Output, uses: Any) -> bool:
    """Tell whether the gradient of an output is that of one use: no user's, and no sum."""
    return not source.node.is_variable and uses[source.node] == 1


def _is_relu(node: Node) -> bool:
    # The operator `relu` turns a gradient that is not finite into NaN where its input is negative.
    return node.op == "Activation" and node.attrs.get("act_type") == "relu"
