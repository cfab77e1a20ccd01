"""Compare two normalization layers, or two whole nets, tensor by tensor.

:func:`compare` gives two nets the same parameters, data and output gradients and says where they
differ. :func:`run_grid` does that for a layer class and a reference over :func:`standard_grid`.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import indent
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, Constant, Parameter, nn
from mxnet.gluon.nn.basic_layers import _BatchNorm

from ._text import table
from ._writing import PathLike, write_text
from .layer import ScratchBatchNorm

__all__ = ["Case", "Report", "Row", "compare", "run_grid", "standard_grid"]

Array = Any
Values = dict[str, np.ndarray]
Key = tuple[str, str]  # kind, tensor

MODES: dict[str, dict[str, bool]] = {
    "eager": {"active": False},
    "hybrid": {"active": True},
    "static": {"active": True, "static_alloc": True, "static_shape": True},
}
OUTPUT, INPUT_GRADIENT, PARAMETER_GRADIENT, STATISTIC, ERROR = (
    "output",
    "input gradient",
    "parameter gradient",
    "statistic",
    "error",
)

# (rtol, atol) by dtype: some thousand roundings, so that the order of a sum does not matter.
_TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-5), "float16": (5e-3, 5e-3)}
# Running statistics are one mean and one weighted sum away from the data: a few roundings.
_STATISTICS = {"float64": (1e-12, 1e-14), "float32": (1e-5, 1e-7), "float16": (1e-5, 1e-7)}
# The built-in multiplies by a float32 momentum (0.9 is off by 2.4e-8, each step anew) and, for
# float16, rebuilds the variance from its sum with epsilon, rounded to float16.
_BUILTIN_STATISTICS = {"float64": (1e-6, 1e-8), "float32": (1e-5, 1e-6), "float16": (1e-3, 1e-5)}

# Streams of their own: output gradients drawn from the data's stream would be the data, for which
# the gradient of a normalization is zero.
_HEADS, _VALUES = 1, 2
_MOST_LINES = 40
_COLUMNS = ("tensor", "absolute", "relative", "allowed", "", "where")


# --- the report -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One comparison of one tensor.

    Attributes
    ----------
    kind : str
        ``'output'``, ``'input gradient'``, ``'parameter gradient'``, ``'statistic'``, or
        ``'error'`` for a net that MXNet could not run.
    tensor : str
        Its structural name, such as ``'0.gamma'``; ``'a'`` or ``'b'`` for an error.
    mode : str
        ``'eager'``, ``'hybrid'`` or ``'static'``.
    phase : str
        ``'train'``, ``'inference'`` or ``'frozen'``.
    step : int
        From 1.
    absolute : float
        Largest absolute difference of two elements; NaN if one is not finite or the tensors cannot
        be compared.
    relative : float
        `absolute` divided by the largest magnitude in either tensor.
    allowed : float
        The largest `absolute` that is in order.
    index : tuple of int or None
        Where the largest difference is.
    note : str
        Why the tensors could not be compared.
    case : str
        Which comparison of a grid this belongs to.
    """

    kind: str
    tensor: str
    mode: str
    phase: str
    step: int
    absolute: float
    relative: float
    allowed: float
    index: tuple[int, ...] | None = None
    note: str = ""
    case: str = ""

    @property
    def ok(self) -> bool:
        """Whether the difference is allowed; NaN never is."""
        return self.absolute <= self.allowed

    @property
    def excess(self) -> float:
        """`absolute` divided by `allowed`; infinite for NaN."""
        if math.isnan(self.absolute):
            return math.inf
        if self.absolute == 0:
            return 0.0
        return self.absolute / self.allowed if self.allowed > 0 else math.inf

    @property
    def where(self) -> str:
        """Mode, phase, step and index in words, or the note."""
        place = f"{self.mode} {self.phase} step {self.step}"
        if self.note:
            return f"{place}: {self.note}"
        return f"{place} at {self.index}" if self.index is not None else place


