"""Training or inference: known now, or known each time a graph runs."""

from __future__ import annotations

from typing import Any, Callable

from mxnet import autograd

from .arrays import Array, is_symbol

Select = Callable[[Callable[[], Array], Array], Array]


class Mode:
    """Training or inference, known now.

    Attributes
    ----------
    graph : bool
        Whether a graph is being built.
    may_train : bool
        False if this is inference for certain.
    select : Select
        ``select(batch, running)`` returns ``batch()`` in training and `running` otherwise.
    """

    def __init__(self, training: bool, graph: bool = False) -> None:
        self.graph = graph
        self.may_train = training
        self.select: Select = lambda batch, running: batch() if training else running

    def only_in_training(self, condition: Array) -> Array:
        """Return `condition`, shape (1,), in training, and 0 otherwise."""
        return condition


class GraphMode(Mode):
    """Training or inference, known each time the graph runs.

    ``Dropout`` is the one operator that tells a graph in which mode it runs: with p = 0.5 it
    turns 1 into 0 or 2 in training and leaves it alone otherwise. Both branches are computed and
    one is selected, not multiplied away, so that a NaN in one cannot reach the other.
    """

    def __init__(self, F: Any, flag: Array = None) -> None:
        super().__init__(training=True, graph=True)
        self.select = self._select
        self._F = F
        flag = F.Dropout(F.ones((1,)), p=0.5) != 1 if flag is None else flag
        self._flag = F.BlockGrad(flag)

    def _select(self, batch: Callable[[], Array], running: Array) -> Array:
        F, statistic = self._F, batch()
        return F.where(F.broadcast_like(self._flag, statistic), statistic, running)

    def only_in_training(self, condition: Array) -> Array:
        """Return `condition`, shape (1,), where the graph trains, and 0 otherwise."""
        return self._F.where(self._flag, condition, self._F.zeros_like(condition))


def mode_now(F: Any, x: Array, may_train: bool, flag: Array = None) -> Mode:
    """Return the mode for an array, or for the graph that a symbol belongs to.

    With `may_train` False it is inference, whatever ``autograd.is_training()`` says. `flag` tells
    a graph whether it trains, shape (1,), in the place of ``Dropout``.
    """
    if is_symbol(x):
        return GraphMode(F, flag) if may_train else Mode(training=False, graph=True)
    return Mode(training=may_train and autograd.is_training())
