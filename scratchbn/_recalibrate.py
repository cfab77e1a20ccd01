"""Running statistics set to what the data has, in one pass without training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block

from . import functional
from ._checks import check_choice, check_flag, check_integer
from ._graph.arrays import to_classic
from ._net import (
    blocks_of,
    check_block,
    copies_of,
    eager,
    hidden_states,
    norm_layers,
    put_back,
    warn_of_hidden,
)

__all__ = ["MODES", "recalibrate"]

Array = Any


class Population:
    """Mean and variance of all elements seen, by the law of total variance.

    Var[x] is the mean of the variances of the parts plus the variance of their means, both
    weighted by size. It does not depend on how the elements are divided into parts.

    Parameters
    ----------
    unbiased : bool, default False
        Whether the variance is to be the unbiased one.

    Attributes
    ----------
    calls, count : int
        How many parts, and how many elements per channel, have been added.

    Examples
    --------
    >>> import numpy as np
    >>> parts = Population()
    >>> parts.add(1, np.array([1.0]), np.array([0.0]))
    >>> parts.add(2, np.array([4.0]), np.array([1.0]))
    >>> print(*parts.statistics(), np.var([1, 3, 5]))
    [3.] [2.66666667] 2.6666666666666665
    """

    def __init__(self, unbiased: bool = False) -> None:
        self.calls = 0
        self.count = 0
        self._unbiased = unbiased
        self._mean: Any = 0.0
        self._variance: Any = 0.0

    def add(self, count: int, mean: np.ndarray, variance: np.ndarray) -> None:
        """Add a part of `count` >= 1 elements per channel, with its mean and biased variance."""
        share = count / (self.count + count)
        distance = mean - self._mean
        within = (1 - share) * self._variance + share * variance
        self._variance = within + share * (1 - share) * distance**2
        self._mean = self._mean + share * distance
        self.count += count
        self.calls += 1

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the variance, each of shape (C,) and float64.

        Raises
        ------
        ValueError
            If the variance is to be unbiased and there is 1 element per channel.
        """
        if not self._unbiased:
            return self._mean, self._variance
        if self.count < 2:
            raise ValueError(_NO_UNBIASED_VARIANCE)
        return self._mean, self._variance * (self.count / (self.count - 1))


class _Cumulative:
    """The plain average of the statistics of each batch, as training with ``momentum=None``."""

    def __init__(self, unbiased: bool = False) -> None:
        self.calls = 0
        self._unbiased = unbiased
        self._mean: Any = 0.0
        self._variance: Any = 0.0

    def add(self, count: int, mean: np.ndarray, variance: np.ndarray) -> None:
        if self._unbiased:
            if count < 2:
                return  # as the layer passes over such a batch
            variance = variance * (count / (count - 1))
        self.calls += 1
        self._mean = self._mean + (mean - self._mean) / self.calls
        self._variance = self._variance + (variance - self._variance) / self.calls

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.calls:
            raise ValueError(_NO_UNBIASED_VARIANCE)
        return self._mean, self._variance


_NO_UNBIASED_VARIANCE = (
    "data must have at least 2 elements per channel for unbiased_variance=True, got 1"
)
MODES: dict[str, Any] = {"population": Population, "cumulative": _Cumulative}


