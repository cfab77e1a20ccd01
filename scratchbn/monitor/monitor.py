"""The monitor: what a user attaches to a net, and calls after each training step."""

from __future__ import annotations

from typing import Any
from warnings import warn

from mxnet.gluon import Block

from .._checks import check_flag, check_integer
from .._hidden import warn_of_hidden
from .._net import blocks_of, check_block
from .._writing import PathLike
from .live import LiveTable
from .observe import Observer
from .plot import plot
from .records import Record, Recorder
from .sinks import LineFile

__all__ = ["Monitor"]


class Monitor:
    """Watch the norm layers of a net during training.

    Call :meth:`step` once after each training step. The monitor observes forwards of the net under
    ``autograd.record()`` in training mode, and no evaluation in between. It changes no Parameter,
    no running statistic and no random number.

    Each observed step gives one record, a dict, for each norm layer that ran. Its fields are
    :data:`scratchbn.monitor.FIELDS`, explained in :mod:`scratchbn.monitor.records`.

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
        If there is batch normalization in the graph of a ``SymbolBlock`` that does not tell its
        options (in a loop, of a variant) and is not observed; and once if no norm layer ran in an
        observed step.

    Notes
    -----
    In a hybridized net an observed step runs a second graph of the same operators that also returns
    the inputs and outputs of the norm layers. It is traced once, and the net's own graph stays.
    The graph of a ``SymbolBlock`` is observed in the same way.
    Layers in the body of a ``contrib.foreach`` are observed in eager nets only, and so are nets
    that were partitioned for a backend.

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
        self._recorder = Recorder(check_flag("channels", channels))
        live = [] if console is False else [LiveTable(console)]  # before a file is replaced
        file = [] if path is None else [LineFile(path, channels)]
        self._sinks: list[Any] = [*file, *live]
        blocks = blocks_of(net)
        warn_of_hidden(blocks, "are not observed")
        self._observer = Observer(blocks)
        self._step = 0
        self._may_warn = bool(self._observer.layers)
        self._closed = False
        self.records: list[Record] = []

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
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
        observed = self._observer.is_on
        self._step += 1
        self._observer.is_on = self._step % self._every == 0
        if not observed:
            return
        measured = self._observer.take()
        new = [self._recorder.record(self._step, *item) for item in measured.items()]
        if new:
            self.records += new
            for sink in self._sinks:
                sink.write(new)
        elif self._may_warn:
            warn(
                f"no norm layer of the net ran under autograd.record() in step {self._step}; "
                "call step() after each training step of this net",
                UserWarning,
                stacklevel=2,
            )
        self._may_warn = False

    def close(self) -> None:
        """Detach from the net and close the file; the records stay. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._observer.detach()
        for sink in reversed(self._sinks):
            sink.close()

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
        plot(self.records, path)
