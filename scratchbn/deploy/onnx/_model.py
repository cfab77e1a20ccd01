"""A translated graph as an ONNX model, whole or cut off behind some node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ValueInfoProto, helper

from ..._graph.nodes import Graph
from ._shapes import Place, Tensor
from ._translate import Translated
from ._wide import run_wide


@dataclass(frozen=True)
class Model:
    """A graph and its translation, with what both are run on."""

    graph: Graph
    symbol: Any
    values: Mapping[str, Any]
    inputs: Mapping[str, Any]
    places: list[Place]
    known: Mapping[Place, Tensor]
    translated: Translated
    opset: int

    def needed(self) -> list[str]:
        """Return the inputs that the outputs depend on: labels of a loss are none."""
        used = {name for node in self.translated.nodes for name in node.input}
        return [name for name in self.inputs if name in used]

    def reference(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return what MXNet computes at each place."""
        return run_wide(self.symbol, self.values, arrays)

    def proto(self) -> Any:
        """Return the model that is written."""
        heads = zip(self.translated.heads, self.graph.heads)
        outputs = [self._entry(name, self.known[head.node, head.number]) for name, head in heads]
        return self._proto(len(self.translated.nodes), outputs)

    def part(self, end: int, names: Iterable[str]) -> Any:
        """Return the model of the first `end` nodes, with any tensors as outputs."""
        return self._proto(end, [ValueInfoProto(name=name) for name in names])

    def _proto(self, end: int, outputs: list[Any]) -> Any:
        variables = self.graph.variables()
        inputs = [self._entry(name, self.known[variables[name], 0]) for name in self.needed()]
        nodes = self.translated.nodes[:end]
        used = {name for node in nodes for name in node.input}
        constants = [constant for constant in self.translated.constants if constant.name in used]
        graph = helper.make_graph(nodes, "scratchbn", inputs, outputs, initializer=constants)
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            producer_name="scratchbn",
            ir_version=helper.find_min_ir_version_for(imports),
            opset_imports=imports,
        )

    def _entry(self, name: str, tensor: Tensor) -> Any:
        """Describe an input or output; what follows the batch is called so."""
        lengths = [
            length if length is not None else "batch" if axis == 0 else f"{name}_{axis}"
            for axis, length in enumerate(tensor.shape)
        ]
        kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
        return helper.make_tensor_value_info(name, kind, lengths)
