"""Batch normalization for Apache MXNet Gluon, written from scratch.

Importing the package prepares the runtime (see ``scratchbn._runtime``); MXNet itself is imported
with the first public name that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _runtime

if TYPE_CHECKING:
    from ._backend import BackendError, get_backend, set_backend, use_backend
    from ._recalibrate import recalibrate
    from ._runtime import DeviceError, resolve_device
    from .convert import freeze, to_builtin, to_scratch, unfreeze
    from .deploy.convert_files import convert_files
    from .layer import ScratchBatchNorm, ScratchBatchNormReLU

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "DeviceError",
    "ScratchBatchNorm",
    "ScratchBatchNormReLU",
    "convert_files",
    "freeze",
    "get_backend",
    "recalibrate",
    "resolve_device",
    "set_backend",
    "to_builtin",
    "to_scratch",
    "unfreeze",
    "use_backend",
]

_ROOMS = {
    "BackendError": "_backend",
    "DeviceError": "_runtime",
    "ScratchBatchNorm": "layer",
    "ScratchBatchNormReLU": "layer",
    "convert_files": "deploy.convert_files",
    "freeze": "convert",
    "get_backend": "_backend",
    "recalibrate": "_recalibrate",
    "resolve_device": "_runtime",
    "set_backend": "_backend",
    "to_builtin": "convert",
    "to_scratch": "convert",
    "unfreeze": "convert",
    "use_backend": "_backend",
}

_unusable: ImportError | None = None
try:
    _runtime.prepare()
except ImportError as error:  # `python -m scratchbn doctor` must be able to report it
    _unusable = error


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _unusable is not None:
        raise _unusable
    try:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    except Exception as error:
        advice = _runtime.import_error_help(error)
        if advice is None:
            raise
        raise ImportError(advice) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
