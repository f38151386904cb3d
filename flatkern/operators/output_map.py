"""A batch's output with its graph as a linear map: J v and Jᵀ u at fixed θ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatkern.problem import pairs_aligned

__all__ = ["OutputMap"]


class OutputMap:
    """J = ∂output/∂leaves, known by its products.

    Jᵀ w is linear in w, so the gradient of ⟨Jᵀ w, v⟩ in w is J v: two backward passes, through the part of
    the graph that leads to w only. w = 0 stands in for all w.
    """

    def __init__(self, leaves: Sequence[Tensor], output: Tensor) -> None:
        self.leaves, self.output = leaves, output
        self._dummy = torch.zeros_like(output, requires_grad=True)
        self._pulled: dict[int, Tensor] = {}  # leaves the output depends on, with a graph that leads to w
        if output.requires_grad:
            pulled = torch.autograd.grad(
                output, leaves, grad_outputs=self._dummy, create_graph=True, allow_unused=True
            )
            self._pulled = {i: g for i, g in enumerate(pulled) if g is not None and g.requires_grad}

    @property
    def roots(self) -> list[Tensor]:
        """The tensors whose graphs are kept."""
        return [self.output, *self._pulled.values()]

    def push(self, tangents: Sequence[Tensor | None], *, batched: bool = False) -> Tensor | None:
        """J v [*output] for one tangent a leaf (``None`` for zeros); ``None`` where it is zero.

        ``batched``: tangents [k, *leaf] → [k, *output] in one pass.
        """
        used = [i for i in self._pulled if tangents[i] is not None]
        if not used:
            return None
        (change,) = torch.autograd.grad(
            [self._pulled[i] for i in used],
            self._dummy,
            grad_outputs=[pairs_aligned(t) for i in used if (t := tangents[i]) is not None],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return change

    def pull(
        self, cotangent: Tensor, wanted: Sequence[int] | None = None, *, batched: bool = False
    ) -> Sequence[Tensor | None]:
        """Jᵀ u of the wanted leaves (default all), ``None`` for zeros; ``batched``: [k, *output] → [k, *leaf]."""
        leaves = self.leaves if wanted is None else [self.leaves[i] for i in wanted]
        if not self.output.requires_grad:
            return [None] * len(leaves)
        return torch.autograd.grad(
            self.output,
            leaves,
            grad_outputs=cotangent,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