@dataclass(frozen=True)
class Report:
    """What a comparison found. True if everything held.

    Attributes
    ----------
    rows : tuple of Row
        Every comparison made.
    settings : dict
        What it was made with.
    notes : tuple of str
        What was left out, and why.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        header, lines, more = self.table()
        text = [self.verdict, indent(table(header, lines), "  ")]
        text += [f"  {more}"] if more else []
        return "\n".join([*text, *(f"  note: {note}" for note in self.notes)])

    @property
    def failures(self) -> list[Row]:
        """The rows out of tolerance."""
        return [row for row in self.rows if not row.ok]

    @property
    def verdict(self) -> str:
        """One line: held or failed, and out of how many comparisons."""
        failed = len(self.failures)
        if not self.rows:
            return "nothing was compared"
        return f"failed: {failed} of {len(self.rows)}" if failed else f"held: all {len(self.rows)}"

    def worst(self, key: Callable[[Row], Any]) -> dict[Any, Row]:
        """Return, for each value of `key`, its row with the largest difference.

        Parameters
        ----------
        key : callable
            Takes a Row and returns what to group it by.

        Returns
        -------
        dict
            In the order in which the values first appear. "Largest" is relative to what is
            allowed.
        """
        found: dict[Any, Row] = {}
        for row in self.rows:
            group = key(row)
            if group not in found or row.excess > found[group].excess:
                found[group] = row
        return found

    def table(self, most: int = _MOST_LINES) -> tuple[list[str], list[list[str]], str]:
        """Return the report as a table: a line per tensor, or per case of a grid.

        Parameters
        ----------
        most : int
            Number of lines; if there are more, those with the largest differences are kept.

        Returns
        -------
        header : list of str
        lines : list of list of str
        more : str
            How many lines were left out; empty if none.
        """
        grid = any(row.case for row in self.rows)
        rows = list(self.worst(lambda r: r.case if grid else (r.kind, r.tensor)).values())
        left = rows[most:]
        if left:
            rows = sorted(rows, key=lambda r: -r.excess)
            rows, left = rows[:most], rows[most:]
        failed = sum(not row.ok for row in left)
        more = f"and {len(left)} more, {failed or 'none'} of them failed" if left else ""
        return (
            [*(["case"] if grid else []), *_COLUMNS],
            [
                [
                    *([row.case] if grid else []),
                    _tensor_text(row),
                    f"{row.absolute:.1e}",
                    f"{row.relative:.1e}",
                    f"{row.allowed:.1e}",
                    "ok" if row.ok else "FAIL",
                    row.where,
                ]
                for row in rows
            ],
            more,
        )

    @classmethod
    def merge(
        cls, reports: Mapping[str, Report], settings: Mapping[str, Any] | None = None
    ) -> Report:
        """Join the reports of several cases into one.

        Parameters
        ----------
        reports : mapping of str to Report
            By the name of the case.
        settings : mapping, optional
            Of the whole.

        Returns
        -------
        Report
        """
        rows = [replace(row, case=name) for name, report in reports.items() for row in report.rows]
        notes = [f"{name}: {note}" for name, report in reports.items() for note in report.notes]
        return cls(tuple(rows), dict(settings or {}), tuple(notes))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as JSON, and write it to a file if a path is given.

        Parameters
        ----------
        path : path, optional
            Replaced as a whole once the text is complete.

        Returns
        -------
        str
            Numbers that JSON cannot hold are the strings ``"nan"`` and ``"inf"``.
        """
        return _write(json.dumps(self.to_dict(), indent=1, allow_nan=False), path)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return {
            "held": bool(self),
            "settings": self.settings,
            "notes": self.notes,
            "rows": [
                {name: _json_value(v) for name, v in {**asdict(row), "ok": row.ok}.items()}
                for row in self.rows
            ],
        }

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Rebuild a report from what :meth:`to_json` returned.

        Parameters
        ----------
        text : str

        Returns
        -------
        Report

        Raises
        ------
        ValueError
            If `text` is not such a document.
        """
        try:
            document = json.loads(text)
            rows = [_row_from_json(row) for row in document["rows"]]
            return cls(tuple(rows), document["settings"], tuple(document["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"text must be JSON from Report.to_json, got {text[:60]!r}") from error

    def to_html(self, path: str | os.PathLike[str] | None = None, title: str = "Parity") -> str:
        """Return the report as one self-contained page, and write it if a path is given.

        Parameters
        ----------
        path : path, optional
            Replaced as a whole once the text is complete.
        title : str
            Heading of the page.

        Returns
        -------
        str
            HTML with a table of the largest differences and one of the failures.
        """
        header, lines, more = self.table(most=len(self.rows))
        failures = Report(tuple(self.failures), notes=()).table(most=200) if self.failures else None
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        body = [
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="{"ok" if self else "fail"}">{html.escape(self.verdict)}</p>',
            f"<p>{html.escape(settings)}</p>",
            *(f"<p>Note: {html.escape(note)}</p>" for note in self.notes),
        ]
        if failures:
            body += ["<h2>Failures</h2>", _html_table(*failures)]
        body += ["<h2>Largest differences</h2>", _html_table(header, lines, more)]
        return _write(_PAGE.format(title=html.escape(title), body="\n".join(body)), path)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem }}
table {{ border-collapse: collapse }}
td, th {{ padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid #ddd }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
.ok {{ color: #17692a }} .fail {{ color: #b3261e; font-weight: bold }}
</style></head><body>
{body}
</body></html>
"""


