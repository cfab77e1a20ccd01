"""The graph that MXNet executes, and which of its nodes a GPU may make one kernel of.

An executor that is bound on a CPU prints its graph, forward and backward, after common
subexpressions were eliminated: what pointwise fusion is given on a GPU. What it fuses is read from
``src/operator/fusion/fused_op-inl.h`` of MXNet 1.9.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

import mxnet as mx
import numpy as np

# ops_desc and variable_io_ops of fused_op-inl.h, those by which no graph of ours can be meant
# (names that are only aliases of an operator, trigonometry) left out.
_BINARY = "elemwise_add elemwise_sub elemwise_mul elemwise_div _power _maximum _minimum _hypot"
_UNARY = (
    "relu sigmoid softsign exp expm1 log log10 log2 log1p tanh sqrt rsqrt cbrt rcbrt square squeeze"
    " zeros_like ones_like Reshape expand_dims round rint fix floor ceil trunc sign reciprocal abs"
    " gamma gammaln erf erfinv _copy _identity_with_attr_like_rhs Cast clip negative amp_cast"
    " Activation smooth_l1 _zeros _ones"
)
_SCALAR = (
    "_plus_scalar _minus_scalar _rminus_scalar _mul_scalar _div_scalar _rdiv_scalar _power_scalar"
    " _rpower_scalar _hypot_scalar"
)
_BACKWARD = (
    "relu sigmoid expm1 log log10 log2 log1p tanh sqrt rsqrt cbrt rcbrt square div_scalar"
    " rdiv_scalar hypot_scalar erf erfinv reciprocal abs sign clip smooth_l1 sub mul mul_scalar div"
    " power power_scalar rpower_scalar maximum minimum hypot reshape amp_cast Activation"
    " amp_multicast cast"
)
FUSABLE = {
    *f"{_BINARY} {_UNARY} {_SCALAR} add_n amp_multicast".split(),
    *(f"_backward_{op}" for op in _BACKWARD.split()),
}
BEGINS_ONLY = {"slice", "slice_axis", "slice_like", "broadcast_like"}
# Fused code of these calls a function of float32, whatever the data.
FLOAT32_FUNCTIONS = {
    *("sqrt", "rsqrt", "cbrt", "rcbrt", "_backward_rsqrt", "_backward_rcbrt"),
    *("_power", "_power_scalar", "_backward_power", "_backward_power_scalar"),
    *("_backward_rpower_scalar", "clip", "_backward_clip"),
}


@dataclass(eq=False)
class Step:
    """A node of the graph that an executor runs."""

    op: str
    name: str
    inputs: list[Step] = field(default_factory=list)
    waits_for: list[Step] = field(default_factory=list)
    attrs: dict[str, str] = field(default_factory=dict)

    @cached_property
    def is_backward(self):
        """Whether it belongs to the backward; sums of gradients wait for no step of the forward."""
        return bool(self.waits_for) or any(step.is_backward for step in self.inputs)


def executed(symbol, dtype="float32", **shapes):
    """The nodes that an executor runs, forward and backward, each after its inputs."""
    types = dict.fromkeys(shapes, dtype)
    return _read(symbol.simple_bind(mx.cpu(), type_dict=types, **shapes).debug_str())


def _read(text):
    steps, latest, section = [], {}, ""
    for line in text.splitlines():
        head = re.fullmatch(r"Op:(.+), Name=(.+)|Variable:(.+)", line)
        if head:
            op, name, variable = head.groups()
            steps.append(Step(op or "null", name or variable))
            latest[steps[-1].name] = steps[-1]  # sums of gradients all have one name
        elif line.endswith(":"):
            section = line
        elif line.startswith("\t") and steps:
            key, _, value = line.strip().partition("=")
            if section == "Attrs:":
                steps[-1].attrs[key] = value
            elif section == "Inputs:":
                steps[-1].inputs.append(latest[value.rsplit("(", 1)[0]])
            elif section == "Control deps:":
                steps[-1].waits_for.append(latest[value])
    return steps


def is_rounded(step):
    """Whether fused code would compute this in float32 although the data is float64."""
    scalar = float(step.attrs["scalar"]) if "scalar" in step.op else 0.0
    inexact = float(np.float32(scalar)) != scalar
    return step.op in FUSABLE and (inexact or step.op in FLOAT32_FUNCTIONS)


def fusable_beside(step, steps):
    """The neighbours that may be in one kernel with `step`, which is forward or backward."""
    users = [other for other in steps if step in other.inputs and other.op in FUSABLE]
    sources = [other for other in step.inputs if other.op in FUSABLE | BEGINS_ONLY]
    return [s for s in (*sources, *users) if s.is_backward == step.is_backward]
