"""A symbol as nodes that can be rewired, under the name it has in this room."""

from .._graph.nodes import Graph as Graph
from .._graph.nodes import Node as Node
from .._graph.nodes import Output as Output