def _html_table(header: list[str], lines: list[list[str]], more: str) -> str:
    numbers = {i for i, name in enumerate(header) if name in ("absolute", "relative", "allowed")}

    def cells(line: list[str], tag: str) -> str:
        shown = []
        for i, cell in enumerate(line):
            style = "number" if i in numbers else {"ok": "ok", "FAIL": "fail"}.get(cell, "")
            shown.append(f'<{tag} class="{style}">{html.escape(cell)}</{tag}>')
        return f"<tr>{''.join(shown)}</tr>"

    rows = "\n".join(cells(line, "td") for line in lines)
    return f"<table>\n{cells(header, 'th')}\n{rows}\n</table>\n<p>{html.escape(more)}</p>"


def _tensor_text(row: Row) -> str:
    if row.kind in (PARAMETER_GRADIENT, INPUT_GRADIENT):
        return f"gradient of {row.tensor}"
    return f"error in {row.tensor}" if row.kind == ERROR else row.tensor


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row_from_json(row: dict[str, Any]) -> Row:
    values = {name: value for name, value in row.items() if name != "ok"}
    for name in ("absolute", "relative", "allowed"):
        values[name] = float(values[name])
    values["index"] = None if values["index"] is None else tuple(values["index"])
    return Row(**values)


def _write(text: str, path: PathLike | None) -> str:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return text


# --- the comparison ---------------------------------------------------------------------------


