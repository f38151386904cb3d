"""Whether the samples lie where they seem to, tried with cotangents of one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from flatkern.graph import Graph, Layouts, first_with_samples
from flatkern.layers.rule import Layout

__all__ = ["check_layouts", "strays"]


def strays(
    output: Tensor, edges: Sequence[GradientEdge], others: Callable[[int, Tensor, int], Sequence[Tensor]]
) -> frozenset[int]:
    """Edges where the cotangent of one sample alone shows in entries of other samples.

    Args:
        output: of a run on few samples.
        edges: places in its graph.
        others: (number of the edge, cotangent there, sample) → the parts that should be zero.
    """
    marks: list[tuple[int, Tensor]] = []
    if output.grad_fn is None or not edges:
        return frozenset()
    weights = torch.arange(1, output[0].numel() + 1, dtype=torch.float32, device=output.device).cos()
    for sample in range(len(output)):
        root = torch.zeros_like(output)
        root[sample] = weights.reshape(root[sample].shape)  # uneven, so that nothing cancels
        found = torch.autograd.grad(output, edges, root, retain_graph=True, allow_unused=True)
        for index, g in enumerate(found):
            if g is not None:
                marks += [(index, part.abs().sum()) for part in others(index, g, sample)]
    if not marks:
        return frozenset()
    flags = (torch.stack([mark for _, mark in marks]) != 0).tolist()  # one synchronization for all edges
    return frozenset(index for (index, _), flag in zip(marks, flags, strict=True) if flag)


def check_layouts(
    output: Tensor,
    graph: Graph,
    layouts: Layouts | None,
    parameters: Mapping[str, Tensor],
    rows: Sequence[GradientEdge] = (),
) -> frozenset[int]:
    """Drop the layouts that cotangents of single samples contradict, at all operations that parameters reach first.

    A flattened axis of which no view tells the order has one candidate an order; an operation that keeps several, or
    none, is not certain, and its parameters take the fall-back.

    Args:
        output, graph: of a run on few samples.
        layouts: changed in place; ``None``: there are none.
        parameters: the selected ones, by name.
        rows: further places, tried in the same passes for samples on axis 0.

    Returns:
        Which of ``rows`` show another sample's cotangent.
    """
    places: list[int] = []
    candidates: list[tuple[int, Layout]] = []
    if layouts is not None:
        reached = [graph.index[node] for node in first_with_samples(graph, parameters, layouts)]
        places = [i for i in reached if layouts.by_index[i]]
        candidates = [(i, layout) for i in places for layout in layouts.by_index[i] or ()]
    edges = [GradientEdge(graph.nodes[i], 0) for i, _ in candidates]
    n = len(output)

    def others(index: int, g: Tensor, sample: int) -> list[Tensor]:
        if index >= len(edges):
            return [g[:sample], g[sample + 1 :]]
        by_sample = candidates[index][1].samples_first(g.unsqueeze(0), n)[0]
        return [by_sample[:sample], by_sample[sample + 1 :]]

    wrong = strays(output, [*edges, *rows], others)
    for i in places:
        assert layouts is not None
        layouts.by_index[i] = tuple(
            layout for index, (place, layout) in enumerate(candidates) if place == i and index not in wrong
        )
    return frozenset(index - len(edges) for index in wrong if index >= len(edges))
