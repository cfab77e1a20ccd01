"""Run an ONNX model: by onnxruntime where it is installed, else by onnx's own evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

Arrays = Mapping[str, np.ndarray]


class NotRunnable(Exception):
    """The model was refused by the checker or by the runtime, which said why."""


class Running:
    """A model that is ready to run; raises NotRunnable if it cannot be."""

    def __init__(self, model: Any) -> None:
        self.outputs = [entry.name for entry in model.graph.output]
        try:
            self._session = _session(model)
        except Exception as error:  # each runtime raises what it likes
            raise NotRunnable(first_said(error)) from error

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        """Return the outputs in order."""
        try:
            return list(self._session.run(self.outputs, dict(inputs)))
        except Exception as error:  # each runtime raises what it likes
            raise NotRunnable(first_said(error)) from error


def runtime_name() -> str:
    """Return the name of the runtime that models are run with."""
    try:
        import onnxruntime
    except ImportError:
        return f"onnx {onnx.__version__}"
    return f"onnxruntime {onnxruntime.__version__}"


def _session(model: Any) -> Any:
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def first_said(error: BaseException) -> str:
    """Return the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