def compare(
    a: Block,
    b: Block,
    inputs: Array,
    *,
    steps: int = 3,
    train: bool = True,
    dtype: str = "float64",
    rtol: float | None = None,
    atol: float | None = None,
    statistics_rtol: float | None = None,
    statistics_atol: float | None = None,
    modes: Sequence[str] = ("eager", "hybrid"),
    learning_rate: float = 1e-2,
    seed: int = 0,
    loss: Callable[[Any], Array] | None = None,
) -> Report:
    """Give two nets the same parameters, data and output gradients, and compare what they compute.

    In every mode both nets go through three phases. **train**: `steps` times forward under
    ``record()``, backward, and a step of gradient descent, each net with its own gradients, which
    are clipped to a norm of 1, as random ones would soon blow up a deep net.
    **inference**: a forward, then another under ``record(train_mode=False)`` with a backward.
    **frozen**: a training step while all norm layers have ``use_global_stats=True``. Compared each
    time: outputs, gradients of the inputs and of the parameters, and every parameter that is not
    trained, which is what running statistics are. Each phase starts from the values at which `a`
    ended the one before, so that a fault is reported where it happens.

    Parameters
    ----------
    a, b : Block
        Two norm layers, built-in, from this package or of one's own, or two nets. Their
        parameters correspond by structural name (``'0.gamma'``), not by prefix. `b` works with the
        values of `a`. Parameters of `a` that have no values yet are drawn at random, since ones
        and zeros would hide errors.
    inputs : NDArray or numpy.ndarray, or a tuple of them, or a list
        A batch; a tuple if the nets take several arguments; a list of batches to be fed in turn.
        Floating-point arrays are cast to `dtype`.
    steps : int
        Training steps. float32 nets are chaotic: a rounding grows with each step until it fills
        the tolerance. Compare a deep net in float64, or with ``steps=1``.
    train : bool
        If False, the inference phase alone.
    dtype : {'float64', 'float32', 'float16'}
        Both nets are cast to it while they are compared.
    rtol, atol : float, optional
        A difference may be at most ``atol + rtol * scale``, where scale is the largest magnitude
        in the tensor. Default: 1e-10, 1e-5 and 5e-3 by dtype, both of them.
    statistics_rtol, statistics_atol : float, optional
        The same for parameters that are not trained. Default for float64: 1e-12 and 1e-14, or,
        if either net contains MXNet's own layer, 1e-6 and 1e-8, because that one multiplies with
        a float32 momentum, which moves its statistics by about 1e-7.
    modes : sequence of {'eager', 'hybrid', 'static'}
        ``'static'`` is hybridized with ``static_alloc`` and ``static_shape``.
    learning_rate : float
        Of the gradient descent between training steps.
    seed : int
        For the output gradients and for parameters without values.
    loss : callable, optional
        Takes the output of a net, or the list of its outputs; the gradients are those of the sum
        of what it returns, in place of random output gradients.

    Returns
    -------
    Report
        True if everything held. A difference that is not finite, another shape, and a net that
        MXNet cannot run (MXNetError) are failures in it.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or if the nets have different parameters.

    Notes
    -----
    The nets of the caller are as before when this returns or raises: values, gradients,
    ``grad_req``, dtypes and deferred initialization of all parameters (the very same arrays), and
    every attribute and compiled graph of all blocks. It is not for use while other threads run the
    same nets. Forward hooks are called. ``nn.Dropout`` is switched off meanwhile; a net with other
    random operators differs from run to run. Hybridized layers of this package draw from MXNet's
    random stream.

    Examples
    --------
    >>> import mxnet as mx
    >>> from mxnet.gluon import nn
    >>> from scratchbn import ScratchBatchNorm
    >>> x = mx.nd.random.normal(shape=(8, 3, 5, 5))
    >>> bool(compare(ScratchBatchNorm(), nn.BatchNorm(), x))
    True
    >>> report = compare(ScratchBatchNorm(), nn.BatchNorm(epsilon=1e-3), x)
    >>> report.failures[0].tensor
    'output'
    """
    for name, net in (("a", a), ("b", b)):
        if not isinstance(net, Block):
            raise TypeError(f"{name} must be a gluon Block, got {net!r}")
    _check_count("steps", steps, least=1)
    _check_count("seed", seed, least=0)
    if not isinstance(train, bool):
        raise TypeError(f"train must be True or False, got {train!r}")
    if dtype not in _TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(_TOLERANCES)}, got {dtype!r}")
    if isinstance(modes, str) or not modes or any(mode not in MODES for mode in modes):
        raise ValueError(f"modes must be a sequence of {', '.join(MODES)}, got {modes!r}")
    _check_size("learning_rate", learning_rate)
    builtin = any(isinstance(block, _BatchNorm) for net in (a, b) for block in _blocks(net))
    tolerance = _tolerance("", _TOLERANCES[dtype], rtol, atol)
    of_statistics = _tolerance(
        "statistics_",
        (_BUILTIN_STATISTICS if builtin else _STATISTICS)[dtype],
        statistics_rtol,
        statistics_atol,
    )
    batches = _batches(inputs, dtype)
    _check_same_parameters(a, b)

    settings = {
        "dtype": dtype,
        "steps": steps,
        "modes": list(modes),
        "train": train,
        "tolerance": list(tolerance),
        "statistics_tolerance": list(of_statistics),
        "learning_rate": learning_rate,
        "seed": seed,
    }
    with _borrowed(a, b), autograd.pause():
        values, context = _values_of(a, batches[0], np.random.default_rng((seed, 0, _VALUES)))
        phases, notes = _phases(a, b, train)
        for net in (a, b):
            net.cast(dtype)
            for block in _blocks(net):
                if isinstance(block, nn.Dropout):
                    block._rate = 0.0
        rows: list[Row] = []
        for mode in modes:
            start = values
            for phase in phases:
                run = _Run(mode, phase, steps, batches, context, learning_rate, seed, loss)
                # One after the other: the nets may share their parameters.
                one, two = run(a, start), run(b, start)
                rows += _rows(one, two, mode, phase, tolerance, of_statistics)
                start = one.values or start
    return Report(tuple(rows), settings, tuple(notes))


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def _tolerance(
    prefix: str, default: tuple[float, float], rtol: float | None, atol: float | None
) -> tuple[float, float]:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            _check_size(prefix + name, value)
    return (
        default[0] if rtol is None else float(rtol),
        default[1] if atol is None else float(atol),
    )


def _batches(inputs: Array, dtype: str) -> list[list[np.ndarray]]:
    """Return the arguments of every call, as NumPy arrays."""
    batches = [b if isinstance(b, tuple) else (b,) for b in _as_list(inputs)]
    if not batches or not all(batches):
        raise ValueError(f"inputs must hold at least one array, got {inputs!r}")
    result = []
    for batch in batches:
        for x in batch:
            if not isinstance(x, (mx.nd.NDArray, np.ndarray)):
                raise TypeError(
                    "inputs must be an array, a tuple of arrays, or a list of such batches; "
                    f"got {type(x).__name__}"
                )
        arrays = [x if isinstance(x, np.ndarray) else x.asnumpy() for x in batch]
        result.append([x.astype(dtype) if x.dtype.kind == "f" else x for x in arrays])
    return result


