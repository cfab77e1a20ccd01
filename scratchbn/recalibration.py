"""Set running statistics to those of the data, in one pass without training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any, Literal, overload

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block

from . import functional
from ._checks import check_choice, check_flag, check_integer
from ._graph.arrays import to_classic
from ._hidden import HiddenNorm, hidden_norms, hidden_states, imported, warn_of_hidden
from ._net import (
    Net,
    blocks_of,
    channel_axis,
    check_block,
    copies_of,
    devices_of,
    eager,
    norm_layers,
    options_of,
    own_parameters,
    put_back,
    values_of,
)
from ._text import first_line
from .monitor.twin import GraphTwin
from .population import CumulativeAverage, Population

__all__ = ["recalibrate"]

Array = Any

_ACCUMULATORS = {"population": Population, "cumulative": CumulativeAverage}


@overload
def recalibrate(
    net: Net,
    data: Iterable[Any],
    batches: int | None = ...,
    *,
    mode: str = ...,
    progress: bool = ...,
    call: Callable[[Any, Any], Any] | None = ...,
    report: Literal[False] = False,
) -> Net: ...


@overload
def recalibrate(
    net: Net,
    data: Iterable[Any],
    batches: int | None = ...,
    *,
    mode: str = ...,
    progress: bool = ...,
    call: Callable[[Any, Any], Any] | None = ...,
    report: Literal[True],
) -> tuple[Net, int]: ...


def recalibrate(
    net: Net,
    data: Iterable[Any],
    batches: int | None = None,
    *,
    mode: str = "population",
    progress: bool = True,
    call: Callable[[Any, Any], Any] | None = None,
    report: bool = False,
) -> Net | tuple[Net, int]:
    """Set the running statistics of all norm layers of a net to those of the data.

    They are gathered batch by batch in float64, see :class:`~scratchbn.population.Population`. For
    a norm layer that sees the data through layers that treat each sample alone, these are the mean
    and variance of all the data at once, however it is divided into batches. A layer behind another
    norm layer sees outputs that were normalized batch by batch: use the training batch size there.

    Useful where the running statistics lag behind the weights: after training with a high momentum
    or for few steps, after averaging weights, after changing them by hand.

    Parameters
    ----------
    net : Block
        Any initialized net, hybridized or not, with norm layers of the :class:`ScratchBatchNorm`
        or the ``nn.BatchNorm`` family.
    data : iterable
        Of batches: each an NDArray; a list or tuple such as (data, label), whose first item the
        net is called with, with all of them if that is itself a list or tuple of NDArrays
        (a bare ``(a, b)`` for a net of two inputs is read as (data, label): pass `call`); or a
        ``mx.io.DataBatch``, whose data it is called with, without what pads the last one. Arrays
        that are on none of the net's devices are copied to its first.
    batches : int, optional
        Use so many batches and no more; default: all.
    mode : {'population', 'cumulative'}
        ``'population'``: the statistics of all elements together. ``'cumulative'``: the plain
        averages of the batches' means and variances, whatever the sizes: what training with
        ``momentum=None`` converges to.
    progress : bool, default True
        Show a bar, on a terminal and where tqdm is installed.
    call : callable, optional
        How the net is called: ``call(net, batch)``, with a batch as `data` yields it; for nets
        and batches of any other form. Arrays are then handed over where they are.
    report : bool, default False
        Return the number of batches, too.

    Returns
    -------
    net : Block
        The same object.
    used : int
        With ``report=True``: how many batches were used; 0, with no batch taken, if there is no
        layer to set.

    Raises
    ------
    TypeError
        If an argument or a batch is not of the kind given above, or the net does not take what a
        batch was read as.
    ValueError
        If `data` has too few batches, if the input of a norm layer has a mean or variance that is
        not finite, if `batches` or `mode` is out of range, or if a layer with
        ``unbiased_variance=True`` saw one element per channel.

    Warns
    -----
    UserWarning
        If there is batch normalization in the graph of a ``SymbolBlock`` that does not tell its
        options (in a loop, of a variant) and is not set.

    Notes
    -----
    The net runs in training mode, without recording: Dropout drops, and draws random numbers. It
    runs eagerly, and is hybridized again as it was, with the same graphs. The statistics come from
    the inputs of the layers and not from what the layers do with them: variants are set like any
    other, and layers of either family alike. ``unbiased_variance=True`` is honoured. A layer with
    ``momentum=None`` continues from the number of batches used here. On several devices all copies
    are set.

    Layers with ``use_global_stats=True`` (see :func:`scratchbn.freeze`) keep their statistics, and
    so does a layer that no batch reaches. Trainable Parameters, gradients, options and hooks are
    left alone. If anything goes wrong, the running statistics are what they were before.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
    https://arxiv.org/abs/2105.07576, section 3.

    Examples
    --------
    >>> import mxnet as mx
    >>> from scratchbn import ScratchBatchNorm
    >>> layer = ScratchBatchNorm(in_channels=1)
    >>> layer.initialize()
    >>> layer = recalibrate(layer, [mx.nd.array([[1.0]]), mx.nd.array([[3.0], [5.0]])])
    >>> print(layer.running_mean.data().asnumpy(), layer.running_var.data().asnumpy())
    [3.] [2.6666667]
    """
    check_block(net)
    if isinstance(data, (mx.nd.NDArray, np.ndarray, str)) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
    if batches is not None:
        batches = check_integer("batches", batches, least=1)
    mode = check_choice("mode", mode, _ACCUMULATORS)
    progress = check_flag("progress", progress)
    check_flag("report", report)
    if call is not None and not callable(call):
        raise TypeError(f"call must be callable as call(net, batch), got {call!r}")
    if isinstance(data, mx.io.DataIter):
        data.reset()  # one that was read to its end has nothing left

    blocks = blocks_of(net)
    warn_of_hidden(blocks, "are not recalibrated")
    norms = {**dict(norm_layers(blocks)), **hidden_norms(blocks)}
    layers = [layer for layer in norms if not _is_frozen(layer)]
    if not layers:
        return (net, 0) if report else net
    mx.nd.waitall()  # graphs with static_shape write to the statistics behind the engine's back
    gathered = _Gathered(_ACCUMULATORS[mode])
    used = _gather(net, blocks, norms, _calls(net, data, batches, progress, call), gathered)
    if used < (batches or 1):
        raise ValueError(f"data must have at least {batches or 1} batches, got {used}")
    _write([value for layer in layers for value in _new_values(layer, gathered)])
    return (net, used) if report else net


def _is_frozen(layer: Any) -> bool:
    return bool(options_of(layer)["use_global_stats"])


def _calls(
    net: Any,
    data: Iterable[Any],
    batches: int | None,
    progress: bool,
    call: Callable[[Any, Any], Any] | None,
) -> Iterator[Callable[[], Any]]:
    """Yield what calls the net with each batch, under a progress bar."""
    wanted: Iterable[Any] = islice(data, batches)
    if progress and importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        total = batches if batches is not None else getattr(data, "__len__", lambda: None)()
        wanted = tqdm(
            wanted, total=total, desc="recalibrate", unit="batch", leave=False, disable=None
        )
    devices = devices_of(net)
    for number, batch in enumerate(wanted):
        if call is not None:
            yield partial(call, net, batch)
        else:
            arrays = [_on(devices, x) for x in _inputs(batch, number)]
            yield partial(_called, net, arrays, batch, number)


def _called(net: Any, arrays: list[Array], batch: Any, number: int) -> None:
    """Call a net; if it does not take what a batch was taken for, say what was done."""
    try:
        net(*arrays)
    except (TypeError, ValueError) as error:
        # A ValueError about structure is how the graph of a SymbolBlock counts its arguments.
        if isinstance(error, ValueError) and "argument structure" not in str(error):
            raise
        count = f"{len(arrays)} array{'s' if len(arrays) > 1 else ''}"
        raise TypeError(
            f"{first_line(error)} (batch {number} is {_kind(batch)}, so the net was called with "
            f"{count}; if it takes others: call=lambda net, batch: net(batch[0], batch[1]))"
        ) from error


def _inputs(batch: Any, number: int) -> list[Array]:
    """Return the arrays of a batch that a net is called with."""
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if isinstance(batch, mx.io.DataBatch):
        first = [x[: len(x) - (batch.pad or 0)] for x in batch.data]
    arrays = list(first) if isinstance(first, (list, tuple)) else [first]
    if not arrays or not all(isinstance(x, mx.nd.NDArray) for x in arrays):
        raise TypeError(
            "data must have batches that are NDArrays or DataBatches, or lists or tuples that "
            f"begin with one NDArray or a list of them; batch {number} is {_kind(batch)}: "
            "call=lambda net, batch: ... takes any other"
        )
    return arrays


def _on(devices: list[Any], x: Array) -> Array:
    return x if not devices or x.context in devices else x.as_in_context(devices[0])


def _kind(batch: Any) -> str:
    if isinstance(batch, (list, tuple)):
        begins = f" that begins with {type(batch[0]).__name__}" if batch else ""
        return f"a {type(batch).__name__}{begins or ' without items'}"
    return f"of type {type(batch).__name__}"


def _gather(
    net: Any,
    blocks: dict[Block, str],
    norms: dict[Any, str],
    calls: Iterator[Callable[[], Any]],
    gathered: Any,
) -> int:
    """Run the net on all batches; leave everything as it was, and return how many there were."""
    used = 0
    with ExitStack() as stack:
        stack.enter_context(autograd.pause(train_mode=True))
        stack.enter_context(eager(blocks))
        for run in calls:
            if not used:
                _finish_initialization(norms, run)
                stack.callback(put_back, copies_of(hidden_states(blocks)))
                hooks = {}
                for layer, path in norms.items():
                    hooks[layer] = hook = _GatheringHook(layer, path or layer.name, gathered)
                    stack.callback(hook.put_back)
                    if not isinstance(layer, HiddenNorm):
                        stack.callback(layer.register_forward_hook(hook).detach)
                for block in imported(blocks):
                    stack.callback(_observe_graph(block, hooks).detach)
            run()
            used += 1
        mx.nd.waitall()  # for errors of what runs asynchronously
    return used


def _observe_graph(block: Any, hooks: dict[Any, _GatheringHook]) -> Any:
    """Call the hooks of the norms in an imported graph whenever it runs."""
    hidden = [norm for norm in hooks if isinstance(norm, HiddenNorm)]

    def enter(block: Any, inputs: tuple[Array, ...]) -> None:
        GraphTwin(block, inputs, hidden, lambda norm, x, y: hooks[norm](norm, (x,), y)).enter()

    return block.register_forward_pre_hook(enter)


def _finish_initialization(norms: Iterable[Any], run: Callable[[], Any]) -> None:
    if not all(values_of(layer.running_mean) for layer in norms):
        with autograd.predict_mode():
            run()


class _Gathered(dict[Any, Any]):
    """An accumulator for each running mean: layers that share their statistics count as one."""

    def __init__(self, accumulator: type) -> None:
        self._accumulator = accumulator

    def of(self, layer: Any) -> Any:
        unbiased = bool(options_of(layer).get("unbiased_variance"))
        return self.setdefault(layer.running_mean, self._accumulator(unbiased))


class _GatheringHook:
    """Adds each input of a layer to what is gathered, and undoes what the call moved."""

    def __init__(self, layer: Any, title: str, gathered: _Gathered) -> None:
        self._title = title
        self._gathered = gathered
        hidden = isinstance(layer, HiddenNorm)
        own = layer.parameters if hidden else own_parameters(layer).values()
        self._copies = copies_of(p for p in own if p.grad_req == "null")

    def put_back(self) -> None:
        put_back(self._copies)

    def __call__(self, layer: Any, inputs: tuple[Array, ...], output: Array) -> None:
        self.put_back()
        if _is_frozen(layer) or not inputs[0].size:
            return
        x, axis = _elements(layer, *inputs)
        if not x.size:
            return
        mean, variance = (values.asnumpy() for values in functional.moments(mx.nd, x, axis))
        parts = self._gathered.of(layer)
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise ValueError(
                "data must give every norm layer an input of finite mean and variance; that of "
                f"{self._title!r} has none after {parts.calls} batches"
            )
        parts.add(x.size // len(mean), mean, variance)


def _elements(layer: Any, x: Array, mask: Array = None) -> tuple[Array, int]:
    """Return what the statistics of a layer are of, in float64, and the channel axis."""
    x, axis = to_classic(x).astype("float64"), channel_axis(layer)
    if mask is None:
        return x, axis
    valid = np.moveaxis(x.asnumpy(), axis, -1)[mask.asnumpy() != 0]
    return mx.nd.array(valid, ctx=x.context, dtype="float64"), 1


def _new_values(layer: Any, gathered: _Gathered) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield the Parameters of a layer to set, with their values in their dtype."""
    if layer.running_mean not in gathered:
        return
    parts = gathered.of(layer)
    for parameter, value in zip((layer.running_mean, layer.running_var), parts.statistics()):
        with np.errstate(over="ignore"):
            rounded = value.astype(parameter.dtype)
        if not np.isfinite(rounded).all():
            raise ValueError(
                f"data must have statistics that {np.dtype(parameter.dtype).name} can hold; "
                f"{parameter.name} would be {value.max():g}"
            )
        yield parameter, rounded
    if hasattr(layer, "num_batches"):
        yield layer.num_batches, np.array([parts.calls])


def _write(values: list[tuple[Any, np.ndarray]]) -> None:
    # Not set_data: a Trainer then drops its key-value store, or fails if that is a distributed one.
    for parameter, value in values:
        for array in parameter.list_data():
            to_classic(array)[:] = mx.nd.array(value, dtype=parameter.dtype, ctx=array.ctx)
    mx.nd.waitall()
