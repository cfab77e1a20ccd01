"""Nets on loan: what they have in common, the values they start from, and putting it all back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.gluon import Block, Constant, Parameter

from .._net import blocks_of, detach_trainer, has_value, initialize_now, parameters_of

Values = dict[str, np.ndarray]


def check_alike(a: Block, b: Block) -> None:
    """Raise ValueError unless two nets have the same parameters by name and shape."""
    ours, theirs = parameters_of(a), parameters_of(b)
    for mine, other in itertools.zip_longest(sorted(ours), sorted(theirs)):
        if mine != other:
            odd, owner = min((n, o) for n, o in ((mine, "a"), (other, "b")) if n is not None)
            raise ValueError(f"a and b must have the same parameters, but only {owner} has {odd!r}")
    for name, parameter in ours.items():
        shape, other_shape = parameter.shape, theirs[name].shape
        if _known(shape) and _known(other_shape) and shape != other_shape:
            raise ValueError(
                f"a and b must have the same parameters, but {name!r} has shape {shape} in a "
                f"and {other_shape} in b"
            )


@contextmanager
def borrowed(*nets: Block) -> Iterator[None]:
    """Put back everything about the nets' blocks and parameters on leaving.

    MXNet replaces these attributes when it casts, initializes or hybridizes and does not change
    what they held, so the old objects, arrays included, are the old state bit for bit.
    """
    owners: dict[int, Any] = {}
    for net in nets:
        owners.update((id(block), block) for block in blocks_of(net))
        for found in (parameters_of(net), net.collect_params()):
            owners.update((id(p), p) for p in found.values())
    saved = [(owner, dict(vars(owner))) for owner in owners.values()]
    try:
        for owner in owners.values():
            if isinstance(owner, Parameter):
                detach_trainer(owner)
        yield
    finally:
        settle()
        for owner, attributes in saved:
            vars(owner).clear()
            vars(owner).update(attributes)


def settle() -> None:
    """Wait for everything MXNet has queued; errors there were recorded or raised before."""
    while True:
        try:
            mx.nd.waitall()
        except mx.MXNetError:
            continue
        return


def values_of(
    net: Block, batch: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[Values, Any]:
    """Return the values of a net's parameters, drawing those it does not have, and its device."""
    parameters = parameters_of(net)
    valued = {name: p for name, p in parameters.items() if has_value(p)}
    devices = [p.list_ctx()[0] for p in valued.values()]
    device = devices[0] if devices else mx.current_context()
    values = {name: p.data(p.list_ctx()[0]).asnumpy() for name, p in valued.items()}
    unset = {name: p for name, p in parameters.items() if name not in values}
    if not all(_known(p.shape) for p in unset.values()):
        for p in unset.values():
            initialize_now(p, mx.init.Zero(), device)
        net.cast("float32")
        arrays = [x.astype("float32") if x.dtype.kind == "f" else x for x in batch]
        net(*(on_device(x, device) for x in arrays))
        mx.nd.waitall()
    for name, p in unset.items():
        values[name] = _draw(name.rsplit(".", 1)[-1], p, rng, device)
    return values, device


def _draw(name: str, parameter: Parameter, rng: np.random.Generator, device: Any) -> np.ndarray:
    """Return values for a parameter that no default could be mistaken for."""
    shape = parameter.shape
    if len(shape) > 1 and not isinstance(parameter, Constant):
        return rng.normal(size=shape) * math.sqrt(2 / math.prod(shape[1:]))
    if name == "running_var" or (name == "gamma" and parameter.grad_req != "null"):
        return rng.uniform(0.5, 2, shape)
    if name == "running_mean" or parameter.grad_req != "null":
        return rng.normal(size=shape)
    # Constants, counters, and the gamma or beta of a layer that does not use it.
    initialize_now(parameter, None, device)
    values: np.ndarray = parameter.data(device).asnumpy()
    return values


def load(parameters: dict[str, Parameter], values: Values, device: Any) -> None:
    """Give every parameter an array of its own with its value."""
    for name, parameter in parameters.items():
        value = values[name]
        parameter.shape = value.shape
        initialize_now(parameter, mx.init.Zero(), device)
        parameter.set_data(on_device(value.astype(parameter.dtype), device))


def on_device(values: np.ndarray, device: Any) -> Any:
    """Return an array of the kind in use: ``mx.np`` under ``npx.set_np``, ``mx.nd`` otherwise."""
    make = mx.np.array if mx.util.is_np_array() else mx.nd.array
    return make(values, dtype=values.dtype, ctx=device)


def _known(shape: Sequence[int] | None) -> bool:
    return shape is not None and all(n > 0 for n in shape)
