"""Rewrite the graph of a trained net for inference: what ``deploy`` does, on the symbol's JSON.

Parameter values are known when a graph is written to files, not when it is traced. So a batch
normalization is one node until here (a marker of :func:`scratchbn.backends.marker`, or MXNet's
``BatchNorm``), and becomes one multiplication and one addition per channel, ``scale * x + shift``,
or disappears in the weights of the layer before it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mxnet as mx
import numpy as np

from ._ir import Entry, Graph, Node
from ._net import BATCH_NORM_OPERATORS
from ._text import first_line
from .backends.marker import KEY as MARKER

STYLES = ("dwconv", "affine", "batchnorm")

_PRODUCERS = {"Convolution", "Deconvolution", "FullyConnected"}
_PASS_THROUGH = {"BlockGrad", "_copy"}
_SPATIAL = {"Convolution", "Deconvolution", "Pooling"}
# Operators whose output has the rank of their first input.
_SAME_RANK = {
    *("Activation", "BlockGrad", "Cast", "Concat", "LeakyReLU", "_copy", "amp_cast", "clip"),
    *("relu", "sigmoid", "tanh"),
    *(f"_{name}_scalar" for name in ("div", "minus", "mul", "plus", "power", "rdiv", "rminus")),
    *(f"elemwise_{name}" for name in ("add", "div", "mul", "sub")),
    *(f"broadcast_{name}" for name in ("add", "div", "mul", "sub")),
    *BATCH_NORM_OPERATORS,
}
CUDNN_LEAST_EPSILON = 1e-5
PARAMETERS = ("gamma", "beta", "running_mean", "running_var")


@dataclass(frozen=True)
class Row:
    """What became of one node: `result` in words, `because` where there was a choice."""

    node: str
    result: str
    because: str = ""


@dataclass
class Norm:
    """A batch normalization in inference, of C channels on `axis`, as ``scale * x + shift``.

    `scale` and `shift` are float64. `stored` has the attributes and parameters for a BatchNorm
    node, unless two norms were merged.
    """

    node: Node
    axis: int
    scale: np.ndarray
    shift: np.ndarray
    stored: tuple[dict[str, str], dict[str, np.ndarray]] | None
    dtype: np.dtype[Any]
    relu: bool = False
    rank: int | None = None

    def channel_axis(self) -> int:
        """Return the axis counted from the start if the rank is known."""
        return self.axis if self.rank is None else self.axis % self.rank


class Lowering:
    """One graph on its way to its inference form.

    Parameters
    ----------
    graph : Graph
        Changed in place.
    values : mapping of str to NDArray
        Parameters by name, without ``arg:`` and ``aux:``.
    shapes, dtypes : mapping
        Of the inputs, as far as they are known.

    Attributes
    ----------
    values : dict of str to NDArray
        After :meth:`run`, the parameters that the new graph needs.
    folded, kept : list of Row
        What became of each batch normalization (and each Dropout that is not the identity).
    """

    def __init__(
        self,
        graph: Graph,
        values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, Any],
    ) -> None:
        self.graph = graph
        self.values = dict(values)
        self.folded: list[Row] = []
        self.kept: list[Row] = []
        self._shapes = shapes
        self._dtypes = dtypes

    def run(self, *, fold: bool, style: str) -> None:
        """Lower the graph; see :func:`scratchbn.deploy.export_inference` for the options."""
        self._simplify()
        norms = self._norms()
        self._infer(norms)
        self._variables = {node.name: node for node in self.graph.nodes() if node.op == "null"}
        remaining = self._fold(norms) if fold else [(norm, "fold=False") for norm in norms]
        for norm, reason in remaining:
            self._emit(norm, reason, style)
        for i, head in enumerate(self.graph.heads):
            if head.node.op == "null":  # an executor has to have something to do
                self.graph.heads[i] = Entry(Node("_copy", f"{head.node.name}_output", {}, [head]))
        self.values = {n: self.values[n] for n in self.graph.variables() if n in self.values}
        for node in self.graph.nodes():
            if node.name in self.values and node.op == "null":
                # Module infers shapes from the inputs alone, which no broadcast operator can.
                node.attrs["__shape__"] = str(self.values[node.name].shape)

    # --- simplify -----------------------------------------------------------------------------

    def _simplify(self) -> None:
        """Remove what does nothing in inference, and the training branch of our own graphs."""
        replacements: dict[Entry, Entry] = {}
        zeros: set[Node] = set()
        updated: list[str] = []
        for node in self.graph.nodes():
            self._check_loop(node)
            node.inputs = [replacements.get(entry, entry) for entry in node.inputs]
            first = node.inputs[0] if node.inputs else None
            out = Entry(node)
            if first is None:
                continue
            if node.op == "reshape_like" and MARKER in node.attrs:
                # The last node of a layer's training graph, which restores the shape of its input.
                attrs = {MARKER: node.attrs[MARKER]}
                replacements[out] = Entry(Node("_copy", node.name, attrs, [node.inputs[1]]))
            elif node.op == "Dropout" and node.attrs.get("mode", "training") != "training":
                self.kept.append(Row(node.name, "left as Dropout", "it has mode='always'"))
            elif node.op == "Dropout" or (
                node.op in _PASS_THROUGH and MARKER not in node.attrs and first.node.op != "null"
            ):
                replacements[out] = first
                if first.node in zeros:
                    zeros.add(node)
            elif self._is_zero(node, zeros):
                zeros.add(node)
            elif node.op == "_identity_with_attr_like_rhs":
                replacements[out] = first
            elif node.op == "where" and first.node in zeros:
                replacements[out] = node.inputs[2]
            elif node.op == "elemwise_add" and node.inputs[1].node in zeros:
                replacements[out] = first
            if node.op == "sgd_mom_update":
                updated.append(node.inputs[2].node.name)
        self.graph.replace(replacements)
        markers = (node for node in self.graph.nodes() if MARKER in node.attrs)
        described = {description_of(node)["running_mean"] for node in markers}
        for name in updated:
            if name.endswith("running_mean") and name not in described:
                layer = name.removesuffix("_running_mean")
                self.kept.append(
                    Row(
                        layer,
                        "inference branch of its training graph",
                        "the graph has no description of the layer",
                    )
                )

    def _check_loop(self, node: Node) -> None:
        body = json.dumps(node.rest.get("subgraphs", ()))
        if MARKER in body:
            raise ValueError(
                f"the layer inside loop {node.name!r} ({node.op}) cannot be exported for "
                "inference: take the batch normalization out of the loop body"
            )
        for op in sorted({*BATCH_NORM_OPERATORS, "Dropout"}):
            if f'"op": "{op}"' in body:
                self.kept.append(Row(node.name, f"left with {op}", "it is inside a loop"))

    @staticmethod
    def _is_zero(node: Node, zeros: set[Node]) -> bool:
        """Tell whether a node is 0 whatever the data: the training flag, and what follows."""
        source = node.inputs[0].node
        if node.op == "zeros_like":
            return True
        if node.op == "broadcast_like":
            return source in zeros
        ones = source.op in ("_ones", "ones_like")
        return node.op == "_not_equal_scalar" and ones and float(node.attrs["scalar"]) == 1

    # --- read ---------------------------------------------------------------------------------

    def _norms(self) -> list[Norm]:
        """Find the batch normalizations; those that cannot be lowered become rows in `kept`."""
        more = {
            entry.node
            for entry in (*(e for n in self.graph.nodes() for e in n.inputs), *self.graph.heads)
            if entry.output > 0
        }
        norms = []
        for node in self.graph.nodes():
            if MARKER in node.attrs:
                norms.append(self._described_norm(node))
            elif node.op in BATCH_NORM_OPERATORS:
                computed = [e.node for e in node.inputs[1:] if e.node.op != "null"]
                reason = None
                if node in more or node.flag("output_mean_var", False):
                    reason = "its statistics are outputs too"
                elif computed:
                    reason = f"{computed[0].name} is computed in the graph"
                if reason is None:
                    norms.append(self._builtin_norm(node))
                    continue
                node.attrs["use_global_stats"] = "True"
                self.kept.append(Row(node.name, f"left as {node.op}", reason))
        return norms

    def _described_norm(self, node: Node) -> Norm:
        about = description_of(node)
        del node.attrs[MARKER]
        node.name = f"{about['running_mean'].removesuffix('_running_mean')}_fwd"
        names = [about[k] for k in PARAMETERS]
        flags = about["fix_gamma"], about["center"]
        return self._norm(node, names, about["axis"], about["epsilon"], *flags)

    def _builtin_norm(self, node: Node) -> Norm:
        names = [entry.node.name for entry in node.inputs[1:]]
        axis = int(node.attrs.get("axis", 1))
        epsilon = float(node.attrs.get("eps", 1e-3))
        norm = self._norm(node, names, axis, epsilon, node.flag("fix_gamma", True), True)
        norm.relu = node.op == "_contrib_BatchNormWithReLU"
        return norm

    def _norm(
        self,
        node: Node,
        names: list[str],
        axis: int,
        epsilon: float,
        fix_gamma: bool,
        center: bool,
    ) -> Norm:
        gamma, beta, mean, variance = (self._value(name, node) for name in names)
        lengths = {name: v.shape for name, v in zip(names, (gamma, beta, mean, variance))}
        if gamma.ndim != 1 or len(set(lengths.values())) > 1:
            raise ValueError(f"parameters of {node.name!r} must have one shape (C,), got {lengths}")
        beta = beta if center else np.zeros_like(beta)
        total = variance + epsilon
        if (total < 0).any():
            raise ValueError(f"parameter {names[3]!r} must not be negative, got {variance.min()}")
        # A channel that never varies, with epsilon 0, is normalized to 0: as in functional.
        inverse = np.divide(1, np.sqrt(total), out=np.zeros_like(total), where=total != 0)
        attrs = {"axis": str(axis), "eps": repr(epsilon), "fix_gamma": str(fix_gamma)}
        stored = (attrs, dict(zip(names, (gamma, beta, mean, variance))))
        scale = inverse if fix_gamma else gamma * inverse
        return Norm(
            node,
            axis,
            scale,
            shift=beta - mean * scale,
            stored=stored if (total > 0).all() else None,
            dtype=np.dtype(self.values[names[0]].dtype),
        )

    def _value(self, name: str, node: Node) -> np.ndarray:
        if name not in self.values:
            raise ValueError(f"parameter {name!r} of node {node.name!r} is missing")
        value: np.ndarray = self.values[name].asnumpy()
        return value.astype(np.float64)

    # --- infer --------------------------------------------------------------------------------

    def _infer(self, norms: list[Norm]) -> None:
        """Find rank and dtype of each norm's input, and check that the parameters fit."""
        sources = [norm.node.inputs[0] for norm in norms]
        part = self.graph.symbol([*self.graph.heads, *sources])
        names = part.list_inputs()
        dtypes = {name: value.dtype for name, value in self.values.items()} | dict(self._dtypes)
        shapes = {name: value.shape for name, value in self.values.items()} | dict(self._shapes)
        try:
            _, types, _ = part.infer_type_partial(**{n: dtypes[n] for n in names if n in dtypes})
            if all(min(shapes.get(name, (0,)), default=1) > 0 for name in names):
                _, found, _ = part.infer_shape_partial(**{n: shapes[n] for n in names})
            else:
                found = None
        except mx.MXNetError as error:
            raise ValueError(
                "the parameters or the shapes of the inputs do not match the symbol: "
                f"{first_line(error)}"
            ) from error
        ranks = self._ranks() if found is None else {}
        skipped = len(self.graph.heads)
        for i, norm in enumerate(norms, start=skipped):
            norm.dtype = np.dtype(types[i]) if types and types[i] else norm.dtype
            norm.rank = len(found[i]) if found and found[i] else ranks.get(norm.node.inputs[0].node)
            if norm.rank is not None and not -norm.rank <= norm.axis < norm.rank:
                raise ValueError(
                    f"axis={norm.axis} of {norm.node.name!r} is out of range: its input has "
                    f"{norm.rank} axes"
                )
            if found and found[i] and found[i][norm.axis] not in (-1, 0, len(norm.scale)):
                raise ValueError(
                    f"{norm.node.name!r} has parameters for {len(norm.scale)} channels, "
                    f"its input has shape {found[i]} and axis={norm.axis}"
                )

    def _ranks(self) -> dict[Node, int]:
        """Return the ranks that follow from the operators alone, where no shapes are known.

        MXNet's own inference fails on lengths that are not known yet, in Pooling for one.
        """
        ranks: dict[Node, int] = {}
        order = self.graph.nodes()
        for node in order:
            if node.op in _SPATIAL and node.integers("kernel"):
                ranks[node.inputs[0].node] = 2 + len(node.integers("kernel"))
        for node in reversed(order):  # from a convolution back to the input of the graph
            if node in ranks and node.op in _SAME_RANK:
                ranks.setdefault(node.inputs[0].node, ranks[node])
        for node in order:
            if node.op in _SPATIAL and node.integers("kernel"):
                ranks[node] = 2 + len(node.integers("kernel"))
            elif node.op == "Flatten" or (
                node.op == "FullyConnected" and node.flag("flatten", True)
            ):
                ranks[node] = 2
            elif node.op in _SAME_RANK | _SPATIAL:
                known = [ranks[entry.node] for entry in node.inputs if entry.node in ranks]
                if known:
                    ranks.setdefault(node, known[0])
        return ranks

    # --- fold ---------------------------------------------------------------------------------

    def _fold(self, norms: list[Norm]) -> list[tuple[Norm, str]]:
        """Fold norms into what is before them; return the others, each with the reason."""
        uses = self.graph.uses()
        by_name = Counter({node.name: n for node, n in uses.items() if node.op == "null"})
        remaining: dict[Node, tuple[Norm, str]] = {}
        replacements: dict[Entry, Entry] = {}
        for norm in norms:
            source = norm.node.inputs[0]
            while source in replacements:
                source = replacements[source]
            norm.node.inputs[0] = source
            before = remaining.get(source.node)
            reason = (
                self._merge(before[0], norm, uses)
                if before is not None
                else self._fold_into(source, norm, uses, by_name)
            )
            if reason is not None:
                remaining[norm.node] = norm, reason
                continue
            word = "merged" if before is not None else "folded"
            self.folded.append(Row(norm.node.name, f"{word} into {source.node.name}"))
            result = source
            if norm.relu and before is None:
                result = self._relu(norm.node.name, source)
                uses[result.node] = uses[norm.node]
            uses[source.node] = uses[norm.node] if result is source else 1
            replacements[Entry(norm.node)] = result
        self.graph.replace(replacements)
        return list(remaining.values())

    @staticmethod
    def _relu(name: str, source: Entry) -> Entry:
        return Entry(Node("Activation", f"{name}_relu", {"act_type": "relu"}, [source]))

    @staticmethod
    def _merge(first: Norm, second: Norm, uses: Counter[Node]) -> str | None:
        """Merge two norms in a row into the first, or return why not."""
        if first.relu:
            return f"a relu lies between {first.node.name} and it"
        if uses[first.node] > 1:
            return f"the output of {first.node.name} is used {uses[first.node]} times"
        if first.channel_axis() != second.channel_axis():
            return f"{first.node.name} has axis {first.axis} and it has axis {second.axis}"
        first.shift = second.scale * first.shift + second.shift
        first.scale = second.scale * first.scale
        first.stored = None
        first.relu = second.relu
        return None

    def _fold_into(
        self, source: Entry, norm: Norm, uses: Counter[Node], by_name: Counter[str]
    ) -> str | None:
        """Fold a norm into the weights of a convolution or dense layer, or return why not."""
        producer = source.node
        if producer.op == "null":
            return f"its input is {producer.name}, not a convolution or dense layer"
        if producer.op not in _PRODUCERS:
            return f"it follows {producer.name} ({producer.op})"
        if producer in (head.node for head in self.graph.heads):
            return f"the output of {producer.name} is an output of the graph"
        if uses[producer] > 1:
            return f"the output of {producer.name} is used {uses[producer]} times"
        if not _same_axis(producer, norm):
            return f"axis {norm.axis} is not the channel axis of {producer.name}"
        for entry in producer.inputs[1:]:
            if entry.node.name not in self.values or entry.node.op != "null":
                return f"{entry.node.name} is not a parameter"
            if by_name[entry.node.name] > 1:
                return f"{entry.node.name} is used by several layers"

        weight_name = producer.inputs[1].node.name
        weight = self._value(weight_name, producer)
        groups = int(producer.attrs.get("num_group", 1))
        is_transposed = producer.op == "Deconvolution"
        outputs = weight.shape[1] * groups if is_transposed else weight.shape[0]
        if outputs != len(norm.scale):
            raise ValueError(
                f"parameters do not match: {weight_name!r} of shape {weight.shape} has {outputs} "
                f"output channels, {norm.node.name!r} has {len(norm.scale)}"
            )
        has_bias = len(producer.inputs) > 2
        bias = self._value(producer.inputs[2].node.name, producer) if has_bias else 0.0
        new_weight = _scaled_weight(producer, weight, norm)
        new_bias = bias * norm.scale + norm.shift
        dtype = self.values[weight_name].dtype
        arrays = [_as_array(v, dtype) for v in (new_weight, new_bias)]
        if any(array is None for array in arrays):
            return f"the folded weights of {producer.name} do not fit {np.dtype(dtype).name}"
        self.values[weight_name] = arrays[0]
        if has_bias:
            self.values[producer.inputs[2].node.name] = arrays[1]
        else:
            producer.inputs.append(
                self._variable(f"{weight_name.removesuffix('_weight')}_bias", arrays[1])
            )
            by_name[producer.inputs[2].node.name] += 1
        producer.attrs["no_bias"] = "False"
        return None

    # --- emit ---------------------------------------------------------------------------------

    def _emit(self, norm: Norm, reason: str, style: str) -> None:
        """Turn a norm's node into the operators that compute it."""
        node, rank = norm.node, norm.rank
        if style == "batchnorm":
            result = self._as_batch_norm(norm)
        elif rank is None:
            result = self._as_batch_norm(norm)
            reason = "the rank of its input is unknown: give the input shapes"
        elif (
            style == "dwconv"
            and 3 <= rank <= 5
            and norm.axis % rank == 1
            and norm.dtype != np.float16  # MXNet has no such convolution on a CPU
        ):
            result = self._as_convolution(norm, rank)
        else:
            result = self._as_arithmetic(norm, rank)
        self.kept.append(Row(node.name, result, reason))
        if norm.relu:
            self.graph.replace({Entry(node): self._relu(node.name, Entry(node))})

    def _as_batch_norm(self, norm: Norm) -> str:
        node = norm.node
        node.op, node.attrs, constants = "BatchNorm", *_as_stored(norm)
        node.attrs["use_global_stats"] = "True"
        node.attrs["cudnn_off"] = str(float(node.attrs["eps"]) < CUDNN_LEAST_EPSILON)
        dtype = np.dtype(np.float64 if norm.dtype == np.float64 else np.float32)
        variables = [self._constant(n, v, dtype, node) for n, v in constants.items()]
        node.inputs = [node.inputs[0], *variables]
        return "BatchNorm with use_global_stats"

    def _as_convolution(self, norm: Norm, rank: int) -> str:
        node, channels, ones = norm.node, len(norm.scale), (1,) * (rank - 2)
        node.op = "Convolution"
        node.attrs = {
            "kernel": str(ones),
            "num_filter": str(channels),
            "num_group": str(channels),
            "no_bias": "False",
        }
        weight = norm.scale.reshape((channels, 1, *ones))
        node.inputs = [
            node.inputs[0],
            self._constant(f"{node.name}_weight", weight, norm.dtype, node),
            self._constant(f"{node.name}_bias", norm.shift, norm.dtype, node),
        ]
        return "1x1 depthwise Convolution"

    def _as_arithmetic(self, norm: Norm, rank: int) -> str:
        node = norm.node
        shape = [1] * rank
        shape[norm.axis] = len(norm.scale)
        scale, shift = norm.scale.reshape(shape), norm.shift.reshape(shape)
        factor = self._constant(f"{node.name}_scale", scale, norm.dtype, node)
        scaled = Node("broadcast_mul", f"{node.name}_scaled", {}, [node.inputs[0], factor])
        node.op, node.attrs = "broadcast_add", {}
        node.inputs = [
            Entry(scaled),
            self._constant(f"{node.name}_shift", shift, norm.dtype, node),
        ]
        return "multiplication and addition"

    def _constant(self, name: str, value: np.ndarray, dtype: Any, node: Node) -> Entry:
        array = _as_array(value, dtype)
        if array is None:
            raise ValueError(
                f"constants of {node.name!r} do not fit {np.dtype(dtype).name}: "
                f"the largest is {np.abs(value).max():g}"
            )
        return self._variable(name, array)

    def _variable(self, name: str, array: Any) -> Entry:
        """Return a variable of that value; it gets another name if that one has another value."""
        unique, count = name, 0
        while unique in self._variables and not _same(self.values.get(unique), array):
            count += 1
            unique = f"{name}_{count}"
        if unique not in self._variables:
            self._variables[unique] = Node("null", unique)
        self.values[unique] = array
        return Entry(self._variables[unique])


