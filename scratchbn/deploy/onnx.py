"""Write a net as an ONNX file, by MXNet's exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .._writing import PathLike, check_directory, write_files
from ._report import FoldReport
from ._trace import lowered

__all__ = ["export_onnx"]

# The newest opset that MXNet 1.9.1 writes nodes for, and the file version of its time.
_ONNX_OPSET, _ONNX_IR_VERSION = 13, 7


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
    except ImportError as error:
        raise ImportError("export_onnx needs onnx: pip install 'scratchbn[onnx]'") from error
    check_directory(path)
    symbol, values, inputs, report = lowered(net, example_inputs, folding=True, style="affine")
    inputs = {name: inputs[name] for name in symbol.list_inputs() if name in inputs}
    model = onnx.helper.make_model(
        _translated(symbol, values, inputs, dynamic_batch),
        producer_name="scratchbn",
        ir_version=_ONNX_IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", _ONNX_OPSET)],
    )
    onnx.checker.check_model(model)
    write_files({Path(path): lambda file: file.write_bytes(model.SerializeToString())})
    return report


def _translated(
    symbol: Any, values: dict[str, Any], inputs: dict[str, Any], dynamic_batch: bool
) -> Any:
    """Return the ONNX graph of a symbol, its outputs in order and its inputs alone."""
    from mxnet.onnx.mx2onnx._export_onnx import MXNetGraph
    from onnx.helper import np_dtype_to_tensor_dtype

    shapes = [array.shape for array in inputs.values()]
    types = [np_dtype_to_tensor_dtype(np.dtype(array.dtype)) for array in inputs.values()]
    dynamic = [("batch", *shape[1:]) for shape in shapes] if dynamic_batch else None
    try:
        graph = MXNetGraph().create_onnx_graph_proto(
            symbol,
            values,
            shapes,
            types,
            opset_version=_ONNX_OPSET,
            dynamic=dynamic_batch,
            dynamic_input_shapes=dynamic,
        )
    except Exception as error:  # the exporter raises anything, AssertionError included
        node = _local_of(error, MXNetGraph.convert_layer, "node")
        what = f"node {node['name']!r} ({node['op']})" if node else "the graph"
        raise ValueError(f"{what} cannot be translated to ONNX: {error}") from error
    _, outputs = MXNetGraph.get_outputs(symbol, values, shapes, None, types)
    by_name = {output.name: output for output in graph.output}
    if not set(outputs) <= by_name.keys() or len(outputs) != len(symbol):
        raise ValueError(f"the outputs need names of their own: {symbol.list_outputs()}")
    _rewrite(graph.output, [by_name[name] for name in outputs])
    # The exporter lists parameters as inputs too, which keeps runtimes from optimizing them.
    _rewrite(graph.input, [entry for entry in graph.input if entry.name in inputs])
    return graph


def _rewrite(entries: Any, new: list[Any]) -> None:
    del entries[:]
    entries.extend(new)


def _local_of(error: BaseException, function: Callable[..., Any], name: str) -> Any:
    """Return a local variable of `function`, if the error passed through it.

    The exporter does not say which node it failed on, and calls its methods by the name of its
    class, so that a subclass could not tell either. The traceback holds the frame that knows.
    """
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is function.__code__:
            return trace.tb_frame.f_locals[name]
        trace = trace.tb_next
    return None
