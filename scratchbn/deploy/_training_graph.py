"""How a layer's training graph is recognized in a file.

The other side is ``scratchbn._graph``, which builds that graph. What is said here must hold there:

============================  ===============================================================
``_graph``                    in the file
============================  ===============================================================
``ChannelView.reshape_back``  ``reshape_like(values, x)`` with a ``MARKER``, a layer's last node
``GraphMode``, the flag       ``_not_equal_scalar(Dropout(ones), 1)``: 0 in inference
``GraphMode``, a choice       ``where(flag, batch, running)``, flag through ``broadcast_like``
``state.write``               ``sgd_mom_update(weight, step, variable)``
``state.depend``              ``_identity_with_attr_like_rhs(vector, done)``
============================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Iterable

from .._graph.nodes import Graph, Node, Output
from ..backends.marker import KEY as MARKER


def ends_layer(node: Node) -> bool:
    """Tell whether this is the last node of a layer; its second input is the layer's input."""
    return node.op == "reshape_like" and MARKER in node.attrs


def is_zero(node: Node, zeros: set[Node]) -> bool:
    """Tell whether a node, its Dropout removed, is 0 in inference; `zeros` are those before it."""
    if node.op == "zeros_like":
        return True
    if node.op == "broadcast_like":
        return node.inputs[0].node in zeros
    return (
        node.op == "_not_equal_scalar"
        and node.inputs[0].node.op in ("_ones", "ones_like")
        and float(node.attrs["scalar"]) == 1
    )


def in_inference(node: Node, zeros: set[Node]) -> Output | None:
    """Return the input that a node is equal to in inference, if there is one."""
    first, *others = node.inputs
    if node.op == "_identity_with_attr_like_rhs":
        return first
    if node.op == "where" and first.node in zeros:
        return others[1]
    if node.op == "elemwise_add" and others[0].node in zeros:
        return first
    return None


def running_means(graph: Graph) -> list[str]:
    """Return the names of the running means that a graph writes to."""
    written = [n.inputs[2].node.name for n in graph.nodes() if n.op == "sgd_mom_update"]
    return [name for name in dict.fromkeys(written) if name.endswith("running_mean")]


def undescribed(means: Iterable[str], described: set[str]) -> list[str]:
    """Return the names of the layers whose running means no description names."""
    return [name.removesuffix("_running_mean") for name in means if name not in described]
