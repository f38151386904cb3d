"""The autograd graph of a run as data: its operations in a fixed order, and where the samples lie in each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from flatkern.layers.rule import Layout, operation, rule_for

__all__ = [
    "ISOMETRIC",
    "SPLITS",
    "TRANSPOSES",
    "VIEWS",
    "Graph",
    "Layouts",
    "compare_batches",
    "first_with_samples",
    "in_order",
    "is_complex",
    "on_parameters_alone",
    "shapes_of",
]

VIEWS = frozenset({"View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze", "AsStrided"})
"""Operations that keep all entries in their order."""
TRANSPOSES = frozenset({"T", "Transpose", "Permute"})
SPLITS = frozenset({"Split", "SplitWithSizes", "UnsafeSplit", "Unbind"})
ISOMETRIC = VIEWS - {"AsStrided"} | TRANSPOSES | SPLITS | {"Slice", "Select", "ToCopy", "Clone"}
"""Operations of one operand whose outputs hold its entries (or some of them), each once: norms carry over."""


@dataclass(frozen=True)
class Consumer:
    """An operation that uses output ``output`` of another one as its input number ``operand``."""

    node: Node
    operand: int
    output: int


class Graph:
    """All operations below one tensor, in breadth-first order: the same for two runs of the same code."""

    def __init__(self, root: Tensor) -> None:
        self.nodes: list[Node] = []
        self.index: dict[Node, int] = {}
        self.consumers: dict[Node, list[Consumer]] = {}
        if root.grad_fn is not None:
            self._walk(root.grad_fn)
        self.leaves = {id(node.variable): node for node in self.nodes if hasattr(node, "variable")}

    def _walk(self, root: Node) -> None:
        self.nodes.append(root)
        self.index[root] = 0
        for node in self.nodes:  # grows on the way
            for operand, (below, output) in enumerate(node.next_functions):
                if below is None:
                    continue
                if below not in self.index:
                    self.index[below] = len(self.nodes)
                    self.nodes.append(below)
                self.consumers.setdefault(below, []).append(Consumer(node, operand, output))

    def names(self) -> tuple[str, ...]:
        """Of all operations, in order: tells two runs of different code apart."""
        return tuple(node.name() for node in self.nodes)


def in_order(root: Node | None) -> list[Node]:
    """Nodes below ``root``, every one after those it depends on."""
    order: list[Node] = []
    if root is None:
        return order
    seen = {root}
    stack: list[tuple[Node, int]] = [(root, 0)]
    while stack:
        node, place = stack.pop()
        following = node.next_functions
        while place < len(following):
            child = following[place][0]
            place += 1
            if child is not None and child not in seen:
                seen.add(child)
                stack += [(node, place), (child, 0)]
                break
        else:
            order.append(node)
    return order


def shapes_of(node: Node) -> tuple[torch.Size, ...]:
    """Of all outputs of an operation."""
    metadata: Any = getattr(node, "_input_metadata", ())
    return tuple(torch.Size(m.shape) for m in metadata)


def is_complex(node: Node, output: int | None = None) -> bool:
    """Whether an output of an operation (any of them) holds complex numbers."""
    metadata: Any = getattr(node, "_input_metadata", ())
    return any(m.dtype.is_complex for m in (metadata if output is None else metadata[output : output + 1]))


@dataclass
class Layouts:
    """For each operation of a graph: ``None`` where its output is the same for any batch, else possible layouts."""

    names: tuple[str, ...]
    by_index: list[tuple[Layout, ...] | None]

    def match(self, graph: Graph) -> bool:
        """Whether a graph has the operations these layouts were found for."""
        return graph.names() == self.names

    def of(self, index: int) -> Layout | None:
        """The layout where it is certain."""
        found = self.by_index[index]
        return found[0] if found is not None and len(found) == 1 else None


def compare_batches(first: Graph, n: int, second: Graph, m: int) -> Layouts | None:
    """Where the samples lie, from two runs with n and m ≠ n of them: the axis whose length is proportional.

    An output that has the same shape in both cannot depend on the samples (they do not influence one another), so it
    is computed from parameters and constants alone. ``None``: the two runs are not of the same operations.
    """
    names = first.names()
    if names != second.names():
        return None
    shapes = [(shapes_of(a), shapes_of(b)) for a, b in zip(first.nodes, second.nodes, strict=True)]
    axes = [_sample_axis(a, n, b, m) for a, b in shapes]
    found: list[tuple[Layout, ...] | None] = []
    for index, ((of_a, _), axis) in enumerate(zip(shapes, axes, strict=True)):
        if axis is None:
            found.append(None)
        elif axis[0] < 0:
            found.append(())
        else:
            hint = next(_outer_from_views(first, index, shapes, axes, axis), None)
            outers = [hint] if hint is not None else _divisors(axis[1])
            found.append(tuple(Layout(axis[0], outer) for outer in outers if of_a))
    return Layouts(names, found)


def _sample_axis(
    of_a: tuple[torch.Size, ...], n: int, of_b: tuple[torch.Size, ...], m: int
) -> tuple[int, int] | None:
    """(axis, positions on it a sample) of an operation's first output; (−1, 0): not clear; ``None``: no such axis."""
    if of_a == of_b:
        return None
    if len(of_a) != len(of_b) or not of_a or len(of_a[0]) != len(of_b[0]):
        return -1, 0
    a, b = of_a[0], of_b[0]
    differing = [axis for axis in range(len(a)) if a[axis] != b[axis]]
    if len(differing) != 1:
        return -1, 0
    axis = differing[0]
    if a[axis] % n or b[axis] % m or a[axis] // n != b[axis] // m:
        return -1, 0
    return axis, a[axis] // n


