"""Take a trained net out: inference files with the norms folded away, and ONNX.

:func:`export_inference` writes what every MXNet binding loads, :func:`fold` rewrites a model that
exists only as files, :func:`export_onnx` writes ONNX. These three lower the graph with the same
passes, ``_lower``, for :class:`~scratchbn.ScratchBatchNorm` and MXNet's own ``BatchNorm`` alike.
:func:`write_inference_symbol` writes a symbol for inference that shares the parameter file of the
one for training.
"""

from ._builtin_copy import builtin_copy
from ._files import load_params as load_params
from ._files import load_symbol as load_symbol
from ._files import write_model as write_model
from ._inference import complete_shapes as complete_shapes
from ._report import FoldReport
from .check import NotMeasuredError as NotMeasuredError
from .check import largest_difference as largest_difference
from .convert_files import convert_files
from .export import export_inference, fold
from .inference_symbol import write_compared as write_compared
from .inference_symbol import write_inference_symbol
from .onnx import export_onnx

__all__ = [
    "FoldReport",
    "builtin_copy",
    "convert_files",
    "export_inference",
    "export_onnx",
    "fold",
    "write_inference_symbol",
]
