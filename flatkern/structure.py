"""Which way values take through a model, read off the autograd graph of a run.

The inequalities between flatness and volume need to know whether all that depends on a layer's input goes through
that layer, and whether the model's input reaches its first layer unchanged.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from flatkern.capture import LayerCall, graph_nodes

__all__ = ["holds_entries_of", "is_sole_consumer"]

# operations that keep every entry and add none
_RESHAPES = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "Squeeze",
    "Unsqueeze",
    "Permute",
    "Transpose",
    "T",
)


def holds_entries_of(edge: GradientEdge, origin: GradientEdge, uses: Counter[Node]) -> bool:
    """Whether ``edge`` is ``origin`` but for reshapes, each of which is used for it alone.

    The cotangents at both places then have the same entries, so that norms and singular values need no second look.
    """
    if (edge.node, edge.output_nr) == (origin.node, origin.output_nr):
        return True
    while (edge.node, edge.output_nr) != (origin.node, origin.output_nr):
        if _operation(edge.node) not in _RESHAPES or uses[edge.node] != 1:
            return False
        parent, index = edge.node.next_functions[0]
        if parent is None:
            return False
        edge = GradientEdge(parent, index)
    return uses[origin.node] == 1


def _operation(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def is_sole_consumer(output: Tensor, call: LayerCall) -> bool:
    """Whether the output depends on the layer's input through this one call only."""
    if output.grad_fn is None or call.input_edge is None or call.output_edge is None:
        return False
    around, _ = graph_nodes(output.grad_fn, without=frozenset({call.output_edge.node}))
    return call.input_edge.node not in around
