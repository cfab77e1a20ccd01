"""A net in training, on one device or several, in one process or in every worker of a job."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from .. import recalibrate
from .cluster import ALONE, Workers

__all__ = ["Run", "read_values", "write_values"]

Values = dict[str, np.ndarray]

_KEEP = 0.99  # of the moving average of the loss


def read_values(net: gluon.Block) -> Values:
    """Return the parameters of a net.

    Parameters
    ----------
    net : Block
        Initialized, and called once if shapes were unknown.

    Returns
    -------
    dict of str to numpy.ndarray
        The value of each by name, as it is on the net's first device.
    """
    mx.nd.waitall()  # graphs with static_shape write to the statistics behind the engine's back
    return {name: p.list_data()[0].asnumpy() for name, p in net.collect_params().items()}


def write_values(net: gluon.Block, values: Mapping[str, np.ndarray]) -> None:
    """Set the parameters of a net, on every device.

    Parameters
    ----------
    net : Block
    values : mapping of str to numpy.ndarray
        By name, one for each parameter.
    """
    for name, parameter in net.collect_params().items():
        parameter.set_data(mx.nd.array(values[name], dtype=parameter.dtype))


class Run:
    """A net in training: all that a checkpoint has to hold.

    Every device normalizes with the statistics of its own examples and keeps running statistics of
    its own, as ``nn.BatchNorm`` does; gradients are added up over devices and workers.

    Parameters
    ----------
    name : str
        Names the files of a checkpoint; no two runs of a session have the same.
    net : Block
        Its parameters all have values, on every device it is to be trained on.
    loss : callable
        Called as ``loss(net(data), labels)``; returns one value per example. Trained on is the
        *sum* over a batch: a learning rate of 0.001 equals 0.064 on the mean of 64 examples.
    optimizer : str or Optimizer, default 'sgd'
    optimizer_params : dict, optional
        See ``gluon.Trainer``.
    workers : Alone or Cluster, default ALONE
        From :func:`join`.

    Attributes
    ----------
    devices : list of mxnet.Context
    trainer : gluon.Trainer
    losses : list of float
        After each step, the moving average (.99 of the old value, .01 of the new) of the mean loss
        of a batch.
    epochs : list of dict
        What :meth:`end_epoch` returned.
    seconds : float
        Time taken by the training steps of the present epoch.

    Examples
    --------
    >>> import mxnet as mx
    >>> import numpy as np
    >>> from mxnet.gluon import loss, nn
    >>> net = nn.Dense(1, in_units=2)
    >>> net.initialize(mx.init.Zero())
    >>> run = Run("linear", net, loss.L2Loss(), optimizer_params={"learning_rate": 0.1})
    >>> x, y = np.float32([[1, 0], [0, 1]]), np.float32([1, 2])
    >>> print(*(f"{run.step(x, y):.4f}" for _ in range(3)))
    1.2500 0.6525 0.3521
    """

    def __init__(
        self,
        name: str,
        net: gluon.Block,
        loss: Callable[[Any, Any], Any],
        optimizer: Any = "sgd",
        optimizer_params: dict[str, Any] | None = None,
        workers: Workers = ALONE,
    ) -> None:
        self.name = name
        self.net = net
        self.loss = loss
        self.workers = workers
        parameters = net.collect_params().values()
        self._trained = [p for p in parameters if p.grad_req != "null"]
        self._statistics = [p for p in parameters if p.grad_req == "null"]
        if not self._trained:
            raise ValueError(f"net must have parameters to train, got {net!r}")
        self.devices = self._trained[0].list_ctx()
        self.trainer = gluon.Trainer(
            # Without statistics: a Trainer's first step copies device 0's values to all devices.
            self._trained,
            optimizer,
            optimizer_params,
            kvstore=workers.key_store(name),
            update_on_kvstore=False,
        )
        self.losses: list[float] = []
        self.epochs: list[dict[str, Any]] = []
        self.seconds = 0.0

    # --- training -----------------------------------------------------------------------------

    def step(self, data: np.ndarray, labels: np.ndarray) -> float:
        """Train on one batch, divided among all workers and their devices.

        Parameters
        ----------
        data, labels : numpy.ndarray, shape (N, ...)
            The whole batch, the same in every worker, in the types that net and loss take.

        Returns
        -------
        float
            The mean loss of the N examples.

        Raises
        ------
        FloatingPointError
            If the loss is not finite.
        """
        with self.timed():
            parts = list(self._parts(data, labels))
            with autograd.record():
                losses = [
                    self.loss(self.net(part[0]), part[1]) if part else self._no_loss(device)
                    for device, part in zip(self.devices, parts)
                ]
            autograd.backward(losses)  # of their sum
            self.trainer.step(1)
            total = sum(float(loss.sum().asscalar()) for loss in losses)
            mean = float(self.workers.gather("loss", total).sum()) / len(data)
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss of the {self.name} net is {mean} at step {len(self.losses) + 1}"
                )
            last = self.losses[-1] if self.losses else mean
            self.losses.append(_KEEP * last + (1 - _KEEP) * mean if self.losses else mean)
        return mean

    def _parts(self, *arrays: np.ndarray) -> Iterator[list[Any]]:
        """Yield each device's part of a batch; an empty list where no example is left for it."""
        mine = [np.array_split(a, self.workers.size)[self.workers.rank] for a in arrays]
        # As gluon.utils.split_data divides them.
        parts = zip(*(np.array_split(a, len(self.devices)) for a in mine))
        for device, part in zip(self.devices, parts):
            yield [mx.nd.array(a, ctx=device, dtype=a.dtype) for a in part if len(a)]

    def _no_loss(self, device: Any) -> Any:
        """Return a loss of 0 whose gradients are 0, for a device that has no example of a batch.

        Without a backward it would add the gradients of the step before.
        """
        return mx.nd.add_n(*((p.data(device) * 0).sum() for p in self._trained))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time in `seconds`."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def end_epoch(self, **results: Any) -> dict[str, Any]:
        """Keep and return the results of an epoch, and begin the next.

        Parameters
        ----------
        **results
            What was measured, as JSON values.

        Returns
        -------
        dict
            The number of the ``epoch``, from 1, its ``loss``, the results and the ``seconds``.
        """
        number, loss = len(self.epochs) + 1, self.losses[-1]
        self.epochs.append({"epoch": number, "loss": loss, **results, "seconds": self.seconds})
        self.seconds = 0.0
        return self.epochs[-1]

    # --- measuring ----------------------------------------------------------------------------

    def statistics(self) -> Values:
        """Return all copies of each running statistic; all workers call this.

        Returns
        -------
        dict of str to numpy.ndarray, float64, shape (workers, devices, C)
            By the parameter's name.
        """
        mx.nd.waitall()
        return {
            p.name: self.workers.gather(
                f"{self.name}:{p.name}", np.stack([copy.asnumpy() for copy in p.list_data()])
            )
            for p in self._statistics
        }

    def averages(self) -> Values:
        """Return every parameter's value, of statistics the average over all devices and workers.

        All workers call this.
        """
        copies = self.statistics()
        return {
            **read_values(self.net),
            **{name: values.mean(axis=(0, 1)) for name, values in copies.items()},
        }

    def evaluated(
        self, build: Callable[[], gluon.Block], recalibrate_on: Iterable[Any] | None = None
    ) -> gluon.Block:
        """Return the net to measure and to save: on one device, with averaged statistics.

        All workers call this. The net in training keeps the statistics it has on each device.

        Parameters
        ----------
        build : callable
            Returns a net with parameters of the same names, to be filled; not called where the
            net in training itself will do.
        recalibrate_on : iterable of batches, optional
            Take the statistics of these instead; see :func:`scratchbn.recalibrate`. They are read
            by the worker of rank 0 alone.

        Returns
        -------
        Block
        """
        if len(self.devices) * self.workers.size == 1 and recalibrate_on is None:
            return self.net
        net = build()
        write_values(net, self.averages())
        if recalibrate_on is not None and self.workers.rank == 0:
            recalibrate(net, recalibrate_on)
        return net

    # --- on disk ------------------------------------------------------------------------------

    def save(self, folder: Path, statistics: Values | None = None) -> None:
        """Write all that is needed to resume.

        Parameters
        ----------
        folder : Path
            An existing directory; the files begin with the run's name.
        statistics : dict of str to numpy.ndarray, optional
            From :meth:`statistics`, for one worker to save what all have gathered.
        """
        copies = self.statistics() if statistics is None else statistics
        archive = io.BytesIO()  # one that is written to a full disk complains again when collected
        np.savez(archive, **{**read_values(self.net), **copies})
        (folder / f"{self.name}.npz").write_bytes(archive.getvalue())
        self.trainer.save_states(str(folder / f"{self.name}.states"))
        progress = {"losses": self.losses, "epochs": self.epochs, "seconds": self.seconds}
        (folder / f"{self.name}.json").write_text(json.dumps(progress), "utf-8")

    def load(self, folder: Path) -> None:
        """Make the run what it was when :meth:`save` wrote it.

        On another number of devices or workers, each copy of a running statistic becomes the
        average of those that were saved.
        """
        with np.load(folder / f"{self.name}.npz", allow_pickle=False) as values:
            for parameter in self._trained:
                parameter.set_data(mx.nd.array(values[parameter.name], dtype=parameter.dtype))
            for parameter in self._statistics:
                saved = values[parameter.name]
                if saved.shape[:2] != (self.workers.size, len(self.devices)):
                    average = saved.mean(axis=(0, 1))
                    own = np.broadcast_to(average, (len(self.devices), *average.shape))
                else:
                    own = saved[self.workers.rank]
                for copy, value in zip(parameter.list_data(), own):
                    copy[:] = mx.nd.array(value, ctx=copy.context, dtype=parameter.dtype)
        self.trainer.load_states(str(folder / f"{self.name}.states"))
        progress = json.loads((folder / f"{self.name}.json").read_text("utf-8"))
        for name in ("losses", "epochs", "seconds"):
            setattr(self, name, progress[name])
        mx.nd.waitall()