def _outer_from_views(
    graph: Graph,
    index: int,
    shapes: list[tuple[tuple[torch.Size, ...], tuple[torch.Size, ...]]],
    axes: list[tuple[int, int] | None],
    axis: tuple[int, int],
) -> Iterator[int]:
    """How many positions come before the sample on a flattened axis, from a view that has them apart."""
    if axis[1] == 1:
        yield 1
        return
    node = graph.nodes[index]
    # consumers: what the output is reshaped to; an in-place operation behind a view is one step further
    seen = [c.node for c in graph.consumers.get(node, ())]
    seen += [c.node for above in list(seen) if above.name() == "CopySlices" for c in graph.consumers[above]]
    pairs = [(node, above) for above in seen if operation(above) in VIEWS]
    # operands: what was reshaped to go in
    for below, _ in node.next_functions:
        if below is not None and operation(below) in VIEWS and below.next_functions[0][0] is not None:
            pairs.append((below, below.next_functions[0][0]))
    for flat, apart in pairs:
        i, j = graph.index[flat], graph.index[apart]
        flat_axis, other = axes[i], axes[j]
        if flat_axis != axis or other is None or other[1] != 1 or not shapes[j][0]:
            continue
        before = math.prod(shapes[j][0][0][: other[0]])
        ahead = math.prod(shapes[i][0][0][: flat_axis[0]])
        if before % ahead == 0 and axis[1] % (before // ahead) == 0:
            yield before // ahead


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def on_parameters_alone(graph: Graph, node: Node, layouts: Layouts | None) -> bool:
    """Whether an operation above a parameter has no samples in it yet (``layouts`` ``None``: as far as is certain)."""
    if layouts is None:
        return operation(node) in ISOMETRIC
    return layouts.by_index[graph.index[node]] is None


def first_with_samples(graph: Graph, parameters: Mapping[str, Tensor], layouts: Layouts | None) -> list[Node]:
    """The operations with a rule at which parameters first meet samples."""
    wanted = {id(p) for p in parameters.values()}
    pending = [leaf for key, leaf in graph.leaves.items() if key in wanted]
    seen, found = set(pending), []
    while pending:
        for consumer in graph.consumers.get(pending.pop(), ()):
            node = consumer.node
            if node in seen:
                continue
            seen.add(node)
            if on_parameters_alone(graph, node, layouts):
                pending.append(node)
            elif rule_for(node) is not None:
                found.append(node)
    return found
