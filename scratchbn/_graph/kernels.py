"""What may become of the nodes of a graph: which are merged into one, which fused into one kernel.

MXNet merges nodes that do the same to the same inputs, and on a GPU it compiles adjacent operators
on single elements to one kernel. Both go wrong in places that are kept clear of here.
"""

from __future__ import annotations

from typing import Any

import mxnet as mx

from .arrays import Array, is_numpy, is_symbol


def distinct(node: Array) -> Array:
    """Return a node that is merged with no other, and so none of what is computed from it is.

    Fusion cannot order the kernels of two layers on one array if they share nodes ("Check failed:
    it != node2index_.end()").
    """
    if is_symbol(node):
        node._set_attr(__node__=node.name)
    return node


def unfused(vector: Array) -> Array:
    """Return `vector`; what computed it and what uses it will not be in one kernel.

    Fused kernels round scalars to float32 and take roots in float32, whatever the data. An operator
    that is alone between others that are never fused keeps float64; `broadcast_*`, `dot` and
    `where` are of that kind, and so is the one here, which costs nothing.
    """
    return vector.reshape_like(vector) if is_symbol(vector) and not is_numpy(vector) else vector


def alone(matrix: Array) -> Array:
    """Return `matrix`; under np_shape, what computed it and what uses it are not in one kernel.

    There a batch can be empty, and a GPU refuses a fused kernel with nothing to do; MXNet's own
    kernels are then not launched. `flatten` is never fused, moves nothing and has one input. Were
    it merged with others, the sum of their gradients would be fused with what comes to the sum.
    """
    return distinct(matrix.flatten()) if is_symbol(matrix) and mx.util.is_np_shape() else matrix


def alone_of_any_rank(F: Any, x: Array) -> Array:
    """Do what `alone` does at any rank, and refuse rank 1 when shapes are known.

    Not by itself as what it is like: MXNet would add zeros of x's size to x's gradient.
    """
    along = F.BlockGrad(distinct(F.contrib.arange_like(x, axis=1)))
    return F.reshape_like(x, along, lhs_begin=1, lhs_end=2, rhs_begin=0, rhs_end=1)
