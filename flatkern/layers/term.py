"""Per-sample gradients of one parameter for K cotangents, unformed: their norms and inner products.

A term stands for the gradients γ_ik ∈ R^shape of sample i and cotangent k. What every term can do is form them
for a few samples (:meth:`Term.explicit`); subclasses know cheaper forms of the norms and of the Gram matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from flatkern.layers.shared_weight import row_energy

__all__ = ["DenseTerm", "SumTerm", "Term", "chunks"]


def chunks(total: int, size: int) -> list[slice]:
    """Slices of at most ``size`` that cover ``range(total)``."""
    size = max(1, size)
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


class Term(ABC):
    """Gradients γ_ik of n samples and K cotangents with respect to one tensor of shape ``shape``."""

    k: int
    n: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """The gradients themselves, [K', n', *shape]."""

    @property
    def gradient_bytes(self) -> int:
        """Of one gradient in float64."""
        return 8 * max(1, self.shape.numel())

    def squared_norms(self, max_memory: int) -> Tensor:
        """Σ_k ‖γ_ik‖², float64 [n]; here by forming them in chunks that fit ``max_memory`` bytes."""
        total = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        at_once = max(1, max_memory // (2 * self.gradient_bytes))
        for part in chunks(self.n, at_once // self.k):
            for block in chunks(self.k, at_once // (part.stop - part.start)):
                total[part] += row_energy(_flat(self.explicit(part, block))).sum(0)
        return total

    def gram(self, other: Term, max_memory: int) -> Tensor:
        """⟨γ_ik, γ'_jl⟩ of two terms of the same parameter, float64 [n K, n' K'], k fastest.

        Here by forming the gradients in chunks; :class:`flatkern.layers.outer.OuterTerm` has cheaper ways.
        """
        out = torch.zeros(self.n * self.k, other.n * other.k, dtype=torch.float64, device=self.device)
        at_once = max(1, max_memory // (4 * self.gradient_bytes))
        for rows in chunks(self.n, at_once // self.k):
            left = self._rows(rows)
            for columns in chunks(other.n, at_once // other.k):
                right = other._rows(columns)
                out[
                    rows.start * self.k : rows.stop * self.k,
                    columns.start * other.k : columns.stop * other.k,
                ] = left @ right.mT
        return out

    def _rows(self, samples: slice) -> Tensor:
        formed = self.explicit(samples, slice(0, self.k))  # [K, n', *shape]
        return _flat(formed).transpose(0, 1).reshape(-1, self.shape.numel()).double()

    def flipped(self) -> Term | None:
        """The same with the two axes of a matrix exchanged, where the term knows how."""
        return None

    def joined(self, others: Sequence[Term]) -> Term | None:
        """The sum of this and other terms of the same tensor as one term with a cheap norm, where there is one."""
        return None

    def _like(self, other: Term) -> None:
        self.k, self.n, self.shape = other.k, other.n, other.shape
        self.dtype, self.device = other.dtype, other.device


def _flat(gradients: Tensor) -> Tensor:
    return gradients.reshape(*gradients.shape[:2], -1)  # a scalar parameter has no axis to flatten


class DenseTerm(Term):
    """Gradients that are there: biases, scales and other small or unshared parameters, [K, n, *shape]."""

    def __init__(self, gradients: Tensor, shape: torch.Size, energy: Tensor | None = None) -> None:
        self.gradients = gradients
        self.k, self.n = gradients.shape[:2]
        self.shape, self.dtype, self.device = shape, gradients.dtype, gradients.device
        self._energy = energy

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """See :class:`Term`."""
        part = self.gradients[cotangents, samples]
        return part.reshape(*part.shape[:2], *self.shape)

    def squared_norms(self, max_memory: int) -> Tensor:
        """See :class:`Term`."""
        energy = row_energy(_flat(self.gradients)) if self._energy is None else self._energy
        return energy.sum(0)

    def joined(self, others: Sequence[Term]) -> Term | None:
        """See :class:`Term`."""
        total = self.gradients
        for other in others:
            if not isinstance(other, DenseTerm):
                return None
            total = total + other.gradients.reshape(total.shape)
        return DenseTerm(total, self.shape)


class SumTerm(Term):
    """The sum of several terms of one tensor, by forming them."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self._like(self.terms[0])

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """See :class:`Term`."""
        total = self.terms[0].explicit(samples, cotangents)
        for term in self.terms[1:]:
            total = total + term.explicit(samples, cotangents)
        return total

    @property
    def gradient_bytes(self) -> int:
        """See :class:`Term`."""
        return 2 * super().gradient_bytes