def variables_of(graph: Graph) -> list[str]:
    """Return the names of all variables, those that only a marker names included."""
    names = graph.variables()
    for node in graph.nodes():
        if MARKER in node.attrs:
            about = description_of(node)
            names.extend(about[key] for key in PARAMETERS)
    return list(dict.fromkeys(names))


def description_of(node: Node) -> dict[str, Any]:
    """Return what a marker says about its layer."""
    kinds: dict[str, Any] = {
        "axis": int,
        "epsilon": (int, float),
        "fix_gamma": bool,
        "center": bool,
        **dict.fromkeys(PARAMETERS, str),
    }
    text = node.attrs[MARKER]
    try:
        about = json.loads(text)
        damaged = [key for key, kind in kinds.items() if not isinstance(about[key], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"attribute {MARKER} of node {node.name!r} is damaged: {text}") from error
    if damaged:
        raise ValueError(f"{damaged[0]} in {MARKER} of node {node.name!r} is damaged: {text}")
    return dict(about)


def _same_axis(producer: Node, norm: Norm) -> bool:
    """Tell whether a norm's axis is the one that the weights of `producer` belong to."""
    if producer.op == "FullyConnected" and not producer.flag("flatten", True):
        last = -1 if norm.rank is None else norm.rank - 1
        return norm.channel_axis() == last
    rank = 2 + len(producer.integers("kernel"))
    layout = producer.attrs.get("layout", "None")
    axis = 1 if layout == "None" else layout.index("C")
    return norm.axis % rank == axis and (axis == 1 or producer.op == "Convolution")


def _scaled_weight(producer: Node, weight: np.ndarray, norm: Norm) -> np.ndarray:
    if producer.op != "Deconvolution":
        return weight * norm.scale.reshape((-1,) + (1,) * (weight.ndim - 1))
    # Shape (C_in, C_out / groups, ...): the group of an input channel tells its output channels.
    groups = int(producer.attrs.get("num_group", 1))
    inputs, outputs = weight.shape[:2]
    scale = np.repeat(norm.scale.reshape(groups, outputs), inputs // groups, axis=0)
    return weight * scale.reshape((inputs, outputs) + (1,) * (weight.ndim - 2))


def _as_stored(norm: Norm) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return attributes and parameters of the BatchNorm node that computes a norm."""
    if norm.stored is not None:
        attrs, values = norm.stored
        return dict(attrs), values
    epsilon = CUDNN_LEAST_EPSILON
    attrs = {"axis": str(norm.axis), "eps": repr(epsilon), "fix_gamma": "False"}
    name = norm.node.name
    return attrs, {
        f"{name}_gamma": norm.scale * np.sqrt(1 + epsilon),
        f"{name}_beta": norm.shift,
        f"{name}_running_mean": np.zeros_like(norm.scale),
        f"{name}_running_var": np.ones_like(norm.scale),
    }


def _as_array(value: np.ndarray, dtype: Any) -> Any:
    """Return an NDArray, or None if finite values overflow its dtype."""
    with np.errstate(over="ignore"):
        rounded = value.astype(dtype)
    if (np.isfinite(value) & ~np.isfinite(rounded)).any():
        return None
    return mx.nd.array(rounded, ctx=mx.cpu(), dtype=rounded.dtype)


def _same(one: Any, other: Any) -> bool:
    return (
        one is not None
        and one.shape == other.shape
        and one.dtype == other.dtype
        and np.array_equal(one.asnumpy(), other.asnumpy(), equal_nan=True)
    )
