"""Per-sample squared norms of parameter gradients for K cotangents a sample, from one linearization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from flatkern.layers.rule import Cotangent
from flatkern.linearize import Linearization, pull_back
from flatkern.per_sample import per_sample_squared_norms
from flatkern.reverse import TOGETHER_BYTES, reverse_pass, reverse_pays
from flatkern.scattered import Scattered

__all__ = ["SquaredNorms", "layer_of", "parameter_squared_norms", "with_rows"]


@dataclass(frozen=True)
class SquaredNorms:
    """Σ_k ‖∂(s_k·f_i)/∂p‖² by parameter, float64 [n] each, and the rows asked for beside them."""

    by_parameter: dict[str, Tensor]
    rows: tuple[Tensor | None, ...]
    """For every extra edge: the cotangents as rows [n, K, features]; ``None`` where the output ignores it."""
    notes: tuple[str, ...]

    @property
    def total(self) -> Tensor:
        """The sum over parameters, [n]."""
        return torch.stack(list(self.by_parameter.values())).sum(0)


def with_rows(rows: Tensor | None, cotangent: Tensor, block: slice, total: int) -> Tensor:
    """Cotangents [k, n, ...] put into the rows [n, K, features] of each sample; a view where they are all there is."""
    flat = cotangent.reshape(*cotangent.shape[:2], -1).transpose(0, 1)
    if flat.shape[1] == total:
        return flat
    if rows is None:
        rows = flat.new_empty(flat.shape[0], total, flat.shape[2])
    rows[:, block] = flat
    return rows


def layer_of(parameter: str) -> str:
    """The module a parameter belongs to: ``"net.0.weight"`` → ``"net.0"`` (the model's own: ``""``)."""
    return parameter.rpartition(".")[0]


def parameter_squared_norms(
    model: nn.Module,
    lin: Linearization,
    roots: Tensor,
    parameters: Mapping[str, Tensor],
    extra: Sequence[GradientEdge] = (),
    watched: Sequence[GradientEdge] = (),
    observe: Callable[[Sequence[Tensor | Scattered | None]], None] | None = None,
) -> SquaredNorms:
    """Pull ``roots`` [K, n, *output] back once and collect ghost norms, rows and the exact fall-back.

    Every parameter of ``parameters`` is in the result: by rules, by the fall-back, or as zeros because the output
    does not depend on it. Cotangents [k, n, ...] at the ``watched`` places are handed to ``observe`` block by block and
    not kept.
    """
    n, device = lin.n, lin.output.device
    norms = {name: torch.zeros(n, dtype=torch.float64, device=device) for name in parameters}
    sites = lin.uses.sites
    edges = [GradientEdge(node, 0) for node in sites]
    rows: list[Tensor | None] = [None] * len(extra)
    if lin.output.grad_fn is not None and (edges or extra or watched):
        for block, found in _pulled(lin, roots, [*edges, *extra, *watched]):
            cotangents = {
                node: Cotangent(g, site)
                for (node, site), g in zip(sites.items(), found, strict=False)
                if g is not None
            }
            with torch.no_grad():
                for name in lin.uses.by_parameter:
                    for term in lin.uses.terms(name, parameters[name], cotangents):
                        norms[name] += term.squared_norms(lin.scratch)
            rest = found[len(edges) :]
            if observe is not None:
                observe(rest[len(extra) :])
            for index, cotangent in enumerate(rest[: len(extra)]):
                if isinstance(cotangent, Scattered):
                    cotangent = cotangent.dense.transpose(0, 1)
                if cotangent is not None:
                    rows[index] = with_rows(rows[index], cotangent, block, len(roots))
            del found, rest, cotangents
    notes = []
    if lin.uses.derived:
        notes.append(
            f"per-sample gradients formed (of weights computed from others) for {', '.join(sorted(lin.uses.derived))}"
        )
    if lin.uses.uncovered:
        left = {name: parameters[name] for name in lin.uses.uncovered}
        squares, how = per_sample_squared_norms(model, lin.x, roots, left, lin.max_memory, lin.forward)
        norms.update(squares)
        notes.append(f"per-sample gradients formed ({how}) for {', '.join(left)}")
    return SquaredNorms(norms, tuple(rows), tuple(notes))


def _pulled(
    lin: Linearization, roots: Tensor, edges: Sequence[GradientEdge]
) -> Iterator[tuple[slice, tuple[Tensor | Scattered | None, ...]]]:
    """As :func:`flatkern.linearize.pull_back`; a convolution's cotangents may stay scattered."""
    reverse = None
    if reverse_pays(lin.output, min(len(roots), lin.together or len(roots))):
        reverse = reverse_pass(lin.output, edges)
    if reverse is None:
        yield from pull_back(lin, roots, edges)
        return
    block = lin.together or TOGETHER_BYTES // max(1, lin.widest * roots.element_size())
    for part, found in reverse(roots, max(1, min(len(roots), block))):
        pulled = (found.get(edge.node) for edge in edges)
        yield part, tuple(g.transpose(0, 1) if isinstance(g, Tensor) else g for g in pulled)