def recalibrate(
    net: Block,
    data: Iterable[Any],
    batches: int | None = None,
    *,
    mode: str = "population",
    progress: bool = True,
) -> int:
    r"""Set the running statistics of all norm layers of a net to those of the data.

    .. math:: \mu = \frac{1}{M} \sum_b m_b \mu_b, \qquad
              \sigma^2 = \frac{1}{M} \sum_b m_b \sigma_b^2
                       + \frac{1}{M} \sum_b m_b (\mu_b - \mu)^2, \qquad M = \sum_b m_b

    over the batches b of :math:`m_b` elements per channel, in float64. For a norm layer that sees
    the data through layers that treat each sample alone, these are the statistics of all the data
    at once, however it is divided into batches. Below another norm layer they are those of what
    that layer puts out in training, normalized batch by batch: batches of the size used in training
    are best there.

    Useful where the moving averages lag behind the weights: after training with a high momentum or
    few steps, after averaging weights, after changing them by hand.

    Parameters
    ----------
    net : Block
        Any initialized net, hybridized or not, with norm layers of the :class:`ScratchBatchNorm`
        or the ``nn.BatchNorm`` family.
    data : iterable
        Of batches: each an NDArray, or a list or tuple such as (data, label), whose first item
        the net is called with. They belong on the net's device, or on one of them.
    batches : int, optional
        Use so many batches and no more; default: all.
    mode : {'population', 'cumulative'}
        ``'population'``: the formula above. ``'cumulative'``: each batch counts the same whatever
        its size, and the variance is the plain average of the variances, without that of the
        means: what training with ``momentum=None`` converges to.
    progress : bool, default True
        Show a bar, on a terminal and where tqdm is installed.

    Returns
    -------
    int
        How many batches were used; 0, with no batch taken, if there is no layer to set.

    Raises
    ------
    TypeError
        If an argument or a batch is not of the kind given above.
    ValueError
        If `data` has too few batches, if the input of a norm layer has a mean or variance that is
        not finite, if `batches` or `mode` is out of range, or if a layer with
        ``unbiased_variance=True`` saw one element per channel.

    Warns
    -----
    UserWarning
        If there is batch normalization in the graph of a ``SymbolBlock``, where it cannot be set.

    Notes
    -----
    The net runs in training mode, without recording: Dropout drops, and draws random numbers. It
    runs eagerly, and is hybridized again as it was, with the same graphs. The statistics come from
    the inputs of the layers and not from what the layers do with them: variants are set like any
    other, and layers of either family alike. ``unbiased_variance=True`` is honoured. A layer with
    ``momentum=None`` goes on from the number of batches used here. On several devices all copies
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
    >>> recalibrate(layer, [mx.nd.array([[1.0]]), mx.nd.array([[3.0], [5.0]])])
    2
    >>> print(layer.running_mean.data().asnumpy(), layer.running_var.data().asnumpy())
    [3.] [2.6666667]
    """
    check_block(net)
    if isinstance(data, (mx.nd.NDArray, np.ndarray, str)) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
    if batches is not None:
        batches = check_integer("batches", batches, least=1)
    mode = check_choice("mode", mode, MODES)
    progress = check_flag("progress", progress)

    blocks = blocks_of(net)
    warn_of_hidden(blocks, "are not recalibrated")
    layers = [layer for layer, _ in norm_layers(blocks) if not layer._kwargs["use_global_stats"]]
    if not layers:
        return 0
    mx.nd.waitall()  # graphs with static_shape write to the statistics behind the engine's back
    gathered: dict[Any, Any] = {}  # by Parameter: layers that share their statistics are one
    used = _run(net, blocks, _inputs(data, batches, progress), gathered, MODES[mode])
    if used < (batches or 1):
        raise ValueError(f"data must have at least {batches or 1} batches, got {used}")
    _write(_new_values(layers, gathered))
    return used


def _inputs(data: Iterable[Any], batches: int | None, progress: bool) -> Iterator[Array]:
    wanted: Iterable[Any] = islice(data, batches)
    if progress and importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        total = batches if batches is not None else getattr(data, "__len__", lambda: None)()
        wanted = tqdm(
            wanted, total=total, desc="recalibrate", unit="batch", leave=False, disable=None
        )
    for number, batch in enumerate(wanted):
        first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
        if not isinstance(first, mx.nd.NDArray):
            raise TypeError(
                "data must have batches that are NDArrays, or lists or tuples that begin with one; "
                f"batch {number} is {_kind(batch)}"
            )
        yield first


