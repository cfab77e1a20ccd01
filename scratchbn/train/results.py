"""The files of a net that has been trained: whole, read back, and somewhere in any case."""

from __future__ import annotations

import json
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mxnet as mx
import numpy as np
from mxnet import gluon

from .._text import first_line
from .._writing import staged_folder
from ..deploy import write_inference_symbol
from ..parity import Report
from .checkpoint import WriteError

__all__ = ["check_metrics", "earlier_results", "finite_or_none", "save_net", "write_or_elsewhere"]

Result = TypeVar("Result")

# Options that say where and how a run is done, not what it computes.
_FREE = (
    "checkpoint_every", "debug", "device", "join_timeout", "kvstore", "monitor", "out",
    "resume", "seeds", "timeout",
)  # fmt: skip


def write_or_elsewhere(
    directory: Path, write: Callable[[Path], Result]
) -> tuple[Result, Path, str | None]:
    """Write files to a directory, or to a new one for temporary files if the disk refuses.

    Parameters
    ----------
    directory : Path
    write : callable
        Receives an empty directory and writes the files into it.

    Returns
    -------
    result
        What `write` returned.
    directory : Path
        Where the files are.
    refused : str or None
        The directory that refused, and why.

    Raises
    ------
    WriteError
        If the second directory refuses too.
    """
    try:
        with staged_folder(directory) as folder:
            result = write(folder)
    except OSError as error:
        refused = f"{directory}: {error.strerror or error}"
    else:
        return result, directory, None
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix="scratchbn-"))
        with staged_folder(elsewhere) as folder:
            return write(folder), elsewhere, refused
    except OSError as error:
        raise WriteError(f"cannot write to {refused}; nor to a second place: {error}") from error


def save_net(net: gluon.HybridBlock, sample: Any, stem: Path) -> float:
    """Write the files of a net, and read them back.

    They are ``STEM.params``, ``STEM-symbol.json`` and ``STEM-0000.params``, and
    ``STEM-infer-symbol.json``, a graph of the same parameters that only infers, and is faster.

    Parameters
    ----------
    net : HybridBlock
    sample : NDArray
        What it is called with.
    stem : Path

    Returns
    -------
    float
        How far the output of a symbol read back is from the net's, at most.

    Raises
    ------
    OSError
        If the disk refuses.
    """
    expected = net(sample)
    net.hybridize()
    net(sample)
    parameters, symbol, values = f"{stem}.params", f"{stem}-symbol.json", f"{stem}-0000.params"
    differences = []
    try:
        net.save_parameters(parameters)
        mx.nd.load(parameters)  # for closing a file may fail in silence
        net.export(str(stem))
        # Not verified by that function: it is compared here.
        infer = write_inference_symbol(symbol, params=values, verify=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Cannot decide type")  # of data; it is float32
            for file in (symbol, infer):
                imported = gluon.SymbolBlock.imports(file, ["data"], values, ctx=sample.context)
                differences.append(float((imported(sample) - expected).abs().max().asscalar()))
    except mx.MXNetError as error:
        raise OSError(first_line(error)) from error
    return float(np.max(differences))  # keeps NaN


def earlier_results(directory: Path, options: Namespace, data: str) -> str | None:
    """Say of which run a directory holds results; None if of none.

    Parameters
    ----------
    directory : Path
    options : Namespace
        Those of this run; what was otherwise is said.
    data : str
        The name of this run's data set.
    """
    had = options_of(directory)
    if had is None:
        return "results" if (directory / "metrics.json").exists() else None
    wanted = deciding(options, data)
    other = [
        f"--{name.replace('_', '-')} {had.get(name)}"
        for name in wanted
        if had.get(name) != wanted[name]
    ]
    return f"the results of a run with {' '.join(other) or 'the same options'}"


def options_of(directory: Path) -> dict[str, Any] | None:
    """Return the options and the data of the run whose results a directory holds."""
    try:
        metrics = json.loads((directory / "metrics.json").read_text("utf-8"))
        return {**metrics["options"], "data": metrics["data"]["name"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def deciding(options: Namespace, data: str) -> dict[str, Any]:
    """Return the options that results depend on."""
    kept = {name: value for name, value in vars(options).items() if name not in _FREE}
    return {**kept, "data": data}


def check_metrics(check: Report | None) -> dict[str, Any]:
    """Return what metrics.json holds of the cross-check."""
    if check is None:
        return {"ok": None, "max_abs_diff": {}}
    largest: dict[str, float] = {}
    for row in check.rows:  # np.maximum keeps NaN
        largest[row.kind] = float(np.maximum(row.absolute, largest.get(row.kind, 0.0)))
    finite = {kind: finite_or_none(value) for kind, value in largest.items()}
    return {**check.to_dict(), "ok": bool(check), "max_abs_diff": finite}


def finite_or_none(value: float) -> float | None:
    """Return what JSON can hold of a number."""
    return value if np.isfinite(value) else None
