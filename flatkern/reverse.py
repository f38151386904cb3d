"""Cotangents pulled back through convolutional networks, all K of a sample together, by rules of this package.

Autograd batches a backward pass over cotangents with vmap, which takes convolutions and pools one cotangent at a time
and keeps no samples together. For the operations of ordinary convolutional networks
(:mod:`flatkern.reverse_rules`) the graph is walked here instead; where it holds another one, autograd is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from flatkern.graph import in_order
from flatkern.layers.rule import operation
from flatkern.reverse_rules import Pulled, operands, pull_through, scatters
from flatkern.scattered import Scattered

__all__ = ["TOGETHER_BYTES", "ReversePass", "has_reverse_pass", "reverse_pass", "reverse_pays"]

TOGETHER_BYTES = 1 << 26
"""Bytes of the widest place up to which cotangents go through one pass."""


@dataclass(frozen=True)
class _Step:
    """One operation: which inputs are wanted."""

    node: Node
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class ReversePass:
    """The operations between an output and some places, in the order in which cotangents reach them."""

    root: Node
    steps: tuple[_Step, ...]
    kept: frozenset[Node]
    """Places whose cotangents are asked for."""

    @torch.no_grad()
    def pull(self, roots: Tensor) -> dict[Node, Pulled]:
        """Cotangents [K, n, *output] → [n, K, ...] at each place that the output depends on."""
        at: dict[Node, Pulled] = {self.root: roots.transpose(0, 1).contiguous()}
        for step in self.steps:
            g = at[step.node] if step.node in self.kept else at.pop(step.node)
            for operand in step.wanted:
                below, _ = step.node.next_functions[operand]
                assert below is not None
                found = pull_through(step.node, operand, g)
                if below in at:
                    found = _dense(at[below]) + _dense(found)
                at[below] = found
        return at

    def __call__(self, roots: Tensor, block: int) -> Iterator[tuple[slice, dict[Node, Pulled]]]:
        """The same for ``block`` cotangents at a time."""
        for start in range(0, len(roots), block):
            part = roots[start : start + block]
            yield slice(start, start + len(part)), self.pull(part)


def _dense(g: Pulled) -> Tensor:
    return g.dense if isinstance(g, Scattered) else g


def reverse_pass(output: Tensor, edges: Sequence[GradientEdge]) -> ReversePass | None:
    """The pass from ``output`` [n, ...] to ``edges``; ``None`` where rules are missing, or nothing is convolved."""
    root = output.grad_fn
    if root is None or any(edge.output_nr for edge in edges):
        return None
    kept = frozenset(edge.node for edge in edges)
    order = _above(root, kept)
    if not any(operation(node) == "Convolution" for node in order):
        return None
    leading = set(order) | kept
    steps = []
    for node in order:
        known = operands(node, len(output))
        wanted = tuple(i for i, (below, _) in enumerate(node.next_functions) if below in leading)
        if known is None or any(i not in known or node.next_functions[i][1] for i in wanted):
            return None
        steps.append(_Step(node, wanted))
    return ReversePass(root, tuple(steps), kept)


def reverse_pays(output: Tensor, k: int) -> bool:
    """Whether the pass is faster than autograd for K cotangents together: if some convolution's stay scattered.

    Measured on one core: 3 to 5 times on LeNet and VGG-10, but 0.8 to 1.0 times where no kernel for scattered
    cotangents comes in (strided convolutions; a single cotangent).
    """
    return any(scatters(node, k) for node in _reached(output) or ())


def has_reverse_pass(output: Tensor) -> bool:
    """Whether rules lead from ``output`` [n, ...] through all that is computed from the samples, convolutions too."""
    return any(operation(node) == "Convolution" for node in _reached(output) or ())


def _reached(output: Tensor) -> set[Node] | None:
    """The operations that rules lead through; ``None`` where one is missing."""
    seen: set[Node] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        known = operands(node, len(output))
        if known is None:
            return None
        stack += [node.next_functions[i][0] for i in known if i < len(node.next_functions)]
    return seen


def _above(root: Node, targets: frozenset[Node]) -> list[Node]:
    """The operations on some way from ``root`` down to the targets' inputs, each after all that use it."""
    leading: dict[Node, None] = {}
    for node in in_order(root):
        if any(below in targets or below in leading for below, _ in node.next_functions):
            leading[node] = None
    return [*reversed(leading)]
