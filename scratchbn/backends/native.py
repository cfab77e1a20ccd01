"""The compiled operator; what it computes is in ``scratchbn/native/``."""

from __future__ import annotations

import itertools
from typing import Any

from mxnet import autograd

from .._graph import trace
from .._graph.arrays import Array, is_symbol
from .._graph.state import alike, depend, remember, written
from ..native import batch_norm
from .way import Layer, State, in_float32, named

_serial = itertools.count()


@named
def native(layer: Layer, F: Any, x: Array, state: State) -> Array:
    """Normalize a batch by one operator, in training and in inference."""
    if _on_gpu(x):  # there the operator takes float16 and computes in float32
        return _normalize(layer, F, x, state, half=True)
    return _in_float32(layer, F, x, state)


def _normalize(layer: Layer, F: Any, x: Array, state: State, **more: Any) -> Array:
    options = layer.options
    relu = layer.activates_by_relu
    compute = _in_graph if is_symbol(x) else _now
    y = compute(
        F,
        x,
        state,
        may_train=not options.use_global_stats,
        axis=options.axis,
        epsilon=options.epsilon,
        momentum=options.momentum,
        scale=options.scale,
        center=options.center,
        relu=relu,
        unbiased_variance=options.unbiased_variance,
        **more,
    )
    return y if relu else layer.activate(F, y)


_in_float32 = in_float32(_normalize)


def _now(F: Any, x: Array, state: State, may_train: bool, **options: Any) -> Array:
    inputs = [x, state.gamma, state.beta]
    if autograd.is_recording():
        # MXNet overwrites the gradient of an extension's input also where grad_req is 'add'.
        inputs = [v if v.grad is None else F.identity(v) for v in inputs]
    training = may_train and autograd.is_training()
    flag = F.full((1,), 0 if training else 1, ctx=x.context)
    return _operator(F, inputs, state, flag, options)[0]


def _in_graph(F: Any, x: Array, state: State, may_train: bool, **options: Any) -> Array:
    on_gpu = _on_gpu(x)
    # Each identity of its own: MXNet merges equal nodes, and adds many gradients in place.
    x = F.identity(x, attr=_distinct())
    gamma, beta = _copies(F, state.gamma, state.beta, at_once=on_gpu)
    flag = _flag(F, may_train, shared=on_gpu)
    before = written(state.running_mean)
    if before is not None:  # a layer that is called twice writes in the order of the calls
        if on_gpu:  # where each operator is a launch, but for those that move nothing
            beta = alike(F, beta, before)
        else:
            flag = depend(F, flag, F.cast(F.slice_axis(before, 0, 0, 1), "float32"))
    inputs = [x, gamma, beta]
    y, done = _operator(F, inputs, state, flag, options)
    for variable in state.moving:
        remember(variable, alike(F, variable, done), done)
    return y


def _copies(F: Any, gamma: Array, beta: Array, at_once: bool) -> list[Array]:
    """Return copies of two Parameters, which take their gradients in whatever way is asked for.

    A GPU can make both by one launch, and by one hand both gradients on: fusion, which leaves
    single operators alone, makes a kernel of the two of these.
    """
    if not at_once:
        return [F.identity(v, attr=_distinct()) for v in (gamma, beta)]
    gamma, beta = F.amp_multicast(gamma, beta, num_outputs=2, attr=_distinct())
    return [F.identity(gamma, attr=_distinct()), beta]


def _flag(F: Any, may_train: bool, shared: bool) -> Array:
    """Return what is 1 in inference, 0 or 2 in training.

    On a GPU one serves all layers of a graph, as a launch costs more than what it computes; on a
    CPU each has its own, so that all backends draw the same random numbers.
    """
    flags = trace.current().shared if shared else {}
    key = trace.key_of(F.var("flag")), may_train
    if key not in flags:
        one = F.ones((1,))
        flags[key] = F.Dropout(one, p=0.5) if may_train else one
    return flags[key]


def _on_gpu(x: Array) -> bool:
    return {device.device_type for device in trace.devices_of(x)} == {"gpu"}


def _operator(F: Any, inputs: list[Array], state: State, flag: Array, options: Any) -> Any:
    """Return the output, and a symbol of the writes."""
    mean, variance, *count = state.moving
    x, gamma, beta = inputs
    return batch_norm(F, x, gamma, beta, mean, variance, flag, *count, **options)


def _distinct() -> dict[str, str]:
    return {"__serial__": str(next(_serial))}
