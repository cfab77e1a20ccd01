"""``BatchNorm`` nodes <-> our training graph in models that exist as files.

What ``convert`` does to the layers of a net, on the graph that ``net.export`` wrote. Parameters
keep their names and values; only the operators between them change.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block

from ._files import load_params, load_symbol, plain_name
from ._ir import Entry as Output
from ._ir import Graph, Node
from ._lower import CUDNN_LEAST_EPSILON, PARAMETERS, description_of
from ._net import BATCH_NORM_OPERATORS
from ._text import first_line
from .backends.marker import KEY as MARKER
from .convert import ConversionReport, Entry
from .layer import ScratchBatchNorm, ScratchBatchNormReLU

__all__ = ["TARGETS", "convert_files"]

TARGETS = ("builtin", "scratch")

_LAYERS = {"BatchNorm": ScratchBatchNorm, "_contrib_BatchNormWithReLU": ScratchBatchNormReLU}
_TRAINING_OPTIONS = ("momentum", "use_global_stats", "unbiased_variance")
# What BatchNorm computes where a file does not state an option.
_DEFAULTS = {"axis": "1", "eps": "0.001", "momentum": "0.9"}


def convert_files(
    symbol: Any, params: Any, *, to: str
) -> tuple[Any, dict[str, Any], ConversionReport]:
    """Exchange the batch normalizations of a model that exists as symbol and parameters.

    To ``'builtin'``, the training graph of each :class:`~scratchbn.ScratchBatchNorm`, as
    ``net.export`` writes it, becomes MXNet's ``BatchNorm`` node, for programs that expect that
    operator. To ``'scratch'``, each ``BatchNorm`` node becomes our training graph. Training goes
    on from either; the names and values of the parameters stay.

    Parameters
    ----------
    symbol : Symbol, str or path
        The graph, or a ``-symbol.json`` file.
    params : dict of str to NDArray, str or path
        Parameters, or a ``.params`` file. Names with or without ``arg:`` and ``aux:``.
    to : {'builtin', 'scratch'}
        What to turn the batch normalizations into.

    Returns
    -------
    symbol : Symbol
    params : dict of str to NDArray
        As given.
    report : ConversionReport
        What was converted; what was kept, and why (in a loop, ``SyncBatchNorm``, a layer that the
        graph does not describe); what is to be minded. An entry has the layer's name in `path`,
        its node's in `name`.

    Raises
    ------
    TypeError
        If `symbol` or `params` is none of these.
    ValueError
        If `to` is neither of the two, a file is not what it should be, an operator is unknown, a
        parameter is missing or of the wrong shape, or a layer has an option that ``BatchNorm``
        does not have: ``momentum=None`` or ``unbiased_variance=True``.
    OSError
        If a file cannot be read.

    Examples
    --------
    >>> data = mx.sym.var("data")
    >>> symbol = mx.sym.BatchNorm(data, name="bn", fix_gamma=False)
    >>> names = ("bn_gamma", "bn_beta", "bn_moving_mean", "bn_moving_var")
    >>> params = {name: mx.nd.ones(3) for name in names}
    >>> ours, params, report = convert_files(symbol, params, to="scratch")
    >>> print(report)
    1 converted, 0 skipped
    >>> sorted(ours.list_inputs()) == sorted(symbol.list_inputs())
    True
    >>> convert_files(ours, params, to="builtin")[0].tojson().count('"BatchNorm"')
    1
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    symbol, params = load_symbol(symbol), load_params(params)
    values = {plain_name(name): value for name, value in params.items()}
    graph = Graph(symbol)
    report = (_to_builtin if to == "builtin" else _to_scratch)(graph, values)
    return graph.symbol(), params, report


def _in_loops(graph: Graph, texts: Mapping[str, str]) -> Iterator[Entry]:
    """Report the loops whose body has one of the texts in its JSON."""
    for node in graph.nodes():
        body = json.dumps(node.rest.get("subgraphs", ()))
        for text, what in texts.items():
            if text in body:
                yield Entry(node.name, node.name, node.op, f"{what} is inside a loop")


def _check_parameters(node: Node, names: Mapping[str, str], values: Mapping[str, Any]) -> None:
    for name in names.values():
        if name not in values:
            raise ValueError(f"parameter {name!r} of node {node.name!r} is missing from params")
    shapes = {name: values[name].shape for name in names.values()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"parameters of {node.name!r} must have one shape (C,), got {shapes}")


def _layer_name(node: Node, running_mean: str) -> str:
    for ending in ("_running_mean", "_moving_mean"):
        if running_mean.endswith(ending):
            return running_mean.removesuffix(ending)
    return node.name


# --- to the built-in --------------------------------------------------------------------------


