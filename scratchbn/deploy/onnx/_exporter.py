"""MXNet's exporter, asked for one node at a time.

It names tensors by nodes and tells some operators apart by their names, guesses types, and checks
its graph against another opset than it writes. So it is handed one node, with its defaults stated
and the types that are known, under a name that is safe; what it writes is named afterwards.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mxnet.onnx.mx2onnx._export_onnx import MXNetGraph
from onnx import NodeProto

from ._emitter import LOCAL, Emitter

# The newest opset that the exporter has translations for.
_NEWEST = 13


def exported(emitter: Emitter) -> list[str]:
    """Let MXNet's exporter translate a node; returns the names of its outputs."""
    node = emitter.node
    lookup = [
        [SimpleNamespace(name=name, dtype=tensor.dtype)]
        for name, tensor in zip(emitter.inputs, emitter.tensors)
    ]
    entry = {
        "op": node.op,
        "name": LOCAL,
        "attrs": emitter.attributes.texts,
        "inputs": [[i, 0, 0] for i in range(len(lookup))],
    }
    result: Any = MXNetGraph.convert_layer(
        entry,
        is_input=False,
        mx_graph=[],
        weights={},
        proc_nodes=[],
        initializer=emitter.constants,
        outputs_lookup=lookup,
        idx=0,
        opset_version=min(emitter.opset, _NEWEST),
    )
    emitter.nodes += [made for made in result[0] if isinstance(made, NodeProto)]
    written = {name for made in emitter.nodes for name in made.output}
    written |= {constant.name for constant in emitter.constants}
    names = []
    for number in range(max(emitter.outputs) + 1):
        name = LOCAL if number == 0 and LOCAL in written else f"{LOCAL}{number}"
        if number in emitter.outputs and name not in written:
            raise ValueError(f"the exporter has no output {number} of it")
        names.append(name)
    return names
