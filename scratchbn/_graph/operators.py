"""MXNet's operators as they are, whatever AMP has put in their place.

``amp.init`` replaces functions of ``mx.sym`` by others that cast what they are given, and a layer
that computes in float32 on purpose must not be composed by those: `BlockGrad` of a float64 would
become float32, and the function for ``ones``, which takes no array, cannot be called at all.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import mxnet as mx

from .arrays import Array, is_symbol

_AMP = "mxnet.contrib.amp.amp"
# What functions of MXNet written in Python call operators by.
_DOORS = {"_internal", "op"}


def amp_is_on() -> bool:
    """Tell whether ``amp.init`` has been called."""
    return bool(getattr(sys.modules.get(_AMP), "_amp_initialized", False))


def original(function: Any) -> Any:
    """Return what AMP's replacement of a function calls; the function itself if it is none."""
    amp = sys.modules.get(_AMP)
    while getattr(function, "__globals__", None) is vars(amp or sys) and function.__closure__:
        function = inspect.getclosurevars(function).nonlocals["f"]
    return function


class Operators:
    """The functions of a module of operators on symbols, without AMP's; they return `Plain`."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, ModuleType):
            found = Operators(found)
        elif isinstance(found, FunctionType):
            found = _plain_function(original(found))
        setattr(self, name, found)
        return found


class Plain(mx.sym.Symbol):
    """A symbol whose arithmetic and methods are MXNet's own."""

    __slots__ = ()


def plain(x: Array) -> Array:
    """Return a symbol of the same node that is `Plain`; what is no symbol as it is."""
    return _marked(x.as_np_ndarray().as_nd_ndarray()) if is_symbol(x) else x


def ordinary(y: Array) -> Array:
    """Make a `Plain` symbol an ordinary one."""
    y.__class__ = mx.sym.Symbol
    return y


def _marked(result: Any) -> Any:
    if type(result) is mx.sym.Symbol:
        result.__class__ = Plain
    return result


def _plain_function(function: FunctionType) -> Callable[..., Any]:
    code, scope = function.__code__, function.__globals__
    if _DOORS & set(code.co_names):
        doors = {name: Operators(scope[name]) for name in _DOORS & set(scope)}
        function = FunctionType(
            code,
            {**scope, **doors},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )

    def plain_function(*args: Any, **kwargs: Any) -> Any:
        return _marked(function(*args, **kwargs))

    return plain_function


def _override_methods() -> None:
    for name, method in vars(mx.sym.Symbol).items():
        calls = {*_DOORS, "Symbol"}
        if isinstance(method, FunctionType) and calls & set(method.__code__.co_names):
            setattr(Plain, name, _plain_function(method))


_override_methods()
F = Operators(mx.sym)