def _to_builtin(graph: Graph, values: Mapping[str, Any]) -> ConversionReport:
    order = graph.nodes()
    variables = {node.name: node for node in order if node.op == "null"}
    converted, notes = [], []
    skipped = list(_in_loops(graph, {MARKER: "ScratchBatchNorm"}))
    described = set()
    calls: Counter[str] = Counter()
    for node in order:
        if node.op != "reshape_like" or MARKER not in node.attrs:
            continue
        about = description_of(node)
        names = {key: about[key] for key in PARAMETERS}
        described.add(names["running_mean"])
        layer = _layer_name(node, names["running_mean"])
        entry = partial(Entry, layer, node.name, "ScratchBatchNorm")
        absent = [key for key in _TRAINING_OPTIONS if key not in about]
        if absent:
            skipped.append(entry(f"the graph does not tell its {absent[0]}"))
            continue
        _check_counterpart(layer, about)
        _check_parameters(node, names, values)
        missing = [name for name in names.values() if name not in variables]
        if missing:
            raise ValueError(f"{missing[0]!r}, which {MARKER} names, is no variable of the symbol")
        converted.append(entry("now BatchNorm"))
        beta = names["beta"]
        if not about["center"] and values[beta].asnumpy().any():
            notes.append(entry(f"center=False, but {beta} is not 0, and BatchNorm adds it"))
        elif not about["center"]:
            notes.append(entry(f"center=False has no counterpart; do not train {beta}"))
        calls[names["running_mean"]] += 1
        # MXNet numbers the writes to a variable; each call of a layer is one.
        written = dict.fromkeys(("running_mean", "running_var"), calls[names["running_mean"]])
        node.inputs = [
            node.inputs[1],
            *(Output(variables[name], 0, written.get(key, 0)) for key, name in names.items()),
        ]
        node.op, node.name, node.attrs = "BatchNorm", f"{layer}_fwd", _attributes(about)
    skipped += _undescribed(graph, described)
    return ConversionReport(tuple(converted), tuple(skipped), tuple(notes))


