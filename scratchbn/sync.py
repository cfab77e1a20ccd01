"""Batch normalization with the statistics of a batch that is divided over several devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from typing import Any, ClassVar, NamedTuple, NoReturn

import mxnet as mx
from mxnet import autograd

from . import _devices, functional
from ._checks import check_integer
from ._data import Initializer
from ._devices.rounds import Seat
from ._graph import trace
from ._graph.arrays import Array, is_symbol
from ._graph.mode import Select
from ._graph.view import ChannelView
from ._options import Options
from .environment.work_space import WORK_SPACE, has_work_space
from .layer import ScratchBatchNorm

__all__ = ["ScratchSyncBatchNorm", "abandon"]

_serial = count()


class _Identity:
    """What tells a layer from every other, its copies included."""

    def __init__(self) -> None:
        self.serial = str(next(_serial))

    def __deepcopy__(self, memo: Any) -> _Identity:
        return _Identity()

    def __reduce__(self) -> tuple[type[_Identity], tuple[()]]:
        return _Identity, ()


class _Statistics(NamedTuple):
    """As :class:`functional.Statistics`, with the number of elements they are of."""

    mean: Array
    variance: Array
    centred: Array
    low: Array
    m: Array


def _or_none(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _check_key(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"key must be a str or None, got {value!r}")
    return value


class _SyncOptions(Options):
    checks: ClassVar = {
        **Options.checks,
        "num_devices": _or_none(partial(check_integer, "num_devices", least=1)),
        "key": _or_none(_check_key),
        "timeout": _or_none(_devices.check_timeout),
    }


class ScratchSyncBatchNorm(ScratchBatchNorm):
    """Batch normalization of a batch that is divided over several devices of one process.

    In training each device normalizes with the mean and the variance of what all devices have been
    given, and the gradient takes that into account: n devices train as one does that is given the
    whole batch, whether or not they have equal shares of it. Inference is that of
    :class:`~scratchbn.ScratchBatchNorm`, on any number of devices. It takes the arguments of
    ``mxnet.gluon.contrib.nn.SyncBatchNorm`` at the same positions.

    Parameters
    ----------
    in_channels : int, default 0
        C, the length of `axis`. With 0 it is taken from the first input.
    num_devices : int, optional
        How many devices share, at least 1. None: those that the Parameters are on.
    momentum, epsilon, center, scale, use_global_stats, beta_initializer, gamma_initializer, \
    running_mean_initializer, running_variance_initializer, axis, unbiased_variance, prefix, params
        See :class:`~scratchbn.ScratchBatchNorm`.
    key : str, optional
        Layers of the same key share, each with devices of its own; needs `num_devices`. None: a
        layer shares with nobody but itself.
    timeout : float, optional
        How many seconds a device waits for the others, more than 0. None: those that the
        environment variable SCRATCHBN_SYNC_TIMEOUT names when the layer is called, else 60.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind or range given above; in a call in training, if the
        Parameters are on another number of devices than `num_devices`, or MXNet runs one operator
        at a time (``MXNET_ENGINE_TYPE=NaiveEngine``).
    mxnet.MXNetError
        Where a result is read, if a device has waited for `timeout` seconds; it names the layer,
        the devices that came and those that did not.

    Notes
    -----
    On several CPUs, import this class from ``scratchbn`` before MXNet computes anything: all CPUs
    take work space from the same few buffers, and the import sets MXNET_CPU_TEMP_COPY, to 4096
    of them, if it is not set. A ``Dropout`` between two of these layers needs
    MXNET_CPU_PARALLEL_RAND_COPY too. Each GPU has work space of its own.

    Call the net on every device, then compute gradients on every device, before you read a result
    of any: a result exists when all devices have been called. What is called as often on each
    device belongs together: the n-th call on one to the n-th on another. So every step must give
    each device something; drop a last batch that has fewer samples than there are devices.

    A layer in a graph is not written into files: ``export`` writes the graph of
    :class:`~scratchbn.ScratchBatchNorm`, whose statistics are those of one device.

    The devices are those of one process. With the kvstore ``dist_sync``, each worker has statistics
    of its own devices, as with ``SyncBatchNorm``.

    A net with such a layer ignores ``hybridize(static_shape=True)``. The exchange goes through
    Python threads and float64 on the host: a fraction of a millisecond per layer and direction.

    Examples
    --------
    On two GPUs::

        net.initialize(ctx=[mx.gpu(0), mx.gpu(1)])
        with mx.autograd.record():
            losses = [loss(net(x), y) for x, y in zip(shares, labels)]
        mx.autograd.backward(losses)

    On one device it is plain batch normalization:

    >>> layer = ScratchSyncBatchNorm(num_devices=1, in_channels=1)
    >>> layer.initialize()
    >>> with mx.autograd.record():
    ...     y = layer(mx.nd.array([[1], [2], [3]]))
    >>> print(y.asnumpy().round(3).ravel())
    [-1.225  0.     1.225]
    """

    infers_as_batch_norm = True
    options_class = _SyncOptions

    def __init__(
        self,
        in_channels: int = 0,
        num_devices: int | None = None,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        use_global_stats: bool = False,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        running_mean_initializer: Initializer = "zeros",
        running_variance_initializer: Initializer = "ones",
        *,
        key: str | None = None,
        timeout: float | None = None,
        axis: int = 1,
        unbiased_variance: bool = False,
        prefix: str | None = None,
        params: mx.gluon.ParameterDict | None = None,
        **unknown: NoReturn,
    ) -> None:
        sharing = {"num_devices": num_devices, "key": key, "timeout": timeout}
        self.options_class(sharing)
        if key is not None and num_devices is None:
            raise ValueError(f"key={key!r} needs num_devices: how many devices share in all")
        super().__init__(
            axis,
            momentum,
            epsilon,
            center,
            scale,
            use_global_stats,
            beta_initializer,
            gamma_initializer,
            running_mean_initializer,
            running_variance_initializer,
            in_channels,
            unbiased_variance=unbiased_variance,
            prefix=prefix,
            params=params,
            **unknown,
        )
        self.options.update(sharing)
        self._identity = _Identity()

    @property
    def serial(self) -> str:
        """What a graph knows this layer by."""
        return self._identity.serial

    @property
    def overridden(self) -> set[str]:
        """The hooks that a subclass has overridden; the graph in a file is the ordinary one."""
        own = type(self).statistics is ScratchSyncBatchNorm.statistics
        return super().overridden - ({"statistics"} if own else set())

    @property
    def is_stock(self) -> bool:
        """Whether this layer computes what the compiled kernel does: it does on one device."""
        return self.options.num_devices == 1 and super().is_stock

    def statistics(
        self,
        F: Any,
        view: ChannelView,
        running_mean: Array,
        running_var: Array,
        select: Select,
    ) -> Any:
        """Take the statistics of all devices, from those of this one; see the base class.

        The formulas are those of :func:`functional.statistics`, with an exchange between.
        """
        if not self._shares(view.x):
            return super().statistics(F, view, running_mean, running_var, select)
        high = F.BlockGrad(select(lambda: functional.batch_mean(view, view.values), running_mean))
        centred = view.values - view.broadcast(high)

        @cache
        def together() -> _devices.Exchanged:
            low = functional.batch_mean(view, centred)
            variance = functional.batch_variance(F, view, centred, low)
            return _devices.exchange(F, self, view.m, high, low, variance)

        mean = select(lambda: together().mean, running_mean)
        low = select(lambda: together().low, F.zeros_like(high))
        variance = select(lambda: together().variance, running_var)
        return _Statistics(mean, variance, centred, low, select(lambda: together().m, view.m))

    def training_flag(self, F: Any, x: Array) -> Array:
        """Return what tells a graph whether it trains, where devices share in it."""
        return _devices.training(F) if is_symbol(x) and self._shares(x) else None

    def _shares(self, x: Array) -> bool:
        """Tell whether `x` is computed as devices that share do; a graph finds out when it runs."""
        if self.options.use_global_stats or self.options.num_devices == 1:
            return False
        if is_symbol(x):
            if trace.current().purpose != "execute":
                return False
            if _one_at_a_time():
                self._company()
            return True
        return autograd.is_training() and self._company()[0] > 1

    def _company(self) -> tuple[int, tuple[str, ...]]:
        """Return how many devices share, and which they are if that is known."""
        options = self.options
        devices = () if options.key is not None else tuple(map(str, self.gamma.list_ctx()))
        size = options.num_devices or len(devices)
        if devices and len(devices) != size:
            raise ValueError(
                f"{self.name} has num_devices={size}, but its Parameters are on {len(devices)} "
                f"({', '.join(devices)}): initialize it on the devices that share, or leave "
                "num_devices out"
            )
        if size > 1 and _one_at_a_time():
            raise ValueError(
                f"{self.name} cannot share statistics over {size} devices where MXNet runs one "
                "operator at a time: unset MXNET_ENGINE_TYPE=NaiveEngine, or use one device"
            )
        if len([d for d in devices if d.startswith("cpu")]) > 1 and not has_work_space():
            raise ValueError(
                f"{self.name} cannot share statistics over {', '.join(devices)}: CPUs share their "
                f"work space, and wait for each other's; start Python with {WORK_SPACE}=4096, or "
                "import ScratchSyncBatchNorm from scratchbn before MXNet computes anything"
            )
        return size, devices

    def seat(self, device: str) -> Seat | None:
        """Say where a device meets the others in a call in training; None if it is alone."""
        size, devices = self._company()
        if size == 1:
            return None
        options = self.options
        key = ("layer", self.serial) if options.key is None else ("key", options.key)
        timeout = options.timeout or _devices.default_timeout()
        return _devices.rounds.join((key, size), self.name, device, size, devices, timeout)


def _one_at_a_time() -> bool:
    return os.environ.get("MXNET_ENGINE_TYPE") == "NaiveEngine"


def abandon() -> None:
    """End the calls that wait for a device, at once and with an error; the next ones begin anew.

    For programs that catch an exception which came after some devices of a step were called and
    before others were. Without it the next step would meet what is left of that one, and end in an
    error when the time is over.

    Examples
    --------
    >>> abandon()
    """
    _devices.rounds.abandon("the step was abandoned")
