"""Take a trained net out: inference files with the norms folded away, and ONNX.

:func:`export_inference` writes what every MXNet binding loads, :func:`fold` rewrites a model that
exists only as files, :func:`export_onnx` writes ONNX. All three lower the graph with the same
pass, ``_lower``, for :class:`~scratchbn.ScratchBatchNorm` and MXNet's own ``BatchNorm`` alike.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block
from mxnet.gluon.block import _flatten, _regroup
from mxnet.gluon.parameter import DeferredInitializationError

from ._files import (
    load_params,
    load_symbol,
    named_for_file,
    plain_name,
    write_model,
)
from ._ir import Graph
from ._lower import STYLES, Lowering, Row, variables_of
from ._text import first_line, table
from ._writing import PathLike, check_directory, write_files
from .backends.marker import inference_markers

__all__ = ["FoldReport", "export_inference", "export_onnx", "fold"]

_PARAMETER_NAME = re.compile(r"(weight|bias|gamma|beta|(running|moving)_(mean|var))$")

# The newest opset that MXNet 1.9.1 writes nodes for, and the file version of its time.
_ONNX_OPSET, _ONNX_IR_VERSION = 13, 7


@dataclass(frozen=True)
class FoldReport:
    """What became of each batch normalization; prints as a table.

    Attributes
    ----------
    folded : tuple of Row
        Those that cost nothing any more: folded into the layer before, or merged into the norm
        before.
    kept : tuple of Row
        Those that are still computed, each with the operator that does it, and the reason.
    """

    folded: tuple[Row, ...]
    kept: tuple[Row, ...]

    def __str__(self) -> str:
        summary = f"{len(self.folded)} folded, {len(self.kept)} kept"
        rows = [(row.node, row.result, row.because) for row in (*self.folded, *self.kept)]
        if not rows:
            return summary
        return f"{table(('layer', 'result', 'because'), rows)}\n{summary}"


def export_inference(
    net: Any,
    prefix: PathLike,
    *example_inputs: Any,
    fold: bool = True,
    style: str = "dwconv",
    epoch: int = 0,
) -> FoldReport:
    """Write a net's inference graph as ``PREFIX-symbol.json`` and ``PREFIX-0000.params``.

    No batch statistics, no Dropout and no update is left in it. Each batch normalization, ours or
    MXNet's, is folded into the weights of the Convolution, Deconvolution or dense layer before it
    where that is exact, or into the norm before it; the others become one multiplication and
    addition per channel. The constants are computed in float64 and rounded once. The net itself
    stays as it is, and the same net gives the same bytes.

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

    Returns
    -------
    FoldReport
        What was folded, what was kept, and why.

    Raises
    ------
    TypeError
        If `net` is no Block, or an input no NDArray.
    ValueError
        If an option or an input is wrong, a parameter has no value yet, or the net cannot be
        traced.
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
    _check_style(style)
    if isinstance(epoch, bool) or not isinstance(epoch, int):
        raise TypeError(f"epoch must be an integer, got {epoch!r}")
    if not 0 <= epoch <= 9999:
        raise ValueError(f"epoch must be between 0 and 9999, got {epoch!r}")
    check_directory(prefix)
    symbol, values, _, report = _lowered(net, example_inputs, fold=fold, style=style)
    write_model(prefix, symbol, values, epoch)
    return report


