"""What is done to a net while it is compared, one function a phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mxnet as mx
from mxnet.gluon import Block

from .._net import freezable
from .._net import frozen as all_frozen
from .._text import first_line
from .nets import Values, settle
from .subject import Subject, Tensors

Phase = Callable[[Subject], Iterator[Tensors]]


def train(subject: Subject) -> Iterator[Tensors]:
    """Forward, backward and gradient descent, several times."""
    for step in range(subject.settings.steps):
        yield subject.forward_backward(step)
        subject.descend()


def inference(subject: Subject) -> Iterator[Tensors]:
    """Take a forward alone, then one that is recorded in predict mode, with its backward."""
    yield subject.forward(0)
    yield subject.forward_backward(0, training=False)


def frozen(subject: Subject) -> Iterator[Tensors]:
    """Forward and backward in training, with running statistics."""
    with all_frozen(subject.net):
        yield subject.forward_backward(0)


def phases_of(a: Block, b: Block, train_too: bool) -> tuple[dict[str, Phase], list[str]]:
    """Return the phases that two nets can go through, and why one is left out."""
    if not train_too:
        return {"inference": inference}, []
    possible: dict[str, Phase] = {"train": train, "inference": inference}
    for name, net in (("a", a), ("b", b)):
        if not freezable(net):
            return possible, [
                f"no frozen phase: no layer of {name} has _kwargs['use_global_stats']"
            ]
    return {**possible, "frozen": frozen}, []


@dataclass
class Computed:
    """What a net computed in a phase: the tensors of each step, and the values it ended with."""

    steps: list[Tensors] = field(default_factory=list)
    values: Values | None = None
    error: str = ""


def run(phase: Phase, subject: Subject) -> Computed:
    """Take a net through a phase, as far as MXNet can run it."""
    computed = Computed()
    try:
        for tensors in phase(subject):
            computed.steps.append(tensors)
        computed.values = subject.values()
    except mx.MXNetError as error:
        computed.error = first_line(error)
        settle()
    return computed
