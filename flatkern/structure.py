"""Which way values take through a model, read off the autograd graph of a run.

The inequalities between flatness and volume need to know whether all that depends on a layer's input goes through
that layer, and whether the model's input reaches its first layer unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from flatkern.capture import LayerCall, graph_nodes

__all__ = ["holds_entries_of", "is_sole_consumer", "joint_consumers"]

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


def joint_consumers(output: Tensor, call: LayerCall, calls: Sequence[LayerCall]) -> tuple[LayerCall, ...]:
    """The other calls that take the same tensor, where all of them together are the only way on from it.

    Queries, keys and values of one input, say. Empty where there is none, or where the output is reached around them.
    """
    if output.grad_fn is None or call.input_edge is None:
        return ()
    place = (call.input_edge.node, call.input_edge.output_nr)
    together = [
        other
        for other in calls
        if other.input_edge is not None
        and other.output_edge is not None
        and (other.input_edge.node, other.input_edge.output_nr) == place
    ]
    if len(together) < 2:
        return ()
    ways = frozenset(other.output_edge.node for other in together if other.output_edge is not None)
    around, _ = graph_nodes(output.grad_fn, without=ways)
    if call.input_edge.node in around:
        return ()
    return tuple(other for other in together if other is not call)
