"""``BatchNorm`` nodes <-> our training graph in models that exist as files.

What ``convert`` does to the layers of a net, on the graph that ``net.export`` wrote. Parameters
keep their names and values; only the operators between them change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .._checks import check_choice, check_flag
from .._conversion_report import ConversionReport
from .._graph.nodes import Graph
from ._files import known_shapes, load_params, load_symbol, plain_name
from ._to_builtin import to_builtin
from ._to_scratch import to_scratch
from ._verify import verified

__all__ = ["TARGETS", "convert_files"]

TARGETS = {"builtin": to_builtin, "scratch": to_scratch}


def convert_files(
    symbol: Any,
    params: Any,
    *,
    to: str,
    shapes: Mapping[str, Iterable[int]] | None = None,
    verify: bool = True,
) -> tuple[Any, dict[str, Any], ConversionReport]:
    """Exchange the batch normalizations of a model that exists as symbol and parameters.

    To ``'builtin'``, the training graph of each :class:`~scratchbn.ScratchBatchNorm`, as
    ``net.export`` writes it, becomes MXNet's ``BatchNorm`` node, for programs that expect that
    operator. To ``'scratch'``, each ``BatchNorm`` node becomes our training graph, as do
    ``BatchNorm_v1`` and ``SyncBatchNorm``, whose statistics are those of one device from then on.
    Training goes on from either; the names and values of the parameters stay.

    Parameters
    ----------
    symbol : Symbol, str or path
        The graph, or a ``-symbol.json`` file.
    params : dict of str to NDArray, str or path
        Parameters, or a ``.params`` file. Names with or without ``arg:`` and ``aux:``.
    to : {'builtin', 'scratch'}
        What to turn the batch normalizations into.
    shapes : mapping of str to tuple of int, optional
        Shapes of the inputs, of those that the symbol does not state. Converting does not need
        them; without them nothing can be compared, which ``report.comparison`` says.
    verify : bool
        Whether to compare both models on random input, N(0, 1), in inference, and refuse a
        difference that rounding does not explain.

    Returns
    -------
    symbol : Symbol
    params : dict of str to NDArray
        As given.
    report : ConversionReport
        What was converted; what was kept, and why (in a loop, in int8, fused by oneDNN, a layer
        that the graph does not describe); what is to be minded. An entry has the layer's name in
        `path`, its node's in `name`.

    Raises
    ------
    TypeError
        If an argument is none of these.
    ValueError
        If `to` is neither of the two, a file is not what it should be, an operator is unknown, a
        parameter is missing or of the wrong shape, a layer has an option that ``BatchNorm`` does
        not have (``momentum=None``, ``unbiased_variance=True``), `shapes` do not fit, or the
        converted model is not the model; the node is named.
    OSError
        If a file cannot be read.

    Examples
    --------
    >>> import mxnet as mx
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
    check_choice("to", to, TARGETS)
    check_flag("verify", verify)
    symbol, params = load_symbol(symbol), load_params(params)
    values = {plain_name(name): value for name, value in params.items()}
    known = known_shapes(symbol, values, shapes)
    graph = Graph(symbol)
    report = TARGETS[to](graph, values)
    converted = graph.symbol()
    if verify:
        report = verified(report, (symbol, values), (converted, values), known)
    return converted, params, report
