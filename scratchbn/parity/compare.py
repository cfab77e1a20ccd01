"""Give two nets the same parameters, data and output gradients, and compare what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block

from .._net import disable_dropout, has_builtin
from ..backends import get_backend
from . import nets
from .difference import differences
from .phases import phases_of, run
from .report import Report
from .row import Row
from .settings import Settings
from .subject import Batches, Subject

Array = Any


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
    loss: Callable[[Any], Any] | None = None,
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
        in the tensor; for the gradient of a parameter, in all gradients of its layer. Default:
        1e-10, 1e-5 and 5e-3 by dtype, both of them.
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
        What the nets are trained on. It is called under ``record()`` as ``loss(outputs)``, with
        the net's output, or the list of its outputs if there are several, and returns an NDArray,
        whose sum is differentiated. Default: the output gradients are drawn at random, the same
        for both nets, so that every output counts.

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
    Layers of this package compute with the backend that is chosen (``use_backend``); the report
    names it, with versions, processor and date.

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

    With the gradients of a loss:

    >>> labels = mx.nd.array([0, 1, 2] * 4)
    >>> cross_entropy = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    >>> x = mx.nd.random.normal(shape=(12, 3))
    >>> loss = lambda outputs: cross_entropy(outputs, labels)
    >>> bool(compare(ScratchBatchNorm(), nn.BatchNorm(), x, loss=loss))
    True
    """
    for name, net in (("a", a), ("b", b)):
        if not isinstance(net, Block):
            raise TypeError(f"{name} must be a gluon Block, got {net!r}")
    settings = Settings(
        steps=steps,
        train=train,
        dtype=dtype,
        modes=modes,
        learning_rate=learning_rate,
        seed=seed,
        loss=loss,
        rtol=rtol,
        atol=atol,
        statistics_rtol=statistics_rtol,
        statistics_atol=statistics_atol,
        builtin=has_builtin(a, b),
        backend=get_backend(),
    )
    batches = _batches(inputs, dtype)
    nets.check_alike(a, b)
    rows: list[Row] = []
    with nets.borrowed(a, b), autograd.pause():
        values, device = nets.values_of(a, batches[0], settings.value_stream())
        phases, notes = phases_of(a, b, train)
        for net in (a, b):
            net.cast(dtype)
            disable_dropout(net)
        for mode in modes:
            start = values
            for name, phase in phases.items():
                # One after the other: the nets may share their parameters.
                one, two = (
                    run(phase, Subject(net, start, mode, batches, device, settings))
                    for net in (a, b)
                )
                rows += differences(one, two, mode, name, settings)
                start = one.values or start
    return Report(tuple(rows), settings.described(), tuple(notes))


def _batches(inputs: Array, dtype: str) -> Batches:
    """Return the arguments of every call, as NumPy arrays."""
    listed = inputs if isinstance(inputs, list) else [inputs]
    batches = [b if isinstance(b, tuple) else (b,) for b in listed]
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