def _as_list(inputs: Array) -> list[Array]:
    return inputs if isinstance(inputs, list) else [inputs]


def _blocks(net: Block) -> list[Block]:
    """Return a net and all its descendants, each once."""
    found: dict[int, Block] = {}
    waiting = [net]
    while waiting:
        block = waiting.pop()
        if id(block) not in found:
            found[id(block)] = block
            waiting.extend(block._children.values())
    return list(found.values())


def _parameters(net: Block) -> dict[str, Parameter]:
    """Return the parameters of a net by structural name."""
    return dict(net._collect_params_with_prefix())


def _known(shape: Sequence[int] | None) -> bool:
    return shape is not None and all(n > 0 for n in shape)


def _check_same_parameters(a: Block, b: Block) -> None:
    ours, theirs = _parameters(a), _parameters(b)
    for mine, other in itertools.zip_longest(sorted(ours), sorted(theirs)):
        if mine != other:
            odd, owner = min((n, o) for n, o in ((mine, "a"), (other, "b")) if n is not None)
            raise ValueError(f"a and b must have the same parameters, but only {owner} has {odd!r}")
    for name, parameter in ours.items():
        shape, other_shape = parameter.shape, theirs[name].shape
        if _known(shape) and _known(other_shape) and shape != other_shape:
            raise ValueError(
                f"a and b must have the same parameters, but {name!r} has shape {shape} in a "
                f"and {other_shape} in b"
            )


@contextmanager
def _borrowed(*nets: Block) -> Iterator[None]:
    """Put back everything about the nets' blocks and parameters on leaving.

    MXNet replaces these attributes when it casts, initializes or hybridizes and does not change
    what they held, so the old objects, arrays included, are the old state bit for bit.
    """
    owners: dict[int, Any] = {}
    for net in nets:
        owners.update((id(block), block) for block in _blocks(net))
        for found in (_parameters(net), net.collect_params()):
            owners.update((id(p), p) for p in found.values())
    saved = [(owner, dict(vars(owner))) for owner in owners.values()]
    try:
        for owner in owners.values():
            if isinstance(owner, Parameter):
                owner._set_trainer(None)  # set_data would reset a live trainer's key store
        yield
    finally:
        _settle()
        for owner, attributes in saved:
            vars(owner).clear()
            vars(owner).update(attributes)


def _settle() -> None:
    """Wait for everything MXNet has queued; errors there were recorded or raised before."""
    while True:
        try:
            mx.nd.waitall()
        except mx.MXNetError:
            continue
        return


def _array(values: np.ndarray, context: Any) -> Array:
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    return make(values, dtype=values.dtype, ctx=context)


def _values_of(net: Block, batch: list[np.ndarray], rng: np.random.Generator) -> tuple[Values, Any]:
    """Return the values of a net's parameters, drawing those it does not have, and its device."""
    parameters = _parameters(net)
    valued = {name: p for name, p in parameters.items() if p._data is not None}
    contexts = [p.list_ctx()[0] for p in valued.values()]
    context = contexts[0] if contexts else mx.current_context()
    values = {name: p.data(p.list_ctx()[0]).asnumpy() for name, p in valued.items()}
    unset = {name: p for name, p in parameters.items() if name not in values}
    if not unset:
        return values, context
    if not all(_known(p.shape) for p in unset.values()):
        for p in unset.values():
            vars(p)["_deferred_init"] = ()
            p.initialize(mx.init.Zero(), ctx=context)
        net.cast("float32")
        arrays = [x.astype("float32") if x.dtype.kind == "f" else x for x in batch]
        net(*(_array(x, context) for x in arrays))
        mx.nd.waitall()
    for name, p in unset.items():
        values[name] = _draw(name.rsplit(".", 1)[-1], p, rng, context)
    return values, context


def _draw(name: str, parameter: Parameter, rng: np.random.Generator, context: Any) -> np.ndarray:
    """Return values for a parameter that no default could be mistaken for."""
    shape = parameter.shape
    if len(shape) > 1 and not isinstance(parameter, Constant):
        return rng.normal(size=shape) * math.sqrt(2 / math.prod(shape[1:]))
    if name == "running_var" or (name == "gamma" and parameter.grad_req != "null"):
        return rng.uniform(0.5, 2, shape)
    if name == "running_mean" or parameter.grad_req != "null":
        return rng.normal(size=shape)
    # Constants, counters, and the gamma or beta of a layer that does not use it.
    vars(parameter)["_deferred_init"] = ()
    parameter.initialize(ctx=context, force_reinit=True)
    values: np.ndarray = parameter.data(context).asnumpy()
    return values


