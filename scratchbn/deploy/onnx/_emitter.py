"""What a translation is given: one node of MXNet, and the means to write nodes of ONNX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ..._graph.nodes import Node
from ._attributes import Attributes
from ._shapes import Tensor

# Names inside one node's translation begin so, until they get names of the file.
LOCAL = ":local:"


@dataclass
class Emitter:
    """One node on its way to ONNX.

    `inputs` are names of ONNX tensors, `tensors` what is known of them, `outputs` what is known
    of those outputs of the node that are used.
    """

    node: Node
    inputs: list[str]
    tensors: list[Tensor]
    outputs: dict[int, Tensor]
    opset: int
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.attributes = Attributes(self.node.op, self.node.attrs)

    @property
    def out(self) -> Tensor:
        """What is known of the first output."""
        return self.outputs[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the first input."""
        return self.tensors[0].dtype

    def add(self, op: str, *inputs: str, outputs: int = 1, **attrs: Any) -> str:
        """Write a node; returns the name of its first output, the others count from there."""
        names = [
            f"{LOCAL}{op}_{len(self.nodes)}{'_' + str(i) if i else ''}" for i in range(outputs)
        ]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attrs))
        return names[0]

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Write a constant, of the first input's type if none is given."""
        name = f"{LOCAL}constant_{len(self.constants)}"
        array = np.asarray(value, dtype=self.dtype if dtype is None else dtype)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, values: Iterable[int]) -> str:
        """Write a constant list of integers, as shapes and axes are given."""
        return self.constant(list(values), np.int64)

    def reduce(self, op: str, x: str, axes: Sequence[int], keepdims: bool = True) -> str:
        """Reduce along axes, which have been an input instead of an attribute since an opset."""
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self.add(op, x, self.integers(axes), keepdims=int(keepdims))
        return self.add(op, x, axes=list(axes), keepdims=int(keepdims))

    def reshape(self, x: str, shape: Sequence[int | None]) -> str:
        """Reshape; one length at most may be None."""
        if sum(n is None for n in shape) > 1:
            raise ValueError(f"two lengths of its result depend on the batch: {tuple(shape)}")
        if 0 in shape:
            raise ValueError(f"its result is empty: {tuple(shape)}")
        return self.add("Reshape", x, self.integers(-1 if n is None else n for n in shape))

    def cast(self, x: str, dtype: Any) -> str:
        """Convert the type."""
        return self.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def per_channel(self, x: str, axis: int, rank: int) -> str:
        """View a list of channels so that it broadcasts along `axis` of an array."""
        shape = [1] * rank
        shape[axis] = -1
        return self.add("Reshape", x, self.integers(shape))

    def softmax(self, x: str, axis: int, rank: int) -> str:
        """Softmax along one axis; before opset 13 it was along all axes from there on."""
        axis %= rank
        if self.opset >= 13 or axis == rank - 1:
            return self.add("Softmax", x, axis=axis)
        shifted = self.add("Sub", x, self.reduce("ReduceMax", x, [axis]))
        powers = self.add("Exp", shifted)
        return self.add("Div", powers, self.reduce("ReduceSum", powers, [axis]))
