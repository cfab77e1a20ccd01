"""Which way each layer of a net runs, and why not another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mxnet as mx
from mxnet.gluon import Block

from ._graph.nodes import Graph
from ._net import (
    blocks_of,
    cached_op,
    check_block,
    devices_of,
    graph_of,
    is_hybridized,
    runs_own_graph,
)
from ._text import table
from .backends.choice import inference_graph, why_portable
from .backends.inference.calls import calls_in, described
from .backends.inference.two_graphs import TwoGraphs
from .backends.traced import Traced
from .layer import ScratchBatchNorm
from .native import OPERATOR, BackendError

PORTABLE = "two-mode graph"
_LATER = "chosen at the first call"
_FOREIGN = "as a backend of MXNet has rewritten it"


class Row(NamedTuple):
    """How one layer runs in one graph, or eagerly.

    `block` is the path of what was hybridized and `layer` the name of the layer; `training` and
    `inference` say the way, `why` what kept it from another.
    """

    block: str
    layer: str
    training: str
    inference: str
    why: str


@dataclass(frozen=True)
class Description:
    """How the layers of a net run: a :class:`Row` each, as text a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return table(Row._fields, self.rows) if self.rows else "no layer of scratchbn"


def describe(net: Block) -> Description:
    """Say which way each layer of a net runs, in training and in inference, and why.

    Parameters
    ----------
    net : Block
        Any net. Nothing in it is changed or run.

    Returns
    -------
    Description
        A row for each layer in the graph of each hybridized block that has been called, and for
        each layer that runs eagerly; ``str`` of it is a table. The ways are 'kernel', 'kernel with
        ReLU' (that of the activation behind it), 'two-mode graph' (stock operators for both modes)
        and 'stock operators' (eagerly); in the inference graph, which is chosen for each rank and
        type of the input at the first call of inference, 'convolution', 'affine' and 'kernel,
        inference only'.

    Raises
    ------
    TypeError
        If `net` is not a Block.

    Notes
    -----
    A graph keeps what was chosen when it was traced. Why a layer in it does not run by the kernel
    is told by what holds now; ``hybridize()`` makes the next call choose anew.

    Examples
    --------
    >>> from mxnet.gluon import nn
    >>> from scratchbn import ScratchBatchNorm
    >>> net = nn.HybridSequential()
    >>> net.add(ScratchBatchNorm(prefix="norm_"))
    >>> net.hybridize()
    >>> print(describe(net))
    block             layer  training                  inference                 why
    HybridSequential  norm   chosen at the first call  chosen at the first call
    """
    check_block(net)
    paths = {block: path or type(block).__name__ for block, path in blocks_of(net).items()}
    inside: dict[Block, Block] = {}  # the outermost hybridized block that a block is in
    for block in paths:
        if is_hybridized(block) and block not in inside:
            inside.update(dict.fromkeys(blocks_of(block), block))
    rows: list[Row] = []
    shown: set[str] = set()
    for block, path in paths.items():
        if is_hybridized(block) and runs_own_graph(block) and cached_op(block) is not None:
            for mean, row in _of_graph(block, path):
                rows.append(row)
                shown.add(mean)
    for layer in paths:
        if isinstance(layer, ScratchBatchNorm) and layer.running_mean.name not in shown:
            around = inside.get(layer)
            if around is None:
                rows.append(_eager(layer, paths[layer]))
            else:
                way = _LATER if runs_own_graph(around) else _FOREIGN
                rows.append(Row(paths[around], layer.name, way, way, ""))
    return Description(tuple(rows))


def _eager(layer: ScratchBatchNorm, path: str) -> Row:
    why = _why_portable(layer)
    way = "stock operators" if why else "kernel"
    return Row(path, layer.name, way, way, why)


def _why_portable(layer: ScratchBatchNorm) -> str:
    try:
        why = why_portable(layer.is_stock, {*(devices_of(layer) or [mx.current_context()])})
    except BackendError as error:
        why = " ".join(str(error).split())
    return why or ""


def _of_graph(block: Any, path: str) -> Iterator[tuple[str, Row]]:
    """Yield a row for each layer in a block's graph, with the name of its running mean."""
    runs = cached_op(block)
    layers = {b.running_mean.name: b for b in blocks_of(block) if isinstance(b, ScratchBatchNorm)}
    ways = _ways(runs.trains if isinstance(runs, Traced) else graph_of(block), layers)
    apart, why_one = _inference(block, runs)
    for mean, training in ways.items():
        layer = layers.get(mean)
        why = [why_one] if why_one else []
        if training == PORTABLE:
            why.append(_why_portable(layer) if layer else "it was imported as stock operators")
            if layer and not why[-1]:
                why[-1] = "it was traced so: hybridize() chooses anew"
        inference = _LATER if apart is not None and not apart else training
        if apart:
            inference = _joined(ways_of.get(mean, training) for ways_of, _ in apart)
            why += [kept[mean] for _, kept in apart if mean in kept]
        name = layer.name if layer else mean.removesuffix("_running_mean")
        yield mean, Row(path, name, training, inference, _joined(filter(None, why), "; "))


def _ways(symbol: Any, layers: Iterable[str]) -> dict[str, str]:
    """Return how the layers in a graph of both modes run, by the names of their running means."""
    graph = Graph(symbol)
    found = {
        call.parameters[2].node.name: {PORTABLE: None} for call in calls_in(graph, [described])
    }
    variables = graph.variables()
    found.update({mean: {PORTABLE: None} for mean in layers if mean in variables})
    for mean, ways in _kernels(graph).items():
        found[mean] = dict.fromkeys(ways)
    for loop in graph.nodes():
        if loop.holds(OPERATOR):
            found.update(
                {v.node.name: {"kernel": None} for v in loop.inputs if v.node.name in found}
            )
    return {mean: _joined(ways) for mean, ways in found.items()}


def _kernels(graph: Graph) -> dict[str, list[str]]:
    """Return the ways of the compiled operators in a graph, by the names of the running means."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes():
        if node.op == OPERATOR:
            merged = node.attrs["relu"] == "Activation"
            way = "kernel with ReLU" if merged else "kernel"
            found.setdefault(node.inputs[3].node.name, []).append(way)
    return found


def _inference(
    block: Any, runs: Any
) -> tuple[list[tuple[dict[str, str], dict[str, str]]] | None, str]:
    """Return the ways in each inference graph and why others were not taken; or why there is none.

    The ways are None where the block's own graph infers.
    """
    if not isinstance(runs, TwoGraphs):
        return None, ""
    if not inference_graph():
        return None, "the inference graph is off"
    if any(device.device_type == "gpu" for device in devices_of(block)):
        return None, "one graph serves both modes on a GPU"
    found = []
    for symbol, became in runs.inference():
        ways: dict[str, list[str]] = {}
        for mean, way, _ in became:
            if way:
                ways.setdefault(mean, []).append(way)
        for mean, kernels in _kernels(Graph(symbol)).items() if symbol is not None else ():
            ways.setdefault(mean, []).extend(f"{way}, inference only" for way in kernels)
        kept = {mean: why for mean, way, why in became if not way}
        found.append(({mean: _joined(words, " and ") for mean, words in ways.items()}, kept))
    return found, ""


def _joined(words: Iterable[str], between: str = " or ") -> str:
    return between.join(dict.fromkeys(words))
