"""A copy of a net with MXNet's own batch norm, for tools of MXNet that know layers by operator."""

from __future__ import annotations

from typing import Any
from warnings import warn

import mxnet as mx
from mxnet.gluon import SymbolBlock

from .._graph.arrays import is_numpy, to_numpy
from .._graph.nodes import Graph
from .._net import check_block, flatten, variables_of
from ..backends import use_backend
from ._files import named_for_file
from ._to_builtin import to_builtin
from ._trace import traced, values_of

__all__ = ["builtin_copy"]


class _Copy(SymbolBlock):
    """A SymbolBlock that refuses further inputs with a TypeError, as ``quantize_net`` expects."""

    def forward(self, x: Any, *more: Any) -> Any:
        wanted, given = len(variables_of(self)), len(flatten((x, *more))[0])
        if given != wanted:
            raise TypeError(f"the net takes {wanted} inputs, got {given}")
        return super().forward(x, *more)


def builtin_copy(net: Any, *example_inputs: Any) -> SymbolBlock:
    """Return a copy of a net in which each of our layers is MXNet's ``BatchNorm``.

    For what looks at the operators of a net: ``quantize_net`` and ``amp.convert_hybrid_block`` of
    ``mx.contrib``, ``mx.viz.print_summary``. The net itself stays as it is, which
    :func:`scratchbn.to_builtin` would change.

    Parameters
    ----------
    net : Block
        Hybridizable and initialized, and run at least once if its shapes were deferred.
    *example_inputs : NDArray, or nested list of NDArray
        Inputs as the net takes them; only their number and nesting matter. One input is called
        ``data``, several are ``data0``, ``data1``, ..., as in ``net.export``.

    Returns
    -------
    SymbolBlock
        Trainable, with Parameters of its own, of the same names and values, on the CPU.

    Raises
    ------
    TypeError
        If `net` is no Block, or an input no NDArray.
    ValueError
        If a parameter has no value yet, the net cannot be traced, or a layer has an option that
        ``BatchNorm`` does not have: ``momentum=None`` or ``unbiased_variance=True``.

    Warns
    -----
    UserWarning
        If a layer stays what it is: a variant, or one inside a loop.

    Examples
    --------
    >>> import mxnet as mx
    >>> from mxnet.gluon import nn
    >>> from scratchbn import ScratchBatchNorm
    >>> net = nn.HybridSequential(prefix="net_")
    >>> with net.name_scope():
    ...     net.add(nn.Dense(4, in_units=2), ScratchBatchNorm(in_channels=4))
    >>> net.initialize()
    >>> copy = builtin_copy(net, mx.nd.zeros((1, 2)))
    >>> copy(mx.sym.var("data")).list_outputs()
    ['net_batchnorm0_fwd_output']
    """
    check_block(net)
    symbol, inputs = traced(net, example_inputs, use_backend("portable"))
    values = values_of(net, [name for name in symbol.list_inputs() if name not in inputs])
    graph = Graph(symbol)
    report = to_builtin(graph, values)
    for entry in report.skipped:
        warn(f"{entry.path} was left as it is: {entry.text}", UserWarning, stacklevel=2)
    symbol = graph.symbol()
    variables = [mx.sym.var(name, dtype=array.dtype) for name, array in inputs.items()]
    if any(is_numpy(array) for array in inputs.values()):
        symbol, *variables = map(to_numpy, (symbol, *variables))
    block = _Copy(symbol, variables)
    copied = {name: value.copy() for name, value in named_for_file(symbol, values).items()}
    block.collect_params().load_dict(copied, mx.cpu(), cast_dtype=True, dtype_source="saved")
    return block
