"""Batch normalization whose running statistics start right: a variant with another update."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ._checks import check_number
from ._graph.arrays import Array
from ._options import Options
from .layer import ScratchBatchNorm

__all__ = ["DebiasedBatchNorm"]


def _check_momentum(value: Any) -> float | None:
    if value is None:  # the base class is given None, so that it counts the batches
        return None
    return check_number("momentum", value, 1e-30, 1 - 1e-9, "more than 0 and less than 1")


class _DebiasedOptions(Options):
    checks: ClassVar = {**Options.checks, "momentum": _check_momentum}


class DebiasedBatchNorm(ScratchBatchNorm):
    r"""Batch normalization whose running statistics hold nothing of their initial values.

    After t training batches they are the average that weighs batch b by
    :math:`\text{momentum}^{t-b}`, divided by the sum of these weights. That is what TensorFlow
    calls zero debias, and Adam bias correction: after one batch they are those of the batch, and
    after :math:`5 / (1 - \text{momentum})` batches they are those of
    :class:`~scratchbn.ScratchBatchNorm` but for 1%. It is done where they are written, so
    inference, graphs and files read them as ever.

    Parameters
    ----------
    momentum : float, default 0.9
        More than 0 and less than 1. For a plain average use ``ScratchBatchNorm(momentum=None)``.
    **options
        The other ones of :class:`~scratchbn.ScratchBatchNorm`.

    Attributes
    ----------
    num_batches : Parameter, shape (1,)
        t; ``grad_req='null'``. Beside those of the base class. 0 makes the next batch the first:
        set it to a large number after loading statistics that are to be kept.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind or range given above.

    Examples
    --------
    >>> import mxnet as mx
    >>> layer = DebiasedBatchNorm(momentum=0.9, in_channels=1)
    >>> layer.initialize()
    >>> for _ in range(2):
    ...     with mx.autograd.train_mode():
    ...         y = layer(mx.nd.array([[1], [3]]))
    >>> print(layer.running_mean.data().asnumpy(), layer.running_var.data().asnumpy())
    [2.] [1.]
    """

    options_class = _DebiasedOptions

    def __init__(self, axis: int = 1, momentum: float = 0.9, **options: Any) -> None:
        if momentum is None:
            raise TypeError("momentum must be a number, got None: ScratchBatchNorm takes None")
        _check_momentum(momentum)
        super().__init__(axis, None, **options)
        self.options["momentum"] = momentum

    def update(self, F: Any, running: Array, batch: Array, count: Array) -> Array:
        """Return the new value of a running statistic, that of ``count + 1`` batches.

        The newest weighs ``(1 - momentum) / (1 - momentum ** (count + 1))``: exactly 1 at first.
        """
        if self.options.momentum is None:
            return super().update(F, running, batch, count)
        log = math.log(self.options.momentum)
        newest = F.expm1(F.ones_like(count) * log) / F.expm1((count + 1) * log)
        return F.broadcast_mul(running, 1 - newest) + F.broadcast_mul(batch, newest)