def _freezable(net: Block) -> list[Block]:
    options = ((block, getattr(block, "_kwargs", None)) for block in _blocks(net))
    return [b for b, o in options if isinstance(o, dict) and "use_global_stats" in o]


def _phases(a: Block, b: Block, train: bool) -> tuple[list[str], list[str]]:
    if not train:
        return ["inference"], []
    for name, net in (("a", a), ("b", b)):
        if not _freezable(net):
            return ["train", "inference"], [
                f"no frozen phase: no layer of {name} has _kwargs['use_global_stats']"
            ]
    return ["train", "inference", "frozen"], []


@dataclass
class _Trace:
    """What a net computed in a phase: the tensors of each step, and the values it ended with."""

    steps: list[dict[Key, np.ndarray]] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    values: Values | None = None
    error: str = ""


@dataclass(frozen=True)
class _Run:
    """One phase in one mode, to be run with either net."""

    mode: str
    phase: str
    steps: int
    batches: list[list[np.ndarray]]
    context: Any
    learning_rate: float
    seed: int
    loss: Callable[[Any], Array] | None = None

    def __call__(self, net: Block, values: Values) -> _Trace:
        parameters = _parameters(net)
        trace = _Trace(trained={n for n, p in parameters.items() if p.grad_req != "null"})
        _load(parameters, values, self.context)
        thawed = [(block, block._kwargs) for block in _freezable(net)]
        if self.phase == "frozen":
            for block, options in thawed:
                block._kwargs = {**options, "use_global_stats": True}
        net.hybridize(**MODES[self.mode])
        try:
            for step in range(self.steps if self.phase == "train" else 1):
                self._take(net, parameters, step, trace)
            trace.values = {n: p.data(self.context).asnumpy() for n, p in parameters.items()}
        except mx.MXNetError as error:
            trace.error = str(error).strip().splitlines()[-1].strip()
            _settle()
        finally:
            for block, options in thawed:
                block._kwargs = options
        return trace

    def _take(self, net: Block, parameters: dict[str, Parameter], step: int, trace: _Trace) -> None:
        batch = self.batches[step % len(self.batches)]
        if self.phase == "inference":
            outputs = _flat(net(*(_array(x, self.context) for x in batch)))
            mx.nd.waitall()
            tensors = {(OUTPUT, _numbered("output", i, outputs)): y for i, y in enumerate(outputs)}
            trace.steps.append(_numpy({**tensors, **self._statistics(parameters, trace)}))
        training = self.phase != "inference"
        inputs = [_array(x, self.context) for x in batch]
        sources = {
            _numbered("input", i, inputs): x
            for i, x in enumerate(inputs)
            if batch[i].dtype.kind == "f"
        }
        for x in sources.values():
            x.attach_grad()
        for p in parameters.values():
            if p.grad_req == "add":
                p.grad(self.context)[:] = 0
        with autograd.record(train_mode=training):
            result = net(*inputs)
            losses = None if self.loss is None else [self.loss(result)]
        outputs = _flat(result)
        if losses is not None:
            autograd.backward(losses, train_mode=training)
        else:
            heads = [y for y in outputs if np.dtype(y.dtype).kind == "f"]
            rng = np.random.default_rng((self.seed, step, _HEADS))
            gradients = [
                _array(rng.normal(size=y.shape).astype(y.dtype), self.context) for y in heads
            ]
            autograd.backward(heads, gradients, train_mode=training)
        mx.nd.waitall()
        trained = {name: p for name, p in parameters.items() if name in trace.trained}
        trace.steps.append(
            _numpy(
                {
                    **{(OUTPUT, _numbered("output", i, outputs)): y for i, y in enumerate(outputs)},
                    **{(INPUT_GRADIENT, name): x.grad for name, x in sources.items()},
                    **{
                        (PARAMETER_GRADIENT, name): p.grad(self.context)
                        for name, p in trained.items()
                    },
                    **self._statistics(parameters, trace),
                }
            )
        )
        if self.phase == "train":
            self._descend(list({id(p): p for p in trained.values()}.values()))

    def _descend(self, parameters: list[Parameter]) -> None:
        gradients = [p.grad(self.context) for p in parameters]
        squares = [float(np.square(g.asnumpy(), dtype=np.float64).sum()) for g in gradients]
        rate = self.learning_rate / max(1.0, math.sqrt(sum(squares)))
        for p, gradient in zip(parameters, gradients):
            p.set_data(p.data(self.context) - rate * gradient)

    def _statistics(self, parameters: dict[str, Parameter], trace: _Trace) -> dict[Key, Array]:
        # An unused gamma or beta is left out: the built-in overwrites such a gamma with ones.
        return {
            (STATISTIC, name): p.data(self.context)
            for name, p in parameters.items()
            if name not in trace.trained and name.rsplit(".", 1)[-1] not in ("gamma", "beta")
        }


