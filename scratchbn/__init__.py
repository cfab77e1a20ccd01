"""Batch normalization for Apache MXNet Gluon, written from scratch.

Importing the package prepares for mxnet (see ``scratchbn.environment``); MXNet itself is imported
with the first public name that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import _interrupt  # noqa: F401  (before what takes time)
from .environment import help as _help
from .environment import prepare as _prepare
from .environment import work_space as _work_space

__version__ = "0.1.0"

# Each public name, and the room it lives in: imported when it is first asked for.
_ROOMS = {
    "ScratchBatchNorm": "layer",
    "ScratchBatchNormReLU": "layer",
    "ScratchSyncBatchNorm": "sync",
    "to_builtin": "convert",
    "to_scratch": "convert",
    "freeze": "freezing",
    "unfreeze": "freezing",
    "recalibrate": "recalibration",
    "convert_files": "deploy.convert_files",
    "BackendError": "backends",
    "get_backend": "backends",
    "set_backend": "backends",
    "use_backend": "backends",
    "set_inference_graph": "backends",
    "use_inference_graph": "backends",
    "describe": "description",
    "DeviceError": "environment.device",
    "resolve_device": "environment.device",
}
# A star import is no use of the layer for several devices, which asks for much work space.
__all__ = sorted(_ROOMS.keys() - {"ScratchSyncBatchNorm"})

_unusable: ImportError | None = None
try:
    _prepare.prepare()
except ImportError as error:  # `python -m scratchbn doctor` must be able to report it
    _unusable = error


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _unusable is not None:
        raise _unusable
    if name == "ScratchSyncBatchNorm":
        _work_space.give_work_space()
    try:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    except Exception as error:
        advice = _help.import_error_help(error)
        if advice is None:
            raise
        raise ImportError(advice) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
