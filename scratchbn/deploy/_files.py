"""MXNet's model files: read with errors that say what is wrong, written whole or not at all."""

from __future__ import annotations

import json
import os
from ast import literal_eval
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mxnet as mx

from .._checks import check_integer
from .._graph.nodes import plain_numbers
from .._text import first_line
from .._writing import PathLike, write_files


def load_symbol(symbol: Any) -> Any:
    """Return a Symbol, read from a file if `symbol` is a path."""
    if isinstance(symbol, mx.sym.Symbol):
        text = symbol.tojson(remove_amp_cast=False)
        plain = _modern(json.loads(text))
        return symbol.as_nd_ndarray() if plain is None else mx.sym.load_json(plain)
    if not isinstance(symbol, (str, os.PathLike)):
        raise TypeError(f"symbol must be a Symbol or a path, got {type(symbol).__name__}")
    try:
        text = Path(symbol).read_text(encoding="utf-8")
        document = json.loads(text)
        text = _modern(document) or text
        nodes = [(node["op"], node["name"]) for node in document["nodes"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(symbol)!r} is not an MXNet symbol file") from error
    known = {"null", *mx.operator.get_all_registered_operators()}
    for op, name in nodes:
        if op not in known:
            raise ValueError(
                f"operator {op!r} of node {name!r} in {os.fspath(symbol)!r} is unknown to MXNet "
                f"{mx.__version__}"
            )
    try:
        return mx.sym.load_json(text)
    except mx.MXNetError as error:
        raise ValueError(
            f"{os.fspath(symbol)!r} is not a symbol that MXNet {mx.__version__} can load: "
            f"{first_line(error)}"
        ) from error


def _modern(document: dict[str, Any]) -> str | None:
    """Rewrite in a symbol's JSON what MXNet no longer reads; None if there is nothing.

    MXNet upgrades files of its former versions itself, but knows neither Python 2's longs nor the
    operator that cuDNN's batch normalization once was.
    """
    changed = False
    for node in document["nodes"]:
        if node["op"] == "CuDNNBatchNorm":
            node["op"], changed = "BatchNorm", True
        for key in ("param", "attr", "attrs"):  # of 0.x, and of 1.x
            attrs = node.get(key)
            if attrs:
                node[key] = plain_numbers(attrs)
                changed = changed or node[key] != attrs
    return json.dumps(document) if changed else None


def load_params(params: Any) -> dict[str, Any]:
    """Return parameters by name, read from a file if `params` is a path."""
    if isinstance(params, Mapping):
        for name, value in params.items():
            if not isinstance(name, str) or not isinstance(value, mx.nd.NDArray):
                raise TypeError(
                    f"params must map names to NDArrays, got {name!r}: {type(value).__name__}"
                )
        return {name: value.as_nd_ndarray() for name, value in params.items()}
    if not isinstance(params, (str, os.PathLike)):
        raise TypeError(f"params must be a dict or a path, got {type(params).__name__}")
    with open(params, "rb"):  # for an OSError that says why
        pass
    try:
        loaded = mx.nd.load(os.fspath(params))
    except mx.MXNetError as error:
        raise ValueError(
            f"{os.fspath(params)!r} is not an MXNet parameter file: {first_line(error)}"
        ) from error
    if not loaded:  # a net without parameters
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{os.fspath(params)!r} has {len(loaded)} arrays without names")
    return {name: value.as_nd_ndarray() for name, value in loaded.items()}


def write_model(prefix: PathLike, symbol: Any, values: Mapping[str, Any], epoch: int = 0) -> None:
    """Write ``PREFIX-symbol.json`` and ``PREFIX-0000.params``, both or none."""
    named = named_for_file(symbol, values)
    write_files(
        {
            Path(f"{os.fspath(prefix)}-symbol.json"): lambda file: file.write_text(
                symbol.tojson(remove_amp_cast=False), encoding="utf-8"
            ),
            Path(f"{os.fspath(prefix)}-{epoch:04d}.params"): lambda file: mx.nd.save(
                str(file), named
            ),
        }
    )


def plain_name(name: str) -> str:
    """Return a parameter's name without ``arg:`` or ``aux:``."""
    return name.removeprefix("arg:").removeprefix("aux:")


def named_for_file(symbol: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as MXNet's files name them, with ``arg:`` or ``aux:``, sorted."""
    auxiliary = set(symbol.list_auxiliary_states())
    plain = {plain_name(name): value for name, value in values.items()}
    return {f"{'aux' if n in auxiliary else 'arg'}:{n}": plain[n] for n in sorted(plain)}


def stated_shapes(symbol: Any, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a symbol's inputs, of those whose shape the symbol itself states."""
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


def known_shapes(
    symbol: Any, params: Mapping[str, Any], given: Mapping[str, Iterable[int]] | None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a symbol's inputs, stated or given.

    TypeError or ValueError if one that is given is no shape or of no input.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"shapes must map names of inputs to shapes, as {{'data': (1, 3, 224, 224)}}, "
            f"got {given!r}"
        )
    inputs = [name for name in symbol.list_inputs() if name not in params]
    more = {}
    for name, shape in (given or {}).items():
        if name not in inputs:
            raise ValueError(f"shapes must name inputs ({', '.join(inputs)}), got {name!r}")
        if isinstance(shape, str) or not isinstance(shape, Iterable):
            raise TypeError(f"shapes[{name!r}] must be a tuple of integers, got {shape!r}")
        more[name] = tuple(check_integer(f"shapes[{name!r}]", n, least=1) for n in shape)
    return {**stated_shapes(symbol, params), **more}
