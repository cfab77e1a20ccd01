"""A second symbol file for inference, which shares the parameter file of the first."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .._checks import check_flag
from .._comparison import NOT_MADE, Comparison
from .._graph.nodes import Graph, Node, Output
from .._net import BATCH_NORM_OPERATORS
from .._writing import PathLike, check_directory, write_text
from ..backends.inference.calls import Call, described
from ..backends.inference.factors import Fact
from ..backends.inference.rewrite import has_bias_per_channel, rewrite
from ._files import known_shapes, load_params, load_symbol, plain_name
from ._lower.infer import ranks_of, types_and_shapes
from ._norm_nodes import check_parameters, epsilon_of, obstacle, with_more_outputs
from ._verify import verify as compare

__all__ = ["write_inference_symbol"]

_ENDING = "-symbol.json"

Shapes = Mapping[str, tuple[int, ...]]


def write_inference_symbol(
    symbol: PathLike,
    path: PathLike | None = None,
    *,
    params: PathLike | None = None,
    shapes: Mapping[str, Iterable[int]] | None = None,
    verify: bool = True,
) -> str:
    """Write a symbol file for inference beside that of an exported model.

    What ``net.export`` writes of our layer serves training too, and takes its time for it. The
    second file has stock operators that only infer: each batch normalization, ours or MXNet's,
    is a 1x1 depthwise convolution where its channels are second and there are 1 to 3 axes more,
    else a product and a sum; the mean is subtracted in the bias of the layer before, if it has
    one. No value is in it: it computes with the Parameters of the same ``.params`` file, so
    whoever trains on and saves that file again updates both.

    Parameters
    ----------
    symbol : str or path
        ``NAME-symbol.json``.
    path : str or path, optional
        The file to write; ``NAME-infer-symbol.json`` if not given.
    params : str or path, optional
        A parameter file of the model, from which shapes and types are taken, no values. If not
        given, the newest ``NAME-0000.params``, or other digits, beside the symbol, if there is
        one. Without it a norm is a convolution only behind a layer that states its channels.
    shapes : mapping of str to tuple of int, optional
        Shapes of the inputs. With them and the parameters both graphs are run on random input
        and compared. They also tell the rank of a norm's input where the operators do not.
    verify : bool
        Whether to compare, and refuse a difference that rounding does not explain.

    Returns
    -------
    str
        The path of the file.

    Raises
    ------
    TypeError
        If an argument is none of these.
    ValueError
        If a file is not what it should be, `path` is `symbol`, parameters or `shapes` do not fit,
        or the graphs do not agree; the node is named. Nothing is written.
    OSError
        If a file cannot be read or written.

    Notes
    -----
    Kept as they are: a norm whose input has an unknown rank, in a loop, of a variant that the
    file does not describe, MXNet's with its statistics as outputs or for float16.

    To the second file all parameters are arguments, also running statistics, which are auxiliary
    states of the first. So train with the first: a Trainer would move them by their gradients.
    Load the second with ``ignore_extra=True`` (``SymbolBlock.imports``) or ``allow_extra=True``
    (``Module.set_params``) if the model has parameters that only training needs: the count of
    batches of ``momentum=None``. It can be cast to float64, to float16 it cannot.

    Examples
    --------
    >>> import tempfile
    >>> import mxnet as mx
    >>> from scratchbn import ScratchBatchNorm
    >>> net = mx.gluon.nn.HybridSequential()
    >>> net.add(mx.gluon.nn.Conv2D(8, 3), ScratchBatchNorm())
    >>> net.initialize()
    >>> net.hybridize()
    >>> x = mx.nd.ones((1, 3, 8, 8))
    >>> y = net(x)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     net.export(f"{directory}/net")
    ...     path = write_inference_symbol(f"{directory}/net-symbol.json")
    ...     served = mx.gluon.SymbolBlock.imports(path, ["data"], f"{directory}/net-0000.params")
    >>> bool(mx.nd.abs(served(x) - y).max() < 1e-5)
    True
    """
    return write_compared(symbol, path, params=params, shapes=shapes, verify=verify)[0]


def write_compared(
    symbol: PathLike,
    path: PathLike | None,
    *,
    params: PathLike | None,
    shapes: Mapping[str, Iterable[int]] | None,
    verify: bool,
) -> tuple[str, Comparison]:
    """Write a symbol file for inference; returns its path, and what was measured."""
    check_flag("verify", verify)
    for name, value in (("symbol", symbol), ("path", path), ("params", params)):
        optional = name != "symbol" and value is None
        if not optional and not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    source = Path(symbol)
    target = Path(path) if path is not None else source.with_name(_name(source.name))
    check_directory(target)
    if target.resolve() == source.resolve():
        raise ValueError(f"path must not be that of symbol, got {os.fspath(target)!r}")
    params = params if params is not None else _newest(source)
    before = load_symbol(source)
    values = {} if params is None else load_params(params)
    values = {plain_name(name): value for name, value in values.items()}
    known = known_shapes(before, values, shapes)
    after = _inference_symbol(before, values, known)
    comparison = NOT_MADE
    if verify:
        comparison = compare((before, values), (after, values), known)
    write_text(target, after.tojson(remove_amp_cast=False))
    return str(target), comparison


def _name(name: str) -> str:
    if name.endswith(_ENDING):
        return f"{name.removesuffix(_ENDING)}-infer{_ENDING}"
    return f"{Path(name).stem}-infer{Path(name).suffix}"


def _newest(symbol: Path) -> Path | None:
    """Return the parameter file of a symbol that was written last, if there is one."""
    pattern = re.compile(re.escape(symbol.name.removesuffix(_ENDING)) + r"-\d{4}\.params")
    found = [p for p in symbol.parent.iterdir() if pattern.fullmatch(p.name)]
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name), default=None)


def _inference_symbol(symbol: Any, values: Mapping[str, Any], shapes: Shapes) -> Any:
    """Return the inference graph of a symbol; `values` and `shapes` as far as they are known."""
    more = {node.name for node in with_more_outputs(Graph(symbol))}
    finds = (described, partial(_builtin, more=more))
    measure = partial(_facts, values=values, shapes=shapes)
    graph = rewrite(symbol, finds, measure).graph
    if graph is None:
        return symbol
    for name, node in graph.variables().items():
        if name in values:
            # Module infers shapes from the inputs alone, and not through what a norm has become.
            node.attrs["__shape__"] = str(values[name].shape)
    return graph.symbol()


def _builtin(node: Node, variables: Mapping[str, Node], more: set[str]) -> Call | None:
    """Return the call that one of MXNet's norms is; `more` names those with other outputs used."""
    if node.op not in BATCH_NORM_OPERATORS or obstacle(node, has_more=node.name in more):
        return None
    return Call(
        Output(node),
        node.inputs[0],
        tuple(node.inputs[1:5]),
        axis=node.integer("axis", 1),
        epsilon=epsilon_of(node),
        scale=not node.flag("fix_gamma", True),
        center=True,
        relu="Activation" if node.op == "_contrib_BatchNormWithReLU" else None,
    )


def _facts(
    graph: Graph, calls: list[Call], values: Mapping[str, Any], shapes: Shapes
) -> list[Fact]:
    """Find out what can be known of the inputs of calls."""
    for call in calls:
        names = {source.node.name: source.node.name for source in call.parameters}
        if values:
            check_parameters(call.node, names, values)
    part = graph.symbol([call.node.inputs[0] for call in calls])
    types, found = types_and_shapes(part, values, shapes, {})
    ranks = ranks_of(graph)
    return [
        Fact(len(shape) or ranks.get(call.node.inputs[0].node), _channels(call, values), dtype)
        for call, shape, dtype in zip(calls, found or [()] * len(calls), types)
    ]


def _channels(call: Call, values: Mapping[str, Any]) -> int | None:
    gamma, before = call.parameters[0].node.name, call.node.inputs[0].node
    if gamma in values:
        return int(values[gamma].size)
    stated = before.attrs.get("num_filter", before.attrs.get("num_hidden"))
    return int(stated) if stated is not None and has_bias_per_channel(before) else None
