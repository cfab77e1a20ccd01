"""Calls of batch norm in a graph: what each normalizes, with which Parameters and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

from ..._graph.nodes import Graph, Node, Output
from ...native import OPERATOR
from ..marker import KEY, PARAMETERS, read_description


@dataclass(eq=False)
class Call:
    """One call of a layer: `x` becomes `output`; `relu` is the operator behind it, if any.

    `parameters` are the graph's variables in the order of ``PARAMETERS``.
    """

    output: Output
    x: Output
    parameters: tuple[Output, ...]
    axis: int
    epsilon: float
    scale: bool
    center: bool
    relu: str | None = None
    node: Node = field(init=False)

    def __post_init__(self) -> None:
        # Stands for the call while the graph is rewritten.
        self.node = Node("_copy", self.output.node.name, {}, [self.x])


Find = Callable[[Node, Mapping[str, Node]], Optional[Call]]


def described(node: Node, variables: Mapping[str, Node]) -> Call | None:
    """Return the call that ends with a node of the portable graph, if it is described."""
    if node.op != "reshape_like" or KEY not in node.attrs:
        return None
    about = read_description(node.name, node.attrs[KEY])
    names = [about[role] for role in PARAMETERS]
    if not all(name in variables for name in names):
        return None
    return Call(
        Output(node),
        node.inputs[1],
        tuple(Output(variables[name]) for name in names),
        axis=about["axis"],
        epsilon=about["epsilon"],
        scale=not about["fix_gamma"],
        center=about["center"],
    )


def compiled(node: Node, variables: Mapping[str, Node]) -> Call | None:
    """Return the call that ends with a node behind the compiled operator."""
    kernel = node.inputs[0].node if node.op == "reshape_like" else node
    if kernel.op != OPERATOR or kernel is node:
        return None
    x, gamma, beta = (_behind_identity(source) for source in kernel.inputs[:3])
    parameters = [source.node for source in (gamma, beta, *kernel.inputs[3:5])]
    if not all(parameter.is_variable for parameter in parameters):
        return None
    return Call(
        Output(node),
        x,
        tuple(map(Output, parameters)),
        axis=int(kernel.attrs["axis"]),
        epsilon=float(kernel.attrs["epsilon"]),
        scale=kernel.flag("scale", True),
        center=kernel.flag("center", True),
        relu="relu" if kernel.flag("relu", False) else None,
    )


def _behind_identity(source: Output) -> Output:
    return source.node.inputs[0] if source.node.op == "_copy" else source


def calls_in(graph: Graph, finds: Sequence[Find]) -> list[Call]:
    """Return the calls in a graph, each after those that its input depends on."""
    variables = graph.variables()
    found = (find(node, variables) for node in graph.nodes() for find in finds)
    return [call for call in found if call is not None]


def collapse(graph: Graph, calls: Sequence[Call]) -> None:
    """Put the node of each call in the place of what computes it."""
    replacements: dict[Output, Output] = {}
    for call in calls:
        source = call.node.inputs[0]
        call.node.inputs[0] = replacements.get(source, source)
        replacements[call.output] = Output(call.node)
    graph.replace(replacements)
