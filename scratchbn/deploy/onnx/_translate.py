"""A lowered graph as an ONNX graph, node by node, under names that say where each comes from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx import NodeProto, TensorProto, helper, numpy_helper

from ..._graph.nodes import Graph, Node, Output
from ..check import run_symbol
from ._emitter import LOCAL, Emitter
from ._exporter import exported
from ._names import Names
from ._ops import TRANSLATIONS
from ._shapes import Place, Tensor

_RANDOM = ("_random_", "_sample_", "_shuffle")


def describe(node: Node) -> str:
    """Return what a refusal calls a node."""
    return f"node {node.name!r} ({node.op})"


@dataclass
class Translated:
    """ONNX nodes in order, and which tensor holds which output of the graph.

    `ends` has, for each operator of the graph, how many ONNX nodes there were once it was
    translated.
    """

    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    tensors: dict[Place, str] = field(default_factory=dict)
    ends: dict[Node, int] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)


def translate(
    graph: Graph,
    values: Mapping[str, Any],
    known: Mapping[Place, Tensor],
    names: Names,
    opset: int,
) -> Translated:
    """Translate a graph; ValueError names the node that cannot be. `names` has those in use."""
    outputs: dict[Node, dict[int, Tensor]] = defaultdict(dict)
    for (node, number), tensor in known.items():
        outputs[node][number] = tensor
    result = Translated()
    for node in graph.nodes():
        if not node.is_variable:
            _add(result, graph, node, names, outputs, opset)
            continue
        result.tensors[node, 0] = node.name
        if node.name in values:
            array = values[node.name].asnumpy()
            result.constants.append(numpy_helper.from_array(array, node.name))
    for head in graph.heads:
        name = result.tensors[head.node, head.number]
        if name in result.heads or head.node.is_variable:
            # The outputs of a model need names of their own.
            again = names.unique(f"{name}_output")
            result.nodes.append(helper.make_node("Identity", [name], [again], name=again))
            name = again
        result.heads.append(name)
    return result


def _add(
    result: Translated,
    graph: Graph,
    node: Node,
    names: Names,
    known: Mapping[Node, Mapping[int, Tensor]],
    opset: int,
) -> None:
    """Translate one operator, and name what it became."""
    outputs = dict(known[node])
    emitter = Emitter(
        node,
        [result.tensors[source.node, source.number] for source in node.inputs],
        [known[source.node][source.number] for source in node.inputs],
        outputs,
        opset,
    )
    written = _written(graph, emitter)
    local = {output for made in emitter.nodes for output in made.output}
    final: dict[str, str] = {}
    for number in outputs:
        wanted = node.name if list(outputs) == [0] else names.unique(f"{node.name}{number}")
        source = written[number]
        if source in local and source not in final:
            final[source] = wanted
        else:
            emitter.nodes.append(helper.make_node("Identity", [source], [wanted]))
        result.tensors[node, number] = wanted
    local |= {constant.name for constant in emitter.constants}
    for tensor in sorted(local - final.keys()):
        final[tensor] = names.unique(f"{node.name}_{tensor.replace(LOCAL, '').strip('_')}")
    for made in emitter.nodes:
        made.input[:] = [final.get(tensor, tensor) for tensor in made.input]
        made.output[:] = [final.get(tensor, tensor) for tensor in made.output]
        made.name = made.output[0]
    constants = {constant.name: constant for constant in emitter.constants}
    for constant in constants.values():
        constant.name = final[constant.name]
    result.constants += constants.values()
    result.nodes += emitter.nodes
    result.ends[node] = len(result.nodes)


def _written(graph: Graph, emitter: Emitter) -> list[str]:
    """Translate by our own table, else by the exporter; returns the outputs' names."""
    node = emitter.node
    own = TRANSLATIONS.get(node.op)
    try:
        _refuse_random(node)
        if own and set(emitter.outputs) != {0}:
            raise ValueError(f"its output {max(emitter.outputs)} has no counterpart")
        if not node.inputs:
            return [_computed(graph, emitter)]
        return [own(emitter)] if own else exported(emitter)
    except Exception as error:  # the exporter raises anything, AssertionError included
        reason = str(error) or type(error).__name__
        raise ValueError(f"{describe(node)} cannot be translated to ONNX: {reason}") from error


def _computed(graph: Graph, emitter: Emitter) -> str:
    """Let MXNet compute what depends on nothing, as a range of numbers."""
    node, shape = emitter.node, emitter.out.shape
    if None in shape:
        raise ValueError("its shape follows the batch, which only dynamic_batch=False can state")
    if "shape" in node.attrs:  # lengths of 0 are those that the graph tells
        node = Node(node.op, node.name, {**node.attrs, "shape": str(shape)})
    (value,) = run_symbol(graph.symbol([Output(node)]), {}, {})
    return emitter.constant(value, value.dtype)


def _refuse_random(node: Node) -> None:
    if node.op == "Dropout" and node.attrs.get("mode") == "always":
        raise ValueError(
            "with mode='always' it drops at random in inference too, so that no file can be "
            "compared with the net"
        )
    if node.op.startswith(_RANDOM):
        raise ValueError("it draws random numbers, so that no file can be compared with the net")