def _load(parameters: dict[str, Parameter], values: Values, context: Any) -> None:
    """Give every parameter an array of its own with its value."""
    for name, parameter in parameters.items():
        value = values[name]
        vars(parameter)["_deferred_init"] = ()
        parameter.shape = value.shape
        parameter.initialize(mx.init.Zero(), ctx=context, force_reinit=True)
        parameter.set_data(_array(value.astype(parameter.dtype), context))


def _flat(outputs: Any) -> list[Array]:
    if not isinstance(outputs, (list, tuple)):
        return [outputs]
    return [y for output in outputs for y in _flat(output)]


def _numbered(name: str, index: int, of: Sequence[Any]) -> str:
    return f"{name}[{index}]" if len(of) > 1 else name


def _numpy(tensors: dict[Key, Array]) -> dict[Key, np.ndarray]:
    return {key: x.asnumpy() for key, x in tensors.items()}


def _rows(
    one: _Trace,
    two: _Trace,
    mode: str,
    phase: str,
    tolerance: tuple[float, float],
    of_statistics: tuple[float, float],
) -> list[Row]:
    rows = []
    for step, (mine, other) in enumerate(zip(one.steps, two.steps), start=1):
        for key in dict.fromkeys([*mine, *other]):
            rtol, atol = of_statistics if key[0] == STATISTIC else tolerance
            values = _difference(key, mine.get(key), other.get(key), rtol, atol)
            rows.append(Row(*key, mode, phase, step, **values))
    for name, trace in (("a", one), ("b", two)):
        if trace.error:
            step = len(trace.steps) + 1
            nan = math.nan
            rows.append(Row(ERROR, name, mode, phase, step, nan, nan, 0.0, note=trace.error))
    return rows


def _difference(
    key: Key, a: np.ndarray | None, b: np.ndarray | None, rtol: float, atol: float
) -> dict[str, Any]:
    incomparable = {"absolute": math.nan, "relative": math.nan, "allowed": atol}
    if key[0] == PARAMETER_GRADIENT:
        # A parameter without a gradient does not move: that is a gradient of zero.
        a = np.zeros_like(b) if a is None else a
        b = np.zeros_like(a) if b is None else b
    if a is None or b is None:
        return {**incomparable, "note": f"only {'a' if b is None else 'b'} has it"}
    if a.shape != b.shape:
        return {**incomparable, "note": f"shape {a.shape} in a, {b.shape} in b"}
    if a.dtype != b.dtype:
        return {**incomparable, "note": f"dtype {a.dtype} in a, {b.dtype} in b"}
    if a.size == 0:
        return {"absolute": 0.0, "relative": 0.0, "allowed": atol}
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    finite = np.isfinite(difference)
    place = int(np.argmin(finite)) if not finite.all() else int(np.argmax(difference))
    index = tuple(int(i) for i in np.unravel_index(place, a.shape))
    absolute = float(difference[index]) if finite.all() else math.nan
    scale = float(max(np.abs(a).max(), np.abs(b).max()))
    return {
        "absolute": absolute,
        "relative": absolute / scale if absolute else 0.0,
        "allowed": atol + rtol * scale if math.isfinite(scale) else atol,
        "index": index,
        "note": "" if finite.all() else f"not finite: {a[index]} and {b[index]} at {index}",
    }


# --- the standard grid ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer to compare: the shape and dtype of its data, and its options.

    Attributes
    ----------
    shape : tuple of int
    options : dict
        Arguments of the layer, without ``in_channels``.
    dtype : str
    group : str
        What the case is about.
    """

    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    group: str = ""

    @property
    def name(self) -> str:
        """Shape, dtype and options in one line."""
        options = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join(["x".join(map(str, self.shape)), self.dtype, *options])

    @property
    def channels(self) -> int:
        """The length of the channel axis."""
        return self.shape[self.options.get("axis", 1)]

    def data(self, seed: int, steps: int) -> list[np.ndarray]:
        """Return a batch per step, from N(1, 2) (mean, standard deviation), in the case's dtype."""
        rng = np.random.default_rng(seed)
        return [rng.normal(1, 2, self.shape).astype(self.dtype) for _ in range(steps)]


