"""Write a net as an ONNX file, by MXNet's exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..._checks import check_flag, check_integer
from ..._writing import PathLike, check_directory, write_files
from ...environment.install import install_command
from .._report import FoldReport
from .._trace import lowered

__all__ = ["export_onnx"]

_FIRST_OPSET, _LAST_OPSET = 12, 17


def export_onnx(
    net: Any,
    path: PathLike,
    *example_inputs: Any,
    dynamic_batch: bool = True,
    opset: int = 13,
) -> FoldReport:
    """Write a net's inference graph as an ONNX file, with its batch normalizations folded.

    Before the file is written it is run, and compared with the net: on the example inputs, and
    with `dynamic_batch` on a batch of one and on a larger one. A file that would be wrong is
    refused, with the name of the node that differs first.

    Parameters
    ----------
    net : Block
        As for :func:`export_inference`.
    path : str or path
        The file to write; its directory must exist.
    *example_inputs : NDArray, or nested list of NDArray
        Inputs as the net takes them; their shapes become the shapes of the ONNX inputs. Real data
        checks more than random numbers, which check more than zeros.
    dynamic_batch : bool
        Whether the first axis of every input may have any length.
    opset : int
        The version of ONNX's operators, 12 to 17. Newer versions are read by newer runtimes only.

    Returns
    -------
    FoldReport

    Raises
    ------
    ImportError
        If the package onnx is not installed.
    TypeError
        As for :func:`export_inference`, and if an option is of the wrong type.
    ValueError
        As for :func:`export_inference`, and if `opset` is out of range, if a node cannot be
        translated, if the file cannot be run or its results are not the net's, and if
        `dynamic_batch` is asked for and the net runs on no other batch.
    OSError
        If the file cannot be written.

    Notes
    -----
    The model is run by onnxruntime where that is installed, else by the evaluator of the package
    onnx. An example that is the same number everywhere is joined by random numbers. The net itself
    is run in inference; its hooks are not called. float16 that MXNet cannot run on a CPU is
    compared with the inference graph in float32.

    Inputs that the outputs do not depend on, as the labels of a loss, are no inputs of the file.
    """
    check_flag("dynamic_batch", dynamic_batch)
    if not _FIRST_OPSET <= check_integer("opset", opset) <= _LAST_OPSET:
        raise ValueError(f"opset must be between {_FIRST_OPSET} and {_LAST_OPSET}, got {opset!r}")
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export_onnx needs onnx: {install_command('onnx')}") from error
    check_directory(path)
    symbol, values, inputs, report = lowered(net, example_inputs, folding=True, style="affine")

    from ._checked import checked_model  # needs onnx

    model = checked_model(
        net, example_inputs, symbol, values, inputs, dynamic_batch=dynamic_batch, opset=opset
    )
    write_files({Path(path): lambda file: file.write_bytes(model.SerializeToString())})
    return report
