"""Inner products of parameter gradients for pairs of samples and cotangents: the Gram matrix of NTK and GGN.

K_{(i,k),(j,l)} = ⟨∂(s_ik·f_i)/∂θ, ∂(s_jl·f_j)/∂θ⟩, summed over parameters. For a dense layer on vectors that is
(A Aᵀ + 1) ∘ (G Gᵀ), for weights shared over positions Σ_{t,s} (g_t·g_s)(a_t·a_s + 1): the same terms as for the
squared norms, so that every rule serves here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from flatkern.layers.rule import Cotangent
from flatkern.layers.term import DenseTerm, Term
from flatkern.linearize import Linearization, pull_back
from flatkern.per_sample import per_sample_gradients
from flatkern.samples import take

__all__ = ["Gradients", "gradient_gram", "incompatible", "parameter_gradients"]


@dataclass(frozen=True)
class Gradients:
    """The gradients of n samples and K cotangents by parameter, unformed."""

    n: int
    k: int
    terms: dict[str, list[Term]]
    """Orthogonal terms of each parameter; none where the output does not depend on it."""
    notes: tuple[str, ...]


def parameter_gradients(
    model: nn.Module,
    lin: Linearization,
    roots: Tensor,
    parameters: Mapping[str, Tensor],
    formed: Sequence[str] = (),
) -> Gradients:
    """Pull ``roots`` [K, n, *output] back, and keep the cotangents at every place a parameter enters.

    They take K numbers for every entry of the layers' outputs; the caller chunks samples to fit. Parameters without a
    rule have their gradients formed, K·n·|p| numbers.

    Args:
        model, lin, roots, parameters: as for :func:`flatkern.squared_norms.parameter_squared_norms`.
        formed: parameters whose terms must live in the parameter's own space, see :func:`incompatible`.
    """
    uses = lin.uses.forming(frozenset(formed) & frozenset(lin.uses.by_parameter))
    sites = uses.sites
    blocks: list[list[Tensor | None]] = [[] for _ in sites]
    if sites:
        for _, found in pull_back(lin, roots, [GradientEdge(node, 0) for node in sites]):
            for place, g in enumerate(found):
                blocks[place].append(g)
    terms: dict[str, list[Term]] = {}
    with torch.no_grad():
        cotangents = {
            node: Cotangent(torch.cat([g for g in found if g is not None]), site)
            for (node, site), found in zip(sites.items(), blocks, strict=True)
        }
        for name in uses.by_parameter:
            terms[name] = uses.terms(name, parameters[name], cotangents)
    notes: tuple[str, ...] = ()
    if uses.uncovered:
        left = {name: parameters[name] for name in uses.uncovered}
        size = roots.element_size() * len(roots) * lin.n * sum(p.numel() for p in left.values())
        if size <= lin.max_memory:
            gradients, how = per_sample_gradients(model, lin.x, roots, left, lin.forward)
            for name, value in gradients.items():
                terms[name] = [DenseTerm(value, parameters[name].shape)]
        else:
            how = "again whenever they are needed"
            for name, p in left.items():
                terms[name] = [_FormedTerm(model, lin, roots, name, p)]
        notes = (f"per-sample gradients formed ({how}) for {', '.join(left)}",)
    return Gradients(lin.n, len(roots), terms, notes)


class _FormedTerm(Term):
    """Gradients without a rule that do not fit into memory together: a few samples' at a time."""

    def __init__(
        self, model: nn.Module, lin: Linearization, roots: Tensor, name: str, parameter: Tensor
    ) -> None:
        self._model, self._lin, self._roots, self._name, self._parameter = model, lin, roots, name, parameter
        self.k, self.n = roots.shape[:2]
        self.shape, self.dtype, self.device = parameter.shape, parameter.dtype, parameter.device

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """See :class:`flatkern.layers.term.Term`."""
        with torch.enable_grad():
            formed, _ = per_sample_gradients(
                self._model,
                take(self._lin.x, samples),
                self._roots[cotangents, samples],
                {self._name: self._parameter},
                self._lin.forward,
            )
        value = formed[self._name]
        return value.reshape(*value.shape[:2], *self.shape)


def incompatible(first: Linearization, second: Linearization) -> list[str]:
    """Parameters that two runs use in different ways, so that inner products need their own space."""
    both = first.uses.by_parameter.keys() & second.uses.by_parameter.keys()
    return [name for name in both if first.uses.signature(name) != second.uses.signature(name)]


def gradient_gram(first: Gradients, second: Gradients, max_memory: int) -> dict[str, Tensor]:
    """⟨γ_ik, γ'_jl⟩ by parameter, float64 [n K, n' K'] each with k fastest; products are accumulated in float64.

    Args:
        first, second: from :func:`parameter_gradients` of one model at one θ (the same object twice is fine).
        max_memory: bytes for temporaries beside the results.
    """
    with torch.no_grad():
        return {
            name: torch.stack(
                [a.gram(b, max_memory) for a, b in zip(terms, second.terms[name], strict=True)]
            ).sum(0)
            for name, terms in first.terms.items()
            if name in second.terms
        }
