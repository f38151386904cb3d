"""An upper bound on the rank of a Jacobian, read off the autograd graph: the narrowest place that all paths share."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from flatkern.graph import shapes_of
from flatkern.layers.rule import operation

__all__ = ["rank_bound", "reaches"]

_NORMALIZED = frozenset({"Softmax", "LogSoftmax", "NativeLayerNorm"})
"""Operations whose outputs lie on a surface of one dimension less, row by row: their sum (of exponentials; before the
affine map) is fixed."""


def reaches(output: Tensor, source: GradientEdge) -> bool:
    """Whether the output depends on ``source``, as far as the graph says."""
    return output.grad_fn is not None and source.node in _between(output.grad_fn, source.node)


def rank_bound(output: Tensor, source: GradientEdge) -> tuple[int, str]:
    """The bound for one sample's Jacobian, and the operation it comes from (empty: output or source themselves).

    Args:
        output: [n, ...], with its graph.
        source: where the derivative is taken in; reached by the graph.
    """
    assert output.grad_fn is not None
    n = len(output)
    best, where = output[0].numel(), ""
    for node in _on_every_path(output.grad_fn, source.node):
        entries = _entries(node) // n
        rows = _rows(node, n)
        if 0 < entries - rows < best:
            name = f"{operation(node)} with {entries} entries a sample"
            where = "the source" if node is source.node else name + (", normalized" if rows else "")
            best = entries - rows
    return best, where


def _entries(node: Node) -> int:
    """Real numbers that the operation hands on."""
    metadata: Any = getattr(node, "_input_metadata", ())
    if operation(node) == "NativeLayerNorm":
        metadata = metadata[:1]  # its others are statistics
    return sum(torch.Size(m.shape).numel() * (2 if m.dtype.is_complex else 1) for m in metadata)


def _rows(node: Node, samples: int) -> int:
    """How many normalized rows of a sample the operation puts out."""
    if operation(node) not in _NORMALIZED:
        return 0
    shape = shapes_of(node)[0]
    if operation(node) == "NativeLayerNorm":
        return (
            shape.numel()
            // max(1, torch.Size(getattr(node, "_saved_normalized_shape", ())).numel())
            // samples
        )
    dim = getattr(node, "_saved_dim", -1)
    dim = dim - (1 << 64) if dim >= 1 << 63 else dim  # saved as an unsigned number
    return shape.numel() // max(1, shape[dim]) // samples


def _between(root: Node, source: Node) -> set[Node]:
    """The operations on some path from ``root`` down to ``source``."""
    order, seen, stack = [], {root}, [root]
    while stack:
        node = stack.pop()
        order.append(node)
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    above: dict[Node, list[Node]] = {}
    for node in order:
        for below, _ in node.next_functions:
            if below is not None:
                above.setdefault(below, []).append(node)
    if source not in seen:
        return set()
    found, pending = {source}, [source]
    while pending:
        for node in above.get(pending.pop(), ()):
            if node not in found:
                found.add(node)
                pending.append(node)
    return found


def _on_every_path(root: Node, source: Node) -> list[Node]:
    """The operations that every path from ``root`` to ``source`` goes through."""
    inside = _between(root, source)
    missing: Counter[Node] = Counter()
    for node in inside:
        for below, _ in node.next_functions:
            if below is not None and below in inside:
                missing[below] += 1
    found, ready, waiting = [], [root], {root}
    while ready:
        node = ready.pop()
        if len(waiting) == 1:
            found.append(node)
        waiting.discard(node)
        if node is source:
            continue
        for below, _ in node.next_functions:
            if below is not None and below in inside:
                waiting.add(below)
                missing[below] -= 1
                if missing[below] == 0:
                    ready.append(below)
    return found
