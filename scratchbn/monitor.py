"""What the norm layers of a net do while it trains: a file, a live table in the terminal, plots."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from warnings import warn

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock
from mxnet.gluon.block import _flatten

from . import functional
from ._checks import check_flag, check_integer
from ._graph.arrays import is_symbol, to_classic
from ._graph.trace import executing
from ._graph.view import ChannelView
from ._net import blocks_of, check_block, may_be_traced, norm_layers, warn_of_hidden
from ._recalibrate import Population
from ._writing import PathLike, check_directory, staged
from .backends import get_backend, use_backend

__all__ = ["FIELDS", "SATURATION", "Monitor"]

Array = Any
Record = dict[str, Any]

SATURATION = 4.0
"""An output beyond it counts as saturated: a sigmoid passes on less than 7.1% of its largest
gradient there. For a tanh that is so beyond 2."""

QUANTITIES = (
    "batch_mean",
    "batch_var",
    "running_mean",
    "running_var",
    "mean_distance",
    "var_ratio",
    "gamma",
    "beta",
)
_SUMMARIES: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "min": np.min, "max": np.max}
FIELDS = (
    "step",
    "layer",
    "calls",
    *(f"{quantity}_{summary}" for quantity in QUANTITIES for summary in _SUMMARIES),
    "dead",
    "saturated",
    "nonfinite_batches",
)


class Monitor:
    """Watch the norm layers of a net during training.

    Call :meth:`step` once after each training step. What is observed are the forwards of the net
    under ``autograd.record()``, in training mode; evaluation in between is not. Nothing that is
    trained, no running statistic and no random number differs from a run without a monitor.

    Each observed step gives one record, a dict, for each norm layer that ran. Summarized over the
    channels, as ``batch_mean_mean``, ``batch_mean_min`` and ``batch_mean_max``, are:

    ===================  ==========================================================================
    ``batch_mean``       mean of the layer's input
    ``batch_var``        its biased variance
    ``running_mean``     the running statistics after the step
    ``running_var``
    ``mean_distance``    ``|batch_mean - running_mean| / sqrt(running_var + epsilon)``: how many
                         standard deviations apart training and inference centre the input
    ``var_ratio``        ``(batch_var + epsilon) / (running_var + epsilon)``
    ``gamma``, ``beta``  after the step; 1 and 0 where the layer does not use them
    ===================  ==========================================================================

    The others are numbers:

    =====================  ========================================================================
    ``step``, ``layer``    counted from 1; the layer's Gluon name
    ``calls``              how often the layer ran in the step: on several devices, or several times
                           in one forward. The batches are then taken together
    ``dead``               fraction of the channels whose output is not positive anywhere in the
                           batch: a ReLU after the layer puts out nothing but zeros
    ``saturated``          fraction of the outputs beyond :data:`SATURATION` in absolute value: a
                           sigmoid after the layer is flat there
    ``nonfinite_batches``  how many observed batches so far had a mean or a variance that is not
                           finite. :class:`ScratchBatchNorm` leaves the running statistics as they
                           are for these. For such a step `dead` and `saturated` are NaN
    =====================  ========================================================================

    Parameters
    ----------
    net : Block
        Any net with norm layers of the :class:`ScratchBatchNorm` or ``nn.BatchNorm`` family,
        hybridized or not. Hybridize it before: MXNet warns of hooks otherwise.
    every : int, default 1
        Observe steps 1, 1 + `every`, 1 + 2 `every` and so on. The others cost next to nothing.
    path : str or path, optional
        A file to write, one line per layer and step, complete up to the last step whenever the
        process ends: ``.csv``, or ``.jsonl`` for JSON lines, where what is not finite is null.
        An existing file is replaced.
    console : bool or rich.console.Console, default False
        Show the latest records as a table, updated in place on a terminal.
    channels : bool, default False
        Put the values of all channels in the records too, as lists named ``batch_mean`` and so on;
        not for CSV.

    Attributes
    ----------
    records : list of dict
        All records so far.

    Raises
    ------
    TypeError
        If an argument is not of the kind given above.
    ValueError
        If `every` is less than 1, or `path` has another suffix.
    FileNotFoundError
        If the directory of `path` does not exist.
    ImportError
        If `console` is set and rich is not installed.

    Warns
    -----
    UserWarning
        If there is batch normalization in the graph of a ``SymbolBlock``, where it cannot be
        observed; and once if no norm layer ran in an observed step.

    Notes
    -----
    In a hybridized net no hook of a layer is called. There an observed step runs a second graph of
    the same operators, which returns the inputs and outputs of the norm layers as well; it is
    traced once, and the net's own graph stays as it is. Layers in the body of a
    ``contrib.foreach`` are observed in eager nets only, and so are nets that were partitioned for
    a backend.

    Examples
    --------
    >>> import mxnet as mx
    >>> from mxnet.gluon import Trainer, nn
    >>> from scratchbn import ScratchBatchNorm
    >>> net = nn.HybridSequential(prefix="net_")
    >>> with net.name_scope():
    ...     net.add(ScratchBatchNorm(in_channels=2), nn.Dense(1, in_units=2))
    >>> net.initialize()
    >>> net.hybridize()
    >>> trainer = Trainer(net.collect_params(), "sgd")
    >>> with Monitor(net) as monitor:
    ...     with mx.autograd.record():
    ...         loss = net(mx.nd.array([[1, 7], [5, 4], [6, 10]])).sum()
    ...     loss.backward()
    ...     trainer.step(3)
    ...     monitor.step()
    >>> record = monitor.records[0]
    >>> print(record["layer"], record["batch_mean_min"], record["batch_mean_max"], record["dead"])
    net_batchnorm0 4.0 7.0 0.0
    """

    def __init__(
        self,
        net: Block,
        every: int = 1,
        path: PathLike | None = None,
        console: Any = False,
        *,
        channels: bool = False,
    ) -> None:
        check_block(net)
        self._every = check_integer("every", every, least=1)
        self._channels = check_flag("channels", channels)
        live = _Table(console) if console is not False else None
        self._file = None if path is None else _LineFile(path, self._channels)
        self._live = live

        blocks = blocks_of(net)
        warn_of_hidden(blocks, "are not observed")
        self._layers = [layer for layer, _ in norm_layers(blocks)]
        self._nonfinite = dict.fromkeys(self._layers, 0)
        self._seen: dict[Any, list[_Batch]] = {}
        self._has_seen = False
        self._step = 0
        self._traced: list[tuple[Any, Array, Array]] | None = None
        self._graphs: dict[HybridBlock, _ObservedGraph] = {}
        self._hooks = [layer.register_forward_hook(self._after_layer) for layer in self._layers]
        for block in _may_hold_graph(blocks):
            self._hooks.append(block.register_forward_pre_hook(self._before_block))
        self._closed = False
        self.records: list[Record] = []

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def step(self) -> None:
        """Record what was observed since the last call; to be called after each training step.

        Raises
        ------
        ValueError
            If the monitor is closed.
        OSError
            If the file cannot be written to.
        """
        if self._closed:
            raise ValueError("the monitor is closed")
        observed = self._observes_next()
        self._step += 1
        if not observed:
            return
        mx.nd.waitall()  # graphs with static_shape write to the statistics behind the engine's back
        seen, self._seen = self._seen, {}
        new = [self._record(layer, seen[layer]) for layer in self._layers if layer in seen]
        if not new:
            self._warn_of_nothing()
            return
        self._has_seen = True
        self.records += new
        if self._file is not None:
            self._file.write(new)
        if self._live is not None:
            self._live.show(new)

    def close(self) -> None:
        """Detach from the net and close the file; the records stay. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.detach()
        for graph in self._graphs.values():
            graph.leave()
        self._hooks, self._graphs, self._seen = [], {}, {}
        if self._live is not None:
            self._live.stop()
        if self._file is not None:
            self._file.close()

    def plot(self, path: PathLike) -> None:
        """Draw the records over the steps, a line per layer.

        Parameters
        ----------
        path : str or path
            What to write; the suffix says how: ``.png``, ``.svg``, ``.pdf``.

        Raises
        ------
        ValueError
            If there are no records, or matplotlib does not know the suffix.
        ImportError
            If matplotlib is not installed.
        OSError
            If the file cannot be written; an existing one is then as before.
        """
        if not self.records:
            raise ValueError("there are no records to plot")
        check_directory(path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install 'scratchbn[demo]'") from error
        figure = Figure(figsize=(12, 6.5), layout="constrained")
        _draw(figure, self.records)
        with staged(path) as file:
            figure.savefig(file, dpi=120)

    # --- observing ----------------------------------------------------------------------------

    def _observes_next(self) -> bool:
        return self._step % self._every == 0

    def _is_listening(self) -> bool:
        return self._observes_next() and autograd.is_recording() and autograd.is_training()

    def _after_layer(self, layer: Any, inputs: tuple[Array, ...], output: Array) -> None:
        if is_symbol(output):
            if self._traced is not None:
                self._traced.append((layer, inputs[0], output))
        elif self._is_listening():
            self._observe(layer, inputs[0], output)

    def _before_block(self, block: Any, inputs: tuple[Array, ...]) -> None:
        graph = self._graphs.get(block)
        if graph is not None:
            graph.leave()  # if an error kept it from the call it was to observe
        if not block._active or not self._is_listening() or block._backend:
            return
        arrays, structure = _flatten(inputs, "input")
        if any(is_symbol(a) for a in arrays):
            return
        if block._cached_op is not None and structure != block._in_format:
            return  # an error that the block itself is to raise
        mx.nd.waitall()  # as in `step`
        if graph is None or not graph.is_current():
            graph = self._graphs[block] = _ObservedGraph(block, inputs, self._trace, self._observe)
        graph.enter()

    def _trace(self, block: Any, inputs: tuple[Array, ...]) -> tuple[list[Array], Array, list[Any]]:
        """Trace a block once more.

        Returns
        -------
        data : list of Symbol
            The inputs of its graph.
        graph : Symbol
        traced : list of tuple
            (layer, input, output) of each call of a norm layer.
        """
        kept = block._cached_graph, block._in_format, block._out_format
        traced: list[tuple[Any, Array, Array]] = []
        self._traced = traced
        try:
            block._cached_graph = ()
            data, graph = block._get_graph(*inputs)
        finally:
            block._cached_graph, block._in_format, block._out_format = kept
            self._traced = None
        return data, graph, traced

    def _observe(self, layer: Any, x: Array, y: Array) -> None:
        if not x.size:
            return
        with autograd.pause():
            self._seen.setdefault(layer, []).append(_Batch(layer, x, y))

    # --- records ------------------------------------------------------------------------------

    def _record(self, layer: Any, batches: list[_Batch]) -> Record:
        pool = Population()
        finite = True
        for batch in batches:
            mean, variance = batch.mean.asnumpy(), batch.variance.asnumpy()
            pool.add(batch.count, mean.astype(np.float64), variance.astype(np.float64))
            if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
                self._nonfinite[layer] += 1
                finite = False
        per_channel = _per_channel(layer, *pool.statistics())
        record: Record = {"step": self._step, "layer": layer.name, "calls": len(batches)}
        for quantity in QUANTITIES:
            for name, summarize in _SUMMARIES.items():
                record[f"{quantity}_{name}"] = float(summarize(per_channel[quantity]))
        positive = sum(batch.positive.asnumpy().astype(np.float64) for batch in batches)
        saturated = sum(
            batch.count * batch.saturated.asnumpy().astype(np.float64).mean() for batch in batches
        )
        record["dead"] = float(np.mean(positive == 0)) if finite else math.nan
        record["saturated"] = float(saturated / pool.count) if finite else math.nan
        record["nonfinite_batches"] = self._nonfinite[layer]
        if self._channels:
            record.update({name: values.tolist() for name, values in per_channel.items()})
        return record

    def _warn_of_nothing(self) -> None:
        if not self._has_seen and self._layers:
            self._has_seen = True  # to warn once
            warn(
                f"no norm layer of the net ran under autograd.record() in step {self._step}; "
                "call step() after each training step of this net",
                UserWarning,
                stacklevel=3,
            )


class _Batch:
    """What is kept of one call of a layer; arrays of shape (C,), computed asynchronously."""

    def __init__(self, layer: Any, x: Array, y: Array) -> None:
        axis = layer._kwargs.get("axis", 1)
        x, y = (_as_float(to_classic(values)) for values in (x, y))
        self.count = x.size // x.shape[axis]
        self.mean, self.variance = functional.moments(mx.nd, x, axis)
        view = ChannelView(mx.nd, y, axis)
        self.positive = view.mean(view.values > 0)
        self.saturated = view.mean(view.values.abs() > SATURATION)


def _as_float(values: Array) -> Array:
    return values.astype("float32") if np.dtype(values.dtype) == np.float16 else values


def _per_channel(layer: Any, mean: np.ndarray, variance: np.ndarray) -> dict[str, np.ndarray]:
    options = layer._kwargs
    running_mean, running_var, gamma, beta = (
        np.mean([value.asnumpy().astype(np.float64) for value in p.list_data()], axis=0)
        for p in (layer.running_mean, layer.running_var, layer.gamma, layer.beta)
    )
    epsilon = options["eps"]
    with np.errstate(all="ignore"):
        return {
            "batch_mean": mean,
            "batch_var": variance,
            "running_mean": running_mean,
            "running_var": running_var,
            "mean_distance": np.abs(mean - running_mean) / np.sqrt(running_var + epsilon),
            "var_ratio": (variance + epsilon) / (running_var + epsilon),
            "gamma": np.ones_like(gamma) if options["fix_gamma"] else gamma,
            "beta": beta if options.get("center", True) else np.zeros_like(beta),
        }


# --- graphs -----------------------------------------------------------------------------------


def _may_hold_graph(blocks: dict[Block, str]) -> list[HybridBlock]:
    """Return the blocks above a norm layer that can be hybridized."""
    layers = {layer for layer, _ in norm_layers(blocks)}
    return [
        block
        for block in blocks
        if may_be_traced(block) and block not in layers and not layers.isdisjoint(blocks_of(block))
    ]


class _ObservedGraph:
    """The graph of a hybridized block, with the inputs and outputs of its norm layers returned too.

    It takes the place of the block's own for one call.

    Parameters
    ----------
    block : HybridBlock
    inputs : tuple of NDArray
        What it is called with.
    trace : callable
        See ``Monitor._trace``.
    observe : callable
        Called with (layer, input, output) for each, once they exist.
    """

    def __init__(
        self,
        block: Any,
        inputs: tuple[Array, ...],
        trace: Callable[[Any, tuple[Array, ...]], tuple[list[Array], Array, list[Any]]],
        observe: Callable[[Any, Array, Array], None],
    ) -> None:
        if block._cached_op is None:
            with next(a.ctx for a in _flatten(inputs, "input")[0] if a is not None):
                block._build_cache(*inputs)
        self._block = block
        self._own_op = block._cached_op
        self._observe = observe
        self._op: Any = None
        # The layers may have been traced with another backend than would be chosen now. The order
        # of a graph's inputs tells: the compiled operator reads gamma before the statistics.
        for backend in dict.fromkeys((get_backend(), "auto", "portable")):
            with use_backend(backend), executing():
                data, graph, traced = trace(block, inputs)
            outputs = list(graph.as_nd_ndarray())
            self._length = len(outputs)
            self._layers, extra = _observable(outputs, traced)
            symbol = mx.sym.Group([*outputs, *map(mx.sym.BlockGrad, extra)])
            names = [
                data[source].name if is_input else source.name
                for is_input, source in block._cached_op_args
            ]
            if not self._layers or symbol.list_inputs() != names:
                continue
            if isinstance(graph, mx.sym.numpy._Symbol):
                symbol = symbol.as_np_ndarray()
            self._op = mx.nd.CachedOp(symbol, _input_flags(block))
            break

    def is_current(self) -> bool:
        """Tell whether the block's own graph is the one this was made for."""
        return self._block._cached_op is self._own_op

    def enter(self) -> None:
        """Take the place of the block's graph for its next call."""
        if self._op is not None:
            self._block._cached_op = self

    def leave(self) -> None:
        """Give the block its graph back."""
        if self._block._cached_op is self:
            self._block._cached_op = self._own_op

    def __call__(self, *arrays: Array) -> list[Array]:
        """Run as the block's graph does, and report on the layers."""
        self.leave()
        results = self._op(*arrays)
        extra = iter(results[self._length :])
        for layer, x, y in zip(self._layers, extra, extra):
            self._observe(layer, x, y)
        return results[: self._length]

    def _register_op_hook(self, callback: Any, monitor_all: bool = False) -> None:
        self._op._register_op_hook(callback, monitor_all)


def _input_flags(block: Any) -> list[tuple[str, list[int]]]:
    """Tell a graph which of its inputs are data. No static_alloc: it keeps memory of its own."""
    indices: dict[bool, list[int]] = {True: [], False: []}
    for i, (is_input, _) in enumerate(block._cached_op_args):
        indices[is_input].append(i)
    return [("data_indices", indices[True]), ("param_indices", indices[False])]


def _observable(outputs: list[Array], traced: list[Any]) -> tuple[list[Any], list[Array]]:
    """Return the layers whose input and output are inside a graph, and these symbols.

    A layer whose result is not used is no part of the graph, and to return it would make it run;
    one in a loop is part of another graph.
    """

    def size(symbols: list[Array]) -> int:
        return len(mx.sym.Group(symbols).get_internals().list_outputs())

    found = [(layer, x.as_nd_ndarray(), y.as_nd_ndarray()) for layer, x, y in traced]
    inside = size(outputs)
    if size([*outputs, *(s for _, *pair in found for s in pair)]) != inside:
        found = [(layer, x, y) for layer, x, y in found if size([*outputs, x, y]) == inside]
    return [layer for layer, _, _ in found], [s for _, *pair in found for s in pair]


# --- files ------------------------------------------------------------------------------------


class _LineFile:
    """A file of records that is complete after every step."""

    def __init__(self, path: PathLike, channels: bool) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be a str or a path, got {path!r}")
        suffix = Path(path).suffix.lower()
        if suffix not in (".csv", ".jsonl"):
            raise ValueError(f"path must end in .csv or .jsonl, got {os.fspath(path)!r}")
        if channels and suffix == ".csv":
            raise ValueError(f"path must end in .jsonl with channels=True, got {os.fspath(path)!r}")
        check_directory(path)
        self._is_csv = suffix == ".csv"
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115
        if self._is_csv:
            self._put(_csv_line(FIELDS))

    def write(self, records: list[Record]) -> None:
        if self._is_csv:
            self._put("".join(_csv_line([record[name] for name in FIELDS]) for record in records))
        else:
            self._put("".join(json.dumps(_finite(record)) + "\n" for record in records))

    def close(self) -> None:
        self._file.close()

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def _csv_line(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _finite(value: Any) -> Any:
    """Return what JSON can hold: null for what is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the table --------------------------------------------------------------------------------


class _Table:
    """A table of the latest records in the terminal."""

    def __init__(self, console: Any) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError as error:
            raise ImportError("console needs rich: pip install 'scratchbn[demo]'") from error
        if console is not True and not isinstance(console, Console):
            raise TypeError(f"console must be True, False or a rich Console, got {console!r}")
        self._live = Live(console=None if console is True else console, auto_refresh=False)

    def show(self, records: list[Record]) -> None:
        if not self._live.is_started:
            self._live.start()
        self._live.update(_table(records), refresh=True)

    def stop(self) -> None:
        self._live.stop()


_IN_TABLE = ("batch_mean", "batch_var", "mean_distance", "var_ratio", "gamma", "beta")


def _table(records: list[Record]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"Norm layers, step {records[0]['step']}: least and largest channel",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold")
    for title in (
        "batch\nmean",
        "batch\nvar.",
        "dist. of\nmeans",
        "ratio of\nvar.",
        "gamma",
        "beta",
        "dead\n%",
        "sat.\n%",
        "not\nfinite",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            record["layer"],
            *(f"{record[f'{n}_min']:.3g}\n{record[f'{n}_max']:.3g}" for n in _IN_TABLE),
            *(f"{100 * record[name]:.1f}" for name in ("dead", "saturated")),
            str(record["nonfinite_batches"]),
        )
    return table


# --- the plot ---------------------------------------------------------------------------------

# Title, axis, scale, and the fields drawn solid and dashed with their names in the legend.
_PANELS = (
    (
        "Input mean",
        "units of the input",
        "linear",
        {"batch": "batch_mean", "running": "running_mean"},
    ),
    ("Input variance", "units squared", "log", {"batch": "batch_var", "running": "running_var"}),
    ("Distance of batch and running mean", "standard deviations", "log", {"": "mean_distance"}),
    ("Batch variance / running variance", "ratio", "log", {"": "var_ratio"}),
    ("Scale and shift", "units of the output", "linear", {"gamma": "gamma", "beta": "beta"}),
    (
        "Dead channels, saturated outputs",
        "%",
        "linear",
        {"dead": "dead", f"beyond {SATURATION:g}": "saturated"},
    ),
)
_MOST_IN_LEGEND = 12


def _draw(figure: Any, records: list[Record]) -> None:
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    layers = list(dict.fromkeys(record["layer"] for record in records))
    colors = dict(zip(layers, colormaps["viridis"](np.linspace(0, 0.9, len(layers)))))
    styles = ("-", "--")
    for axes, (title, unit, scale, fields) in zip(figure.subplots(2, 3, sharex=True).flat, _PANELS):
        for style, field in zip(styles, fields.values()):
            for layer, color in colors.items():
                own = [record for record in records if record["layer"] == layer]
                axes.plot(
                    [record["step"] for record in own],
                    [_for_plot(record, field) for record in own],
                    style,
                    color=color,
                    linewidth=1.2,
                    marker="o" if len(own) == 1 else None,
                )
        axes.set(title=title, ylabel=unit, yscale=scale)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(fields) > 1:
            keys = [Line2D([], [], color="0.3", linestyle=style) for style in styles]
            axes.legend(keys, list(fields), fontsize="small")
    for axes in figure.axes[3:]:
        axes.set_xlabel("training step")
    shown = layers
    if len(layers) > _MOST_IN_LEGEND:
        chosen = np.linspace(0, len(layers) - 1, _MOST_IN_LEGEND).round().astype(int)
        shown = [layers[i] for i in chosen]
    lines = [Line2D([], [], color=colors[layer]) for layer in shown]
    figure.legend(lines, shown, loc="outside lower center", ncols=min(len(shown), 6))
    figure.suptitle("Norm layers during training, mean over the channels")


def _for_plot(record: Record, field: str) -> float:
    if field in ("dead", "saturated"):
        return 100 * float(record[field])
    return float(record[f"{field}_mean"])
