"""Write a net, or a model that exists as files, as an inference graph of MXNet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .._checks import check_choice, check_flag, check_integer
from .._graph.nodes import Graph
from .._writing import PathLike, check_directory
from ._files import (
    known_shapes,
    load_params,
    load_symbol,
    named_for_file,
    plain_name,
    write_model,
)
from ._lower import STYLES, lower
from ._report import FoldReport
from ._trace import lowered, training_model
from ._verify import verified

__all__ = ["export_inference", "fold"]

_PARAMETER_NAME = re.compile(r"(weight|bias|gamma|beta|(running|moving)_(mean|var))$")


def export_inference(
    net: Any,
    prefix: PathLike,
    *example_inputs: Any,
    fold: bool = True,
    style: str = "dwconv",
    epoch: int = 0,
    verify: bool = True,
) -> FoldReport:
    """Write a net's inference graph as ``PREFIX-symbol.json`` and ``PREFIX-0000.params``.

    No batch statistics, no Dropout and no update is left in it. Each batch normalization, ours or
    MXNet's, is folded into the weights of the Convolution, Deconvolution or dense layer before it
    where that is exact, past a concatenation, a reshape and arithmetic with scalars too, or into
    the norm before it, else into the dense layers and convolutions without padding that follow;
    the others become one multiplication and addition per channel. The constants are computed in
    float64 and rounded once. The net itself stays as it is, and the same net gives the same bytes.

    Parameters
    ----------
    net : Block
        Initialized, and run at least once if its shapes were deferred.
    prefix : str or path
        Start of the two file names; its directory must exist. Existing files are replaced, both
        or none.
    *example_inputs : NDArray, or nested list of NDArray
        Inputs as the net takes them; only their shapes and dtypes matter. One input is called
        ``data`` in the file, several are ``data0``, ``data1``, ..., as in ``net.export``.
    fold : bool
        Whether to fold at all.
    style : {'dwconv', 'affine', 'batchnorm'}
        How to write a norm that cannot be folded: as a 1x1 depthwise Convolution, the fastest on
        a CPU, where the input has 3 to 5 axes, channels second, and is not float16, elsewhere
        like ``'affine'``; as ``broadcast_mul`` and ``broadcast_add``; or as MXNet's ``BatchNorm``
        with ``use_global_stats``, for programs that expect that operator.
    epoch : int
        The four digits in the name of the parameter file, 0 to 9999.
    verify : bool
        Whether to compare the files with the net before they are written, on the example inputs,
        or on random ones of that shape if an example is the same number everywhere. A difference
        that rounding does not explain is refused.

    Returns
    -------
    FoldReport
        What was folded, what was kept, and why; and what was measured.

    Raises
    ------
    TypeError
        If `net` is no Block, an input no NDArray, or an option of the wrong type.
    ValueError
        If an option or an input is wrong, a parameter has no value yet, the net cannot be traced,
        or the files would not be the net; the node is named.
    OSError
        If a file cannot be written.

    Notes
    -----
    ``scale * x + shift`` loses digits where ``|mean|`` is far larger than the standard deviation:
    a mean of 1000 standard deviations costs three. Files written under ``npx.set_np`` load only
    under ``npx.set_np``, and others only without, as with ``net.export``.

    Examples
    --------
    >>> import tempfile
    >>> import mxnet as mx
    >>> from mxnet.gluon import nn
    >>> from scratchbn import ScratchBatchNorm
    >>> net = nn.HybridSequential(prefix="net_")
    >>> with net.name_scope():
    ...     net.add(nn.Conv2D(8, 3), ScratchBatchNorm())
    >>> net.initialize()
    >>> image = mx.nd.zeros((1, 3, 8, 8))
    >>> _ = net(image)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     print(export_inference(net, f"{directory}/net", image))
    layer               result                     because
    net_batchnorm0_fwd  folded into net_conv0_fwd
    1 folded, 0 kept
    """
    check_choice("style", style, STYLES)
    if not 0 <= check_integer("epoch", epoch) <= 9999:
        raise ValueError(f"epoch must be between 0 and 9999, got {epoch!r}")
    check_directory(prefix, "prefix")
    check_flag("verify", verify)
    symbol, values, inputs, report = lowered(net, example_inputs, folding=fold, style=style)
    if verify:
        model = training_model(net, example_inputs)
        report = verified(report, model, (symbol, values), {}, inputs=inputs)
    write_model(prefix, symbol, values, epoch)
    return report


def fold(
    symbol: Any,
    params: Any,
    *,
    shapes: Mapping[str, Iterable[int]] | None = None,
    style: str = "dwconv",
    verify: bool = True,
) -> tuple[Any, dict[str, Any], FoldReport]:
    """Fold the batch normalizations of a model that exists as symbol and parameters.

    Works on MXNet's ``BatchNorm`` nodes in any MXNet model. Our training graph, as
    ``net.export`` writes it, is reduced to its inference branch, and folded if the file describes
    its layers.

    Parameters
    ----------
    symbol : Symbol, str or path
        The graph, or a ``-symbol.json`` file.
    params : dict of str to NDArray, str or path
        Parameters, or a ``.params`` file. Names with or without ``arg:`` and ``aux:``.
    shapes : mapping of str to tuple of int, optional
        Shapes of the inputs. Folding does not need them; a norm that cannot be folded needs the
        rank of its input, and stays a ``BatchNorm`` if that is not known. Nor can anything be
        compared then, which ``report.comparison`` says.
    style : {'dwconv', 'affine', 'batchnorm'}
        See :func:`export_inference`.
    verify : bool
        Whether to compare both models on random input, N(0, 1), and refuse a difference that
        rounding does not explain.

    Returns
    -------
    symbol : Symbol
    params : dict of str to NDArray
        With ``arg:`` and ``aux:`` if the given names have them.
    report : FoldReport

    Raises
    ------
    TypeError
        If an argument is none of these.
    ValueError
        If a file is not what it should be, an operator is unknown, a parameter is missing, shapes
        do not match, or the folded model is not the model; the node is named.
    OSError
        If a file cannot be read.
    """
    check_choice("style", style, STYLES)
    check_flag("verify", verify)
    symbol, params = load_symbol(symbol), load_params(params)
    before = symbol, params
    prefixed = any(name.startswith(("arg:", "aux:")) for name in params)
    values = {plain_name(name): value for name, value in params.items()}
    auxiliary = set(symbol.list_auxiliary_states())
    for name in symbol.list_inputs():
        if name not in values and (name in auxiliary or _PARAMETER_NAME.search(name)):
            raise ValueError(f"parameter {name!r} of the symbol is missing from params")
    known = known_shapes(symbol, values, shapes)
    symbol, values, report = lower(Graph(symbol), values, known, {}, folding=True, style=style)
    if verify:
        report = verified(report, before, (symbol, values), known)
    return symbol, named_for_file(symbol, values) if prefixed else values, report