def fold(
    symbol: Any,
    params: Any,
    *,
    shapes: Mapping[str, Iterable[int]] | None = None,
    style: str = "dwconv",
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
        rank of its input, and stays a ``BatchNorm`` if that is not known.
    style : {'dwconv', 'affine', 'batchnorm'}
        See :func:`export_inference`.

    Returns
    -------
    symbol : Symbol
    params : dict of str to NDArray
        With ``arg:`` and ``aux:`` if the given names have them.
    report : FoldReport

    Raises
    ------
    TypeError
        If `symbol` or `params` is none of these.
    ValueError
        If a file is not what it should be, an operator is unknown, a parameter is missing, or
        shapes do not match.
    OSError
        If a file cannot be read.
    """
    _check_style(style)
    symbol, params = load_symbol(symbol), load_params(params)
    prefixed = any(name.startswith(("arg:", "aux:")) for name in params)
    values = {plain_name(name): value for name, value in params.items()}
    auxiliary = set(symbol.list_auxiliary_states())
    for name in symbol.list_inputs():
        if name not in values and (name in auxiliary or _PARAMETER_NAME.search(name)):
            raise ValueError(f"parameter {name!r} of the symbol is missing from params")
    known = stated_shapes(symbol, values)
    for name, shape in (shapes or {}).items():
        if name not in symbol.list_inputs() or name in values:
            inputs = [n for n in symbol.list_inputs() if n not in values]
            raise ValueError(f"shapes must name inputs ({', '.join(inputs)}), got {name!r}")
        known[name] = tuple(shape)
    lowering = Lowering(Graph(symbol), values, known, {})
    lowering.run(fold=True, style=style)
    result = lowering.graph.symbol()
    named = named_for_file(result, lowering.values) if prefixed else lowering.values
    return result, named, _report(lowering)


def export_onnx(
    net: Any, path: PathLike, *example_inputs: Any, dynamic_batch: bool = True
) -> FoldReport:
    """Write a net's inference graph as an ONNX file, with its batch normalizations folded.

    Parameters
    ----------
    net : Block
        As for :func:`export_inference`.
    path : str or path
        The file to write; its directory must exist.
    *example_inputs : NDArray, or nested list of NDArray
        Inputs as the net takes them; their shapes become the shapes of the ONNX inputs.
    dynamic_batch : bool
        Whether the first axis of every input may have any length.

    Returns
    -------
    FoldReport

    Raises
    ------
    ImportError
        If the package onnx is not installed.
    TypeError
        As for :func:`export_inference`.
    ValueError
        As for :func:`export_inference`, and if a node cannot be translated to ONNX.
    OSError
        If the file cannot be written.

    Notes
    -----
    Opset 13. MXNet 1.9.1 translates no 1-dimensional convolution, for example; the error names
    the node.
    """
    try:
        import onnx
        from mxnet.onnx.mx2onnx._export_onnx import MXNetGraph
    except ImportError as error:
        raise ImportError("export_onnx needs onnx: pip install 'scratchbn[onnx]'") from error
    check_directory(path)
    symbol, values, inputs, report = _lowered(net, example_inputs, fold=True, style="affine")
    inputs = {name: inputs[name] for name in symbol.list_inputs() if name in inputs}
    shapes = [array.shape for array in inputs.values()]
    dynamic = [("batch", *shape[1:]) for shape in shapes]
    types = [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(a.dtype)) for a in inputs.values()]
    converter = MXNetGraph()
    try:
        graph = converter.create_onnx_graph_proto(
            symbol,
            values,
            shapes,
            types,
            opset_version=_ONNX_OPSET,
            dynamic=dynamic_batch,
            dynamic_input_shapes=dynamic if dynamic_batch else None,
        )
    except Exception as error:  # the exporter raises anything, AssertionError included
        node = _local_of(error, MXNetGraph.convert_layer, "node")
        if node is None:
            raise ValueError(f"the graph cannot be translated to ONNX: {error}") from error
        raise ValueError(
            f"node {node['name']!r} ({node['op']}) cannot be translated to ONNX: {error}"
        ) from error
    _, outputs = MXNetGraph.get_outputs(symbol, values, shapes, None, types)
    by_name = {output.name: output for output in graph.output}
    if list(outputs) != [n for n in outputs if n in by_name] or len(outputs) != len(symbol):
        raise ValueError(f"the outputs need names of their own: {symbol.list_outputs()}")
    _rewrite(graph.output, [by_name[name] for name in outputs])
    # The exporter lists parameters as inputs too, which keeps runtimes from optimizing them.
    _rewrite(graph.input, [entry for entry in graph.input if entry.name in inputs])
    model = onnx.helper.make_model(
        graph,
        producer_name="scratchbn",
        ir_version=_ONNX_IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", _ONNX_OPSET)],
    )
    onnx.checker.check_model(model)
    write_files({Path(path): lambda file: file.write_bytes(model.SerializeToString())})
    return report


def _rewrite(entries: Any, new: list[Any]) -> None:
    del entries[:]
    entries.extend(new)


def _local_of(error: BaseException, function: Callable[..., Any], name: str) -> Any:
    """Return a local variable of `function`, if the error passed through it."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is function.__code__:
            return trace.tb_frame.f_locals[name]
        trace = trace.tb_next
    return None


# --- from a net -------------------------------------------------------------------------------


def _lowered(
    net: Any, example_inputs: tuple[Any, ...], *, fold: bool, style: str
) -> tuple[Any, dict[str, Any], dict[str, Any], FoldReport]:
    """Trace and lower a net; returns symbol, values, inputs by name, and the report."""
    if not isinstance(net, Block):
        raise TypeError(f"net must be a gluon Block, got {type(net).__name__}")
    symbol, inputs = _trace(net, example_inputs)
    graph = Graph(symbol)
    values = _values(net, [name for name in variables_of(graph) if name not in inputs])
    shapes = {name: array.shape for name, array in inputs.items()}
    dtypes = {name: array.dtype for name, array in inputs.items()}
    lowering = Lowering(graph, values, shapes, dtypes)
    lowering.run(fold=fold, style=style)
    return lowering.graph.symbol(), lowering.values, inputs, _report(lowering)


def _trace(net: Any, example_inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """Return the net's inference graph with a marker per norm, and its inputs by name."""
    if not example_inputs:
        raise ValueError("example_inputs must have the inputs the net takes, got none")
    try:
        flat, structure = _flatten(list(example_inputs), "input")
    except ValueError as error:
        raise TypeError(f"example_inputs must be NDArrays: {error}") from error
    arrays = [a for a in flat if a is not None]
    wrong = [type(a).__name__ for a in arrays if not isinstance(a, mx.nd.NDArray)]
    if wrong or not arrays:
        raise TypeError(f"example_inputs must be NDArrays, got {wrong[0] if wrong else None}")
    names = ["data"] if len(arrays) == 1 else [f"data{i}" for i in range(len(arrays))]
    inputs = dict(zip(names, arrays))
    variables = iter([_variable_like(array, name) for name, array in inputs.items()])
    symbols = [None if array is None else next(variables) for array in flat]
    arguments = _regroup(symbols, structure)
    # Names count from 0, so that they do not depend on what was traced before.
    with autograd.pause(), _without_hooks(net), mx.name.NameManager(), inference_markers():
        try:
            outputs = net(*arguments)
            flat_outputs, _ = _flatten(outputs, "output")
        except Exception as error:  # user code, run on symbols
            raise ValueError(
                f"{type(net).__name__} cannot be traced, is every block in it hybridizable? "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
    return mx.sym.Group([o.as_nd_ndarray() for o in flat_outputs if o is not None]), inputs


def _variable_like(array: Any, name: str) -> Any:
    variable = mx.sym.var(name)
    return variable.as_np_ndarray() if isinstance(array, mx.np.ndarray) else variable


@contextmanager
def _without_hooks(net: Any) -> Iterator[None]:
    """Take the hooks off all blocks: written for arrays, they cannot handle symbols."""
    blocks: list[Any] = []
    net.apply(blocks.append)
    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                stack.callback(setattr, block, name, getattr(block, name))
                setattr(block, name, OrderedDict())
        yield


def _values(net: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return parameters as CPU arrays, averaged over devices as ``net.export`` does."""
    mx.nd.waitall()  # running statistics of a net with static_shape are not waited for otherwise
    parameters = {parameter.name: parameter for parameter in net.collect_params().values()}
    values = {}
    for name in names:
        if name not in parameters:
            raise ValueError(f"the net's graph uses {name!r}, which is none of its parameters")
        try:
            values[name] = parameters[name]._reduce().as_nd_ndarray()
        except (DeferredInitializationError, RuntimeError) as error:
            raise ValueError(
                f"parameter {name!r} has no value yet: "
                "initialize the net and run it once on an input"
            ) from error
    return values


def stated_shapes(symbol: Any, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a symbol's inputs, of those whose shape the symbol itself states.

    Parameters
    ----------
    symbol : Symbol
    params : mapping of str to NDArray
        What is in here is no input.

    Raises
    ------
    ValueError
        If a shape cannot be read.
    """
    attributes = symbol.attr_dict()
    parameters = {plain_name(name) for name in params}
    shapes = {}
    for name in symbol.list_inputs():
        text = attributes.get(name, {}).get("__shape__")
        if text is None or name in parameters:
            continue
        try:
            shapes[name] = tuple(int(length) for length in literal_eval(text))
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(f"attribute __shape__ of {name!r} is no shape: {text!r}") from error
    return shapes


def _report(lowering: Lowering) -> FoldReport:
    return FoldReport(tuple(lowering.folded), tuple(lowering.kept))


def _check_style(style: Any) -> None:
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")


# --- comparison -------------------------------------------------------------------------------


def largest_difference(
    before: tuple[Any, Mapping[str, Any]],
    after: tuple[Any, Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[float, float]:
    """Compare two graphs on the same random input, N(0, 1), in inference.

    Parameters
    ----------
    before, after : pair of Symbol and mapping of str to NDArray
    shapes : mapping of str to tuple of int
        Of every input.

    Returns
    -------
    difference, size : float
        The largest difference between two outputs, and the largest output of `before`, absolute.

    Raises
    ------
    ValueError
        If a graph cannot run on inputs of these shapes.
    """
    for name in before[0].list_inputs():
        if name not in shapes and name not in map(plain_name, before[1]):
            raise ValueError(f"shapes must have the shape of input {name!r}, got {dict(shapes)}")
    rng = np.random.default_rng(0)
    dtypes = {plain_name(name): value.dtype for name, value in before[1].items()}
    known = {k: v for k, v in dtypes.items() if k in before[0].list_inputs()}
    types, _, _ = before[0].infer_type_partial(**known)
    dtypes.update(zip(before[0].list_arguments(), types or []))
    inputs = {}
    for name, shape in shapes.items():
        dtype = dtypes.get(name) or np.float32
        inputs[name] = mx.nd.array(rng.normal(size=shape), dtype=dtype)
    one, other = (_run(symbol, params, inputs) for symbol, params in (before, after))
    difference = max(float(np.abs(a - b).max()) for a, b in zip(one, other))
    return difference, max(float(np.abs(a).max()) for a in one)


def _run(symbol: Any, params: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[np.ndarray]:
    values = {plain_name(name): value for name, value in params.items()}
    values.update(inputs)
    try:
        executor = symbol.bind(
            mx.cpu(),
            {name: values[name] for name in symbol.list_arguments()},
            aux_states={name: values[name].copy() for name in symbol.list_auxiliary_states()},
            grad_req="null",
        )
        return [y.asnumpy().astype(np.float64) for y in executor.forward(is_train=False)]
    except mx.MXNetError as error:
        shapes = {name: array.shape for name, array in inputs.items()}
        raise ValueError(f"the model cannot run on {shapes}: {first_line(error)}") from error
