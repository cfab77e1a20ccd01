"""Running statistics inside a graph: read, written and waited for in the order of the program."""

from __future__ import annotations

import json
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.attribute import AttrScope
from mxnet.name import NameManager

from . import trace
from .arrays import Array, is_symbol


def read(variable: Array) -> Array:
    """Return the value of a variable at this point of the program.

    In a graph that is the value it was last written: a layer that is called twice reads the
    second time what the first call wrote, in whatever order the results are combined.
    """
    if not is_symbol(variable):
        return variable
    write = trace.current().writes.get(trace.key_of(variable))
    return variable if write is None else write.value


def write(F: Any, variable: Array, value: Array, where: Array) -> Array:
    """Write `value` into `variable` where `where` is 1, now or each time the graph runs.

    All of one shape, `value` and `variable` of one dtype; no gradient passes. Returns a symbol of
    that shape: a graph writes only if it contains it. There, a variable that is not finite becomes
    NaN where it is written.

    An operator that writes to one of its inputs makes that input an auxiliary state of the graph,
    which is what ``export`` and ``SymbolBlock.imports`` expect of running statistics. The one
    there is subtracts twice, and that can overwrite exactly, or change no bit::

        variable - old - (-new)    is  0 + new
        variable -  0  -   0       is  variable
    """
    old = read(variable)
    if not is_symbol(variable):
        with autograd.pause():
            variable[:] = F.where(where, value, old)
        return variable
    nothing = F.zeros_like(value)
    before = written(variable)
    first = F.where(where, old, nothing)
    done = mx.sym.load_json(_SUBTRACT_TWICE)(
        first=first if before is None else alike(F, first, before),
        second=F.where(where, -value, nothing),
        variable=variable,
        name=NameManager._current.value.get(None, "assign"),
    )
    attributes = AttrScope._current.value.get(None)
    if attributes:
        done._set_attr(**attributes)
    # MXNET_BACKWARD_DO_MIRROR runs parts of the forward again for the backward, but never concat
    # nor what lies before it: a second write would count the batch twice.
    done = F.concat(F.BlockGrad(done), dim=0)
    remember(variable, F.where(where, value, old), done)
    return done


def remember(variable: Array, value: Array, done: Array) -> None:
    """Record a write that the graph being built has made."""
    trace.current().writes[trace.key_of(variable)] = trace.Write(value, done)


def written(variable: Array) -> Array | None:
    """Return a symbol that exists once the latest write to a variable has happened, or None."""
    latest = trace.current().writes.get(trace.key_of(variable))
    return None if latest is None else latest.done


def depend(F: Any, vector: Array, done: Array) -> Array:
    """Return `vector`, shape (C,), with a control dependency on `done`, shape (C,) or (1,)."""
    return alike(F, vector, F.broadcast_like(done, vector)) if is_symbol(vector) else vector


def alike(F: Any, vector: Array, other: Array) -> Array:
    """Return `vector`; a graph infers from this that it has the shape and dtype of `other`."""
    # Not `vector + F.zeros_like(other)`: if several layers normalize one array, that shares a node
    # with many gradients, which MXNet sums in an order that can be circular.
    return F._internal._identity_with_attr_like_rhs(vector, other)


# The operator's Python wrapper refuses to compose it, hence a graph of one node as template:
#
#     first      second    variable
#        \          |         /        momentum * variable - lr * wd * first - lr * second
#           sgd_mom_update             = variable - first - second
#
# with lr, wd and momentum at exactly 1: the operator's own numbers are float32.
_SUBTRACT_TWICE = json.dumps(
    {
        "nodes": [
            *(
                {"op": "null", "name": name, "inputs": []}
                for name in ("first", "second", "variable")
            ),
            {
                "op": "sgd_mom_update",
                "name": "subtract_twice",
                "attrs": {"lr": "1", "momentum": "1", "wd": "1"},
                "inputs": [[0, 0, 0], [1, 0, 0], [2, 0, 0]],
            },
        ],
        "arg_nodes": [0, 1, 2],
        "heads": [[3, 0, 0]],
        "attrs": json.loads(mx.sym.var("any").tojson())["attrs"],  # the version of MXNet
    }
)