def _attributes(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the attributes of the BatchNorm node for a layer."""
    attrs = {
        "axis": str(about["axis"]),
        "eps": repr(float(about["epsilon"])),
        "fix_gamma": str(about["fix_gamma"]),
        "momentum": repr(float(about["momentum"])),
        "use_global_stats": str(about["use_global_stats"]),
    }
    if about["epsilon"] < CUDNN_LEAST_EPSILON:
        attrs["cudnn_off"] = "True"
    return attrs


def _check_counterpart(layer: str, about: Mapping[str, Any]) -> None:
    for key, value in (("momentum", None), ("unbiased_variance", True)):
        if about[key] is value:
            raise ValueError(
                f"{layer} cannot be converted: {key}={value} has no counterpart in BatchNorm"
            )
    number, flag = about["momentum"], about["use_global_stats"]
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise ValueError(f"momentum of {layer} must be between 0 and 1, got {number!r}")
    if not isinstance(flag, bool):
        raise ValueError(f"use_global_stats of {layer} must be True or False, got {flag!r}")


def _undescribed(graph: Graph, described: set[str]) -> Iterator[Entry]:
    """Report the layers of our own that keep statistics and have no description."""
    written = [n.inputs[2].node.name for n in graph.nodes() if n.op == "sgd_mom_update"]
    for name in dict.fromkeys(written):
        if name.endswith("running_mean") and name not in described:
            layer = name.removesuffix("_running_mean")
            yield Entry(layer, layer, "variant", "the graph has no description of the layer")


# --- to ours ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A ``BatchNorm`` node, the names of its parameters by role, and the layer that replaces it."""

    node: Node
    names: dict[str, str]
    layer: ScratchBatchNorm


class _Calls(Block):
    """Layers called one after another in one trace, so that each sees what was written before."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__(prefix="")
        self._calls = calls

    def forward(self, *inputs: Any) -> list[Any]:
        return [call.layer(x) for call, x in zip(self._calls, inputs)]


def _to_scratch(graph: Graph, values: Mapping[str, Any]) -> ConversionReport:
    texts = {f'"op": "{op}"': op for op in sorted(BATCH_NORM_OPERATORS)}
    skipped = list(_in_loops(graph, texts))
    entries = [*(entry for node in graph.nodes() for entry in node.inputs), *graph.heads]
    more = {entry.node for entry in entries if entry.output > 0}
    nodes = []
    for node in graph.nodes():
        if node.op not in BATCH_NORM_OPERATORS:
            continue
        reason = _why_not(node, has_more=node in more)
        if reason is None:
            nodes.append(node)
        else:
            skipped.append(Entry(node.name, node.name, node.op, reason))
    calls = []
    layers: dict[tuple[str, str], tuple[Any, ScratchBatchNorm]] = {}
    for node, dtype in zip(nodes, _dtypes(graph, nodes, values)):
        names = {key: entry.node.name for key, entry in zip(PARAMETERS, node.inputs[1:])}
        _check_parameters(node, names, values)
        statistics = names["running_mean"], names["running_var"]
        what = node.op, names, _options(node), dtype
        if statistics not in layers:
            taken = {layer.prefix for _, layer in layers.values()}
            layers[statistics] = what, _layer(node, names["running_mean"], dtype, taken)
        first, layer = layers[statistics]
        if first == what:
            calls.append(_Call(node, names, layer))
            continue
        reason = f"it shares its running statistics with {layer.prefix}, and differs otherwise"
        skipped.append(Entry(node.name, node.name, node.op, reason))
    _graft(graph, calls)
    converted = [
        Entry(c.layer.prefix.rstrip("_"), c.node.name, c.node.op, f"now {type(c.layer).__name__}")
        for c in calls
    ]
    return ConversionReport(tuple(converted), tuple(skipped))


def _why_not(node: Node, has_more: bool) -> str | None:
    """Say why a norm cannot become our layer; `has_more` if its other outputs are used."""
    if node.op == "_contrib_SyncBatchNorm":
        return "it normalizes over all devices"
    if node.op not in _LAYERS:
        return f"{node.op} is not BatchNorm"
    if has_more or node.flag("output_mean_var", False):
        return "its statistics are outputs too"
    computed = [entry.node.name for entry in node.inputs[1:] if entry.node.op != "null"]
    return f"{computed[0]} is computed in the graph" if computed else None


def _dtypes(graph: Graph, nodes: list[Node], values: Mapping[str, Any]) -> list[np.dtype[Any]]:
    """Return the dtype of each norm's input, as far as the parameters tell it."""
    if not nodes:
        return []
    part = graph.symbol([node.inputs[0] for node in nodes])
    known = {name: values[name].dtype for name in part.list_inputs() if name in values}
    try:
        _, found, _ = part.infer_type_partial(**known)
    except mx.MXNetError as error:
        raise ValueError(f"the parameters do not match the symbol: {first_line(error)}") from error
    own = [getattr(values.get(n.inputs[1].node.name), "dtype", np.float32) for n in nodes]
    return [np.dtype(dtype or given) for dtype, given in zip(found or [None] * len(nodes), own)]


def _options(node: Node) -> dict[str, Any]:
    stated = {**_DEFAULTS, **node.attrs}
    return {
        "axis": int(stated["axis"]),
        "momentum": float(stated["momentum"]),
        "epsilon": float(stated["eps"]),
        "scale": not node.flag("fix_gamma", True),
        "use_global_stats": node.flag("use_global_stats", False),
    }


def _layer(
    node: Node, running_mean: str, dtype: np.dtype[Any], taken: set[str]
) -> ScratchBatchNorm:
    prefix = f"{_layer_name(node, running_mean)}_"
    while prefix in taken:
        prefix += "_"
    try:
        layer = _LAYERS[node.op](**_options(node), prefix=prefix)
        layer.cast(dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{node.name} ({node.op}) cannot be converted: {error}") from error
    return layer


def _graft(graph: Graph, calls: list[_Call]) -> None:
    """Put the training graph of each call in the place of its node."""
    if not calls:
        return
    stand_ins = [mx.sym.var(f"input{i} of a call") for i in range(len(calls))]
    with autograd.pause(), mx.name.NameManager(), mx.util.np_array(False):
        traced = Graph(mx.sym.Group(_Calls(calls)(*stand_ins)))
    replacements = {Output(c.node): head for c, head in zip(calls, traced.heads)}
    inputs: dict[str, Output] = {}
    variables: dict[str, Node] = {}
    for call, stand_in in zip(calls, stand_ins):
        source = call.node.inputs[0]
        inputs[stand_in.name] = replacements.get(source, source)
        for key, entry in zip(PARAMETERS, call.node.inputs[1:]):
            variables[getattr(call.layer, key).name] = entry.node

    def connected(entry: Output) -> Output:
        # The version, which counts the writes to a variable, is that of our graph.
        node = variables.get(entry.node.name, entry.node) if entry.node.op == "null" else entry.node
        return inputs.get(entry.node.name, entry._replace(node=node))

    for node in traced.nodes():
        node.inputs = [connected(entry) for entry in node.inputs]
    for call, head in zip(calls, traced.heads):
        node = head.node
        while MARKER not in node.attrs:  # a relu, a cast
            node = node.inputs[0].node
        about = {**json.loads(node.attrs[MARKER]), **call.names}
        node.attrs[MARKER] = json.dumps(about, sort_keys=True)
    graph.replace(replacements)