def _kind(batch: Any) -> str:
    if isinstance(batch, (list, tuple)):
        begins = f" that begins with {type(batch[0]).__name__}" if batch else ""
        return f"a {type(batch).__name__}{begins or ' without items'}"
    return f"of type {type(batch).__name__}"


# --- the pass ---------------------------------------------------------------------------------


def _run(
    net: Any,
    blocks: dict[Block, str],
    inputs: Iterator[Array],
    gathered: dict[Any, Any],
    new: Callable[[bool], Any],
) -> int:
    """Gather the statistics of all batches, in an object that `new` makes for each layer."""
    used = 0
    with ExitStack() as stack:
        stack.enter_context(autograd.pause(train_mode=True))
        stack.enter_context(eager(blocks))
        for x in inputs:
            if not used:
                _finish_initialization(net, blocks, x)
                stack.callback(put_back, copies_of(hidden_states(blocks)))
                for layer, path in norm_layers(blocks):
                    hook = _Hook(path or layer.name, layer, gathered, new)
                    stack.callback(hook.put_back)
                    stack.callback(layer.register_forward_hook(hook).detach)
            net(x)
            used += 1
        mx.nd.waitall()  # for errors of what runs asynchronously
    return used


def _finish_initialization(net: Any, blocks: dict[Block, str], x: Array) -> None:
    layers = [layer for layer, _ in norm_layers(blocks)]
    if any(layer.running_mean._data is None for layer in layers):
        with autograd.predict_mode():
            net(x)


class _Hook:
    """Adds the input of a layer to what is gathered, and keeps the layer's state as it was."""

    def __init__(
        self, title: str, layer: Any, gathered: dict[Any, Any], new: Callable[[bool], Any]
    ) -> None:
        self._title = title
        self._gathered = gathered
        self._new = new
        self._copies = copies_of(p for p in layer._reg_params.values() if p.grad_req == "null")

    def put_back(self) -> None:
        put_back(self._copies)

    def __call__(self, layer: Any, inputs: tuple[Array, ...], output: Array) -> None:
        self.put_back()
        options = layer._kwargs
        if options["use_global_stats"] or not inputs[0].size:
            return
        x = to_classic(inputs[0]).astype("float64")
        mean, variance = functional.moments(mx.nd, x, options.get("axis", 1))
        arrays = mean.asnumpy(), variance.asnumpy()
        if layer.running_mean not in self._gathered:
            self._gathered[layer.running_mean] = self._new(bool(options.get("unbiased_variance")))
        gathered = self._gathered[layer.running_mean]
        if not all(np.isfinite(values).all() for values in arrays):
            raise ValueError(
                "data must give every norm layer an input of finite mean and variance; that of "
                f"{self._title!r} has none after {gathered.calls} batches"
            )
        gathered.add(x.size // len(arrays[0]), *arrays)


def _new_values(layers: list[Any], gathered: dict[Any, Any]) -> list[tuple[Any, np.ndarray]]:
    found = []
    for layer in layers:
        if layer.running_mean not in gathered:
            continue
        seen = gathered[layer.running_mean]
        mean, variance = seen.statistics()
        for parameter, value in ((layer.running_mean, mean), (layer.running_var, variance)):
            with np.errstate(over="ignore"):
                stored = value.astype(parameter.dtype)
            if not np.isfinite(stored).all():
                raise ValueError(
                    f"data must have statistics that {np.dtype(parameter.dtype).name} can hold; "
                    f"{parameter.name} would be {value.max():g}"
                )
            found.append((parameter, stored))
        if hasattr(layer, "num_batches"):
            found.append((layer.num_batches, np.array([seen.calls])))
    return found


def _write(values: list[tuple[Any, np.ndarray]]) -> None:
    # Not set_data: a Trainer then drops its key-value store, or fails if that is a distributed one.
    for parameter, value in values:
        for array in parameter.list_data():
            to_classic(array)[:] = mx.nd.array(value, dtype=parameter.dtype, ctx=array.ctx)
    mx.nd.waitall()
