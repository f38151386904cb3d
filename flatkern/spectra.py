"""Singular values of many small Jacobians through their Gram matrices, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern import kernels
from flatkern.results import PerSample

__all__ = ["Spectrum", "full_log_volume", "rank_tolerance", "squared_singular_values"]

_MANY = 64
"""Beyond this many singular values the product is what costs, and for σ_max alone the rows' own precision will do."""

_GRAM_FLOOR = 1e-10
"""Below this ratio of eigenvalues a float64 Gram matrix has lost more than six digits of a smallest singular value."""


def rank_tolerance(outputs: int, dtype: torch.dtype) -> float:
    """σ_min/σ_max at and below which a Jacobian computed in ``dtype`` counts as rank deficient: 8 √N eps.

    Rounding in the backward pass leaves singular values of about eps·σ_max where exact ones would be 0 (a softmax
    output, say); their logarithms would mean nothing.
    """
    return 8 * outputs**0.5 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Spectrum:
    """Singular values of n Jacobians [N, M]."""

    singular_values: Tensor
    """float64 [n, r], descending; r = min(N, M), or 1 where only the largest was asked for."""
    energy: Tensor
    """Σ σ², float64 [n]."""
    quartic: Tensor
    """Σ σ⁴, float64 [n]."""
    outputs: int
    inputs: int
    tolerance: float

    @staticmethod
    def concatenate(parts: Sequence[Spectrum], rank: int | None = None) -> Spectrum:
        """The spectra of consecutive chunks as one; ``rank`` singular values a sample are kept (default: all)."""
        first = parts[0]
        rank = min(p.singular_values.shape[1] for p in parts) if rank is None else rank
        return Spectrum(
            torch.cat([p.singular_values for p in parts])[:, :rank],
            torch.cat([p.energy for p in parts]),
            torch.cat([p.quartic for p in parts]),
            first.outputs,
            first.inputs,
            first.tolerance,
        )

    @property
    def top(self) -> Tensor:
        """σ_max, [n]."""
        return self.singular_values[:, 0]

    def log_volume(self, rank: int | None) -> PerSample:
        """Σ_{j ≤ rank} log σ_j, [n]; with ``None`` all N, which is ½ log det J Jᵀ.

        −inf (and marked) for a sample whose ``rank``-th singular value is numerically zero, and for all where N > M
        and all N are asked for.

        Raises:
            ValueError: ``rank`` not in 1 … min(N, M).
        """
        n, available = self.singular_values.shape
        if rank is not None and (
            isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= available
        ):
            raise ValueError(f"rank: must be an integer from 1 to min(N, M) = {available}, got {rank!r}")
        if rank is None and self.outputs > self.inputs:
            everything = torch.ones(n, dtype=torch.bool, device=self.energy.device)
            return PerSample(torch.full_like(self.energy, -float("inf")), everything)
        kept = self.singular_values[:, : rank or available]
        deficient = kept[:, -1] <= self.tolerance * self.top
        values = kept.clamp_min(torch.finfo(torch.float64).tiny).log().sum(1)
        return PerSample(torch.where(deficient, -float("inf"), values), deficient)

    def rank(self) -> Tensor:
        """How many singular values exceed the tolerance, [n]."""
        return ((self.singular_values > self.tolerance * self.top[:, None]) & (self.top[:, None] > 0)).sum(1)

    def pseudo_log_volume(self, threshold: float | None = None) -> PerSample:
        """Σ log σ_j over σ_j > ``threshold`` · σ_max (default :func:`rank_tolerance`), [n].

        −inf (and marked) for a Jacobian that is zero. The kept singular values are counted in ``notes``.

        Raises:
            ValueError: ``threshold`` not in [0, 1).
        """
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"threshold: expected a number from 0 to below 1, got {threshold!r}")
        limit = self.tolerance if threshold is None else threshold
        kept = self.singular_values > limit * self.top[:, None]
        zero = ~kept.any(1)
        logs = self.singular_values.clamp_min(torch.finfo(torch.float64).tiny).log()
        counts = kept.sum(1)
        note = (
            f"singular values above {limit:.3g} of the largest: {int(counts.min())} to {int(counts.max())} "
            f"of {self.outputs}"
        )
        values = torch.where(kept, logs, 0.0).sum(1)
        return PerSample(torch.where(zero, -float("inf"), values), zero, notes=(note,))

    def condition_numbers(self) -> tuple[Tensor, Tensor]:
        """σ_max/σ_min [n], inf for those of deficient rank, and which these are."""
        least = self.singular_values[:, -1]
        deficient = least <= self.tolerance * self.top
        return torch.where(deficient, float("inf"), self.top / torch.where(deficient, 1.0, least)), deficient

    def participation_ratio(self) -> PerSample:
        """(Σ σ²)²/Σ σ⁴, [n], in [1, N]; 0 (and marked) for a Jacobian that is zero."""
        zero = self.quartic <= 0
        return PerSample(
            torch.where(zero, 0.0, self.energy.square() / torch.where(zero, 1.0, self.quartic)), zero
        )


def full_log_volume(rows: Tensor) -> PerSample:
    """½ log det J Jᵀ for Jacobians given as rows [n, N, M], N ≤ M, without their singular values where possible.

    The determinant and trace of the Gram matrix bound its smallest eigenvalue below, λ_min ≥ det/(tr/(N − 1))^(N−1)
    (arithmetic and geometric mean of the others). Samples that this proves regular, with digits to spare, are done; the
    others are decomposed.
    """
    outputs = rows.shape[1]
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    stats = kernels.gram_stats(rows)
    others = outputs - 1
    log_smallest = stats.logdet - (others * (stats.trace / others).log() if others else 0.0)
    floor = max(rank_tolerance(outputs, rows.dtype) ** 2, _GRAM_FLOOR)
    proven = log_smallest > stats.trace.log() + math.log(floor)
    values, degenerate = stats.logdet / 2, torch.zeros_like(proven)
    if not bool(proven.all()):
        doubtful = squared_singular_values(rows[~proven]).log_volume(None)
        values[~proven] = doubtful.values
        if doubtful.degenerate is not None:
            degenerate[~proven] = doubtful.degenerate
    return PerSample(values, degenerate)


def squared_singular_values(rows: Tensor, *, only_top: bool = False) -> Spectrum:
    """The spectrum of Jacobians given as rows [n, N, M].

    By eigenvalues of the smaller Gram matrix with float64 accumulation; samples whose smallest eigenvalue has lost its
    digits in it are decomposed directly (:func:`flatkern.kernels.gram_singular_values`), except where ``only_top`` is
    wanted, σ_max alone.
    """
    _n, outputs, inputs = rows.shape
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    tolerance = rank_tolerance(outputs, rows.dtype)
    if only_top and min(outputs, inputs) > _MANY:
        side = rows if outputs <= inputs else rows.mT
        gram = (side @ side.mT).double()
        values = torch.linalg.eigvalsh(gram)[:, -1:].clamp_min(0).sqrt()
        energy, quartic = gram.diagonal(dim1=-2, dim2=-1).sum(-1), gram.square().sum((-2, -1))
        return Spectrum(values, energy, quartic, outputs, inputs, tolerance)
    values = kernels.gram_singular_values(rows, precise=not only_top)
    squares = values.square()
    kept = values[:, :1] if only_top else values
    return Spectrum(kept, squares.sum(1), squares.square().sum(1), outputs, inputs, tolerance)
