"""Two models on the same inputs, compared node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mxnet as mx
import numpy as np

from .._graph.nodes import Graph, Node, Output
from .._net import BATCH_NORM_OPERATORS
from ._training_graph import ends_layer
from .check import Model, disagreement, run_symbol

# How much more than the rounding of all numbers a rewritten model may change a result. The bound,
# relative to the largest number, keeps a jump from being taken for rounding.
_ROUNDING, _BOUND = 16, 1e-3
_DRAWS = 3  # of the rounding: in one of them errors may cancel


@dataclass(frozen=True)
class Trial:
    """Two models and their inputs; `unit` is the rounding of the parameters, relative.

    Results may be apart by `floor` in any case, relative to the largest number.
    """

    before: Model
    after: Model
    inputs: Mapping[str, Any]
    unit: float
    floor: float

    @cached_property
    def graphs(self) -> tuple[Graph, Graph]:
        """The graphs of both models."""
        return Graph(self.before[0]), Graph(self.after[0])

    def runs(self) -> bool:
        """Tell whether both models run."""
        try:
            _ = self.faults
        except ValueError:
            return False
        return True

    @cached_property
    def faults(self) -> list[str | None]:
        """How each output differs by more than rounding, None if it does not."""
        return self.compare([tuple(pair) for pair in zip(*(graph.heads for graph in self.graphs))])

    def compare(self, pairs: Iterable[tuple[Output, Output]]) -> list[str | None]:
        """Compare results of the model before with those of the one after."""
        pairs = list(pairs)
        before, after = ([pair[i] for pair in pairs] for i in (0, 1))
        got, want = self.compute(1, after), self.compute(0, before)
        changes = [0.0] * len(pairs)
        faults = list(map(self._fault, got, want, changes))
        if not any(faults):  # as it is mostly, without the effort below
            return faults
        for draw in range(_DRAWS):
            moved = self.compute(0, before, draw=draw)
            changes = [max(c, _change(*two)) for c, *two in zip(changes, moved, want)]
        return list(map(self._fault, got, want, changes))

    def compute(
        self, which: int, outputs: list[Output], *, draw: int | None = None
    ) -> list[np.ndarray]:
        """Run the graph before (0) or after (1), with rounded numbers if a draw is given."""
        held = {**(self.before, self.after)[which][1], **self.inputs}
        if draw is not None:
            rng = np.random.default_rng(draw)
            held = {name: _nudged(array, self.unit, rng) for name, array in held.items()}
        computed = list(dict.fromkeys(y for y in outputs if not y.node.is_variable))
        results: dict[Output, np.ndarray] = {}
        if computed:
            symbol = self.graphs[which].symbol(computed)
            results = dict(zip(computed, run_symbol(symbol, {}, held)))
        return [held[y.node.name].asnumpy() if y.node.is_variable else results[y] for y in outputs]

    def _fault(self, got: np.ndarray, want: np.ndarray, change: float) -> str | None:
        size = float(np.abs(want[np.isfinite(want)]).max(initial=0))
        bound = max(_BOUND, _ROUNDING * self.unit) * size
        allowed = min(_ROUNDING * change, bound) + self.floor * size
        return disagreement(got, want, types=False, allowed=allowed)


def _change(moved: np.ndarray, want: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        change = np.abs(moved.astype(np.float64) - want)
    return float(change[np.isfinite(change)].max(initial=0))


def _nudged(array: Any, unit: float, rng: np.random.Generator) -> Any:
    values = array.asnumpy()
    if values.dtype.kind != "f":
        return array
    return mx.nd.array(values * (1 + unit * rng.uniform(-1, 1, values.shape)), dtype=values.dtype)


def not_of_rounding(trial: Trial) -> list[Node]:
    """Return the nodes, of the graph after, that differ though nothing was done to them.

    They have the same operator and attributes in both graphs, and inputs that agree: one that
    sorts, or compares, or draws random numbers.
    """
    pairs = []
    for one, other in _in_both(trial).values():
        alike = one.op == other.op and _options(one) == _options(other)
        if alike and len(one.inputs) == len(other.inputs):
            pairs.append((one, other))
    outputs = [(Output(one), Output(other)) for one, other in pairs]
    apart = [pair for pair, fault in zip(pairs, trial.compare(outputs)) if fault]
    inputs = [list(zip(one.inputs, other.inputs)) for one, other in apart]
    faults = iter(trial.compare(pair for part in inputs for pair in part))
    wrong = [[next(faults) for _ in part] for part in inputs]
    return [other for (_, other), faulty in zip(apart, wrong) if not any(faulty)]


def first_wrong(trial: Trial) -> tuple[str, str]:
    """Return the first node, with its fault, behind which nothing agrees down to an output.

    Or the norm that it feeds, if that is in both graphs: the layer's bias may hold its mean.
    """
    both = _in_both(trial)
    pairs = [(name, *pair) for name, pair in both.items()]
    # A layer agrees too if it computes what the norm behind it did.
    norms = [node for node in trial.graphs[0].nodes() if _is_norm(node)]
    fed = [(source.node.name, norm) for norm in norms for source in norm.inputs]
    pairs += [(name, norm, both[name][1]) for name, norm in fed if name in both]
    found = trial.compare((Output(one), Output(other)) for _, one, other in pairs)
    faults = dict(zip(both, found))
    faults |= {name: None for (name, *_), fault in zip(pairs, found) if fault is None}
    heads = trial.graphs[1].heads
    wrong = {head.node: fault for head, fault in zip(heads, trial.faults) if fault}
    stack, seen = list(wrong), set(wrong)
    while stack:
        for source in stack.pop().inputs:
            node = source.node
            agrees = node.name in both and faults[node.name] is None
            if not (node.is_variable or agrees or node in seen):
                seen.add(node)
                stack.append(node)
    order = [node for node in trial.graphs[1].nodes() if node in seen]
    said = [(node.name, wrong.get(node) or faults.get(node.name)) for node in order]
    first, *later = [(name, fault) for name, fault in said if fault]
    behind = {norm.name for name, norm in fed if name == first[0]}
    return next((entry for entry in later if entry[0] in behind), first)


def _is_norm(node: Node) -> bool:
    return node.op in BATCH_NORM_OPERATORS or ends_layer(node)


def without(trial: Trial, nodes: list[Node]) -> Trial:
    """Return a trial in which both graphs are given what those nodes compute in the one before."""
    both, inputs = _in_both(trial), dict(trial.inputs)
    replacements: tuple[dict[Output, Output], ...] = ({}, {})
    used = {*trial.graphs[0].used(), *trial.graphs[1].used()}
    for node in nodes:
        pair = both[node.name]
        numbers = sorted({output.number for output in used if output.node in pair})
        results = trial.compute(0, [Output(pair[0], number) for number in numbers])
        for number, result in zip(numbers, results):
            name = f"output {number} of {node.name}"
            inputs[name] = mx.nd.array(result, dtype=result.dtype)
            for replaced, own in zip(replacements, pair):
                given = Output(Node("null", name))
                replaced[Output(own, number)] = Output(Node("_copy", node.name, {}, [given]))
    symbols = []
    for graph, replaced in zip(trial.graphs, replacements):
        graph.replace(replaced)
        symbols.append(graph.symbol())
    before, after = ((s, values) for s, (_, values) in zip(symbols, (trial.before, trial.after)))
    return replace(trial, before=before, after=after, inputs=inputs)


def _in_both(trial: Trial) -> dict[str, tuple[Node, Node]]:
    """Return the operators by the names that stand once in each graph."""
    named = []
    for graph in trial.graphs:
        nodes = [node for node in graph.nodes() if not node.is_variable]
        count = Counter(node.name for node in nodes)
        named.append({node.name: node for node in nodes if count[node.name] == 1})
    before, after = named
    return {name: (before[name], node) for name, node in after.items() if name in before}


def _options(node: Node) -> dict[str, str]:
    return {name: value for name, value in node.attrs.items() if not name.startswith("__")}
