"""A graph of both modes -> the graph of inference, on the same Parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

from ..._graph.nodes import RANK_VARIES, Graph, Node, Output
from .calls import Call, Find, calls_in, collapse
from .factors import Fact, Vectors, vectors

Measure = Callable[[Graph, list[Call]], list[Fact]]
WhyKept = Callable[[Call, Fact], Optional[str]]


class Rewritten(NamedTuple):
    """A graph of inference; None if no call was rewritten.

    `became` says of each call, by the name of its running mean and in the order of the calls, what
    it became, or None and why it keeps the graph it has.
    """

    graph: Graph | None
    became: list[tuple[str, str | None, str]]


def rewrite(
    symbol: Any, finds: Sequence[Find], measure: Measure, why_kept: WhyKept = lambda *_: None
) -> Rewritten:
    """Return the inference graph of a symbol.

    Parameters
    ----------
    symbol : Symbol
        A graph of both modes.
    finds : sequence of Find
        What finds calls in it.
    measure : Measure
        Returns what is known of the inputs of the calls.
    why_kept : WhyKept
        Tells why a call keeps the graph it has; None for one that is to be rewritten.
    """
    kept: dict[int, tuple[str, str | None, str]] = {}
    while True:  # a second time if some keep their graph: it is lost once the calls are collapsed
        graph = Graph(symbol, amp_casts=True)
        calls = {i: c for i, c in enumerate(calls_in(graph, finds)) if i not in kept}
        if not calls:
            return Rewritten(None, [kept[i] for i in sorted(kept)])
        collapse(graph, list(calls.values()))
        facts = dict(zip(calls, measure(graph, list(calls.values()))))
        unsteady = graph.without_rank()
        reasons = {
            i: _obstacle(call, facts[i], unsteady) or why_kept(call, facts[i])
            for i, call in calls.items()
        }
        unwanted = {i: (_mean_of(calls[i]), None, why) for i, why in reasons.items() if why}
        if not unwanted:
            break
        kept |= unwanted
    written = {
        i: (_mean_of(call), "convolution" if _as_convolution(call, facts[i]) else "affine", "")
        for i, call in calls.items()
    }
    _write(graph, list(calls.values()), list(facts.values()))
    return Rewritten(graph, [both[i] for both in [kept | written] for i in sorted(both)])


def _mean_of(call: Call) -> str:
    return call.parameters[2].node.name


def _obstacle(call: Call, fact: Fact, unsteady: set[Node]) -> str | None:
    """Return what is not known of an input, or which type MXNet lacks operators for."""
    if call.node.inputs[0].node in unsteady:
        return RANK_VARIES
    if fact.rank is None:
        return "the rank of its input is not known"
    if fact.dtype is not None and fact.dtype.name not in ("float32", "float64"):
        return f"no convolution for {fact.dtype.name}"
    return None


def _write(graph: Graph, calls: list[Call], facts: list[Fact]) -> None:
    """Put the operators of inference in the place of the calls."""
    uses = graph.uses()
    as_convolution = [_as_convolution(call, fact) for call, fact in zip(calls, facts)]
    shapes = [fact.along(call.axis) for call, fact in zip(calls, facts)]
    shapes = [
        (-1, *(1,) * (len(shape) - 1)) if convolution else shape
        for shape, convolution in zip(shapes, as_convolution)
    ]
    found = vectors(calls, facts, shapes)
    for call, fact, own, convolution in zip(calls, facts, found, as_convolution):
        centred = _shift_in_bias(call, fact, own, uses)
        (_convolution if convolution else _arithmetic)(call, fact, own, centred)
        if call.relu is not None:
            _put_relu(graph, call)


def _as_convolution(call: Call, fact: Fact) -> bool:
    """Tell whether a call can be a convolution: it has channels second, and 1 to 3 axes more."""
    rank = fact.rank or 0
    return 3 <= rank <= 5 and call.axis % rank == 1 and fact.channels is not None


def _shift_in_bias(call: Call, fact: Fact, own: Vectors, uses: Counter[Node]) -> bool:
    """Subtract the mean in the bias of what is before a call; False if that is not possible."""
    before = call.node.inputs[0].node
    if uses[before] > 1 or call.axis % (fact.rank or 1) != 1 or not has_bias_per_channel(before):
        return False
    if before.flag("no_bias", before.op == "Deconvolution"):
        before.inputs.append(own.shift)
        before.attrs["no_bias"] = "False"
    else:
        sources = [before.inputs[2], own.shift]
        before.inputs[2] = Output(Node("elemwise_add", f"{before.name}_shift", {}, sources))
    return True


def has_bias_per_channel(node: Node) -> bool:
    """Tell whether a node adds a bias to each channel, channels second, or could."""
    if node.op == "FullyConnected":
        return node.flag("flatten", True)
    layout = node.attrs.get("layout", "None")
    return node.op in ("Convolution", "Deconvolution") and (
        layout == "None" or layout.startswith("NC")
    )


def _convolution(call: Call, fact: Fact, own: Vectors, centred: bool) -> None:
    """Write a 1x1 depthwise convolution, which keeps the layout of oneDNN's convolutions."""
    node, ones = call.node, (1,) * ((fact.rank or 0) - 2)
    attrs = {
        "kernel": str(ones),
        "num_filter": str(fact.channels),
        "num_group": str(fact.channels),
        "no_bias": "False",
    }
    if not centred:
        weight = Output(Node("ones_like", f"{node.name}_ones", {}, [own.factor]))
        sources = [node.inputs[0], weight, own.shift]
        node.inputs[0] = Output(Node("Convolution", f"{node.name}_centred", dict(attrs), sources))
    node.op, node.attrs = "Convolution", attrs
    node.inputs = [node.inputs[0], own.factor, _beta(call)]


def _arithmetic(call: Call, fact: Fact, own: Vectors, centred: bool) -> None:
    """Write a sum and a product along the axis."""
    node, shape = call.node, {"shape": str(fact.along(call.axis))}

    def along(vector: Output, word: str) -> Output:
        return Output(Node("Reshape", f"{node.name}_{word}", dict(shape), [vector]))

    x = node.inputs[0]
    if not centred:
        sources = [x, along(own.shift, "shift")]
        shifted = Output(Node("broadcast_add", f"{node.name}_shifted", {}, sources))
        # Of data with one channel the sum would have many: that is to be an error.
        x = Output(Node("reshape_like", f"{node.name}_centred", {}, [shifted, x]))
    scaled = Output(Node("broadcast_mul", f"{node.name}_scaled", {}, [x, own.factor]))
    node.op, node.attrs = "broadcast_add", {}
    node.inputs = [scaled, along(_beta(call), "beta")]


def _beta(call: Call) -> Output:
    beta = call.parameters[1]
    if call.center:
        return beta
    return Output(Node("zeros_like", f"{call.node.name}_zeros", {}, [beta]))


def _put_relu(graph: Graph, call: Call) -> None:
    """Put the relu of a call behind it, under the name of the whole."""
    attrs = {"act_type": "relu"} if call.relu == "Activation" else {}
    relu = Node(str(call.relu), call.node.name, attrs)
    graph.replace({Output(call.node): Output(relu)})
    relu.inputs = [Output(call.node)]
    call.node.name += "_normalized"