_SHAPES = {2: (8, 5), 3: (4, 5, 6), 4: (4, 5, 6, 7), 5: (3, 5, 4, 3, 6)}
_CHANNELS = (1, 2, 3, 7, 8, 16, 50, 64, 128, 1024)
_DEFAULTS = {"center": True, "scale": True, "use_global_stats": False}
_MOMENTA = (0.0, 0.1, 0.5, 0.99, 1.0)
_EPSILONS = (0.0, 1e-8, 1e-3, 0.5)


def standard_grid(full: bool = False) -> list[Case]:
    """Return the cases by which a batch normalization is judged.

    Ranks 2 to 5, every axis, `center`, `scale` and `use_global_stats`, momentum, epsilon, batches
    of one and 1 to 1024 channels, in float16, float32 and float64.

    Parameters
    ----------
    full : bool
        Every axis in every dtype and with every combination of flags, every momentum with every
        epsilon, all of it in every rank. The default varies one thing at a time.

    Returns
    -------
    list of Case
        No two alike.
    """
    flags = [
        {name: value for name, value in zip(_DEFAULTS, chosen) if value != _DEFAULTS[name]}
        for chosen in itertools.product((True, False), repeat=len(_DEFAULTS))
    ]
    axes = [(shape, axis) for rank, shape in _SHAPES.items() for axis in range(-rank, rank)]
    found: dict[str, Case] = {}
    for dtype in _TOLERANCES:
        cases = [Case(shape, {}, dtype, "rank") for shape in _SHAPES.values()]
        cases += [Case((1, *shape[1:]), {}, dtype, "batch of 1") for shape in _SHAPES.values()]
        if full or dtype == "float64":
            cases += [
                Case(shape, {"axis": axis, **options}, dtype, "axis")
                for shape, axis in axes
                for options in (flags if full else [{}])
            ]
        for shape in _SHAPES.values() if full else [_SHAPES[4]]:
            cases += [Case(shape, options, dtype, "flags") for options in flags]
            cases += [Case(shape, {"momentum": m}, dtype, "momentum") for m in _MOMENTA]
            cases += [Case(shape, {"epsilon": e}, dtype, "epsilon") for e in _EPSILONS]
            cases += [
                Case(shape, {"momentum": m, "epsilon": e}, dtype, "momentum and epsilon")
                for m, e in itertools.product(_MOMENTA, _EPSILONS if full else ())
            ]
        for rest in ((), (3, 3)) if full else ((3, 3),):
            cases += [Case((6, c, *rest), {}, dtype, "channels") for c in _CHANNELS]
        found.update((case.name, case) for case in reversed(cases))
    return sorted(
        found.values(), key=lambda c: (-np.dtype(c.dtype).itemsize, c.group, len(c.shape))
    )


def run_grid(
    layer: Callable[..., Block] = ScratchBatchNorm,
    reference: Callable[..., Block] = nn.BatchNorm,
    cases: Iterable[Case] | None = None,
    *,
    seed: int = 0,
    **settings: Any,
) -> Report:
    """Compare two layer classes in every case of a grid.

    Parameters
    ----------
    layer, reference : callable
        Called as ``layer(in_channels=C, **case.options)``.
    cases : iterable of Case, optional
        Default: :func:`standard_grid`. A tqdm bar around a list shows how far it is.
    seed : int
        For the data and the parameters.
    **settings
        For :func:`compare`.

    Returns
    -------
    Report
        With a ``case`` in every row.

    Raises
    ------
    TypeError, ValueError
        See :func:`compare`.

    Examples
    --------
    >>> bool(run_grid(cases=[Case((4, 3), {"momentum": 0.5}), Case((2, 3, 4), {"axis": -1})]))
    True
    """
    reports: dict[str, Report] = {}
    for case in standard_grid() if cases is None else cases:
        one, two = (make(in_channels=case.channels, **case.options) for make in (layer, reference))
        data = case.data(seed, settings.get("steps", 3))
        reports[case.name] = compare(one, two, data, dtype=case.dtype, seed=seed, **settings)
    return Report.merge(reports, {"cases": len(reports), "seed": seed, **settings})
