"""Degrees of freedom of a variance that is a sum of variances, each estimated from few values (Satterthwaite, 1946).

With independent estimates v_i of m_i degrees of freedom, V = Σ v_i has Var V = 2 Σ σ_i⁴/m_i for normal values, σ_i² the
mean of v_i: as much as one estimate of ν = (Σ σ_i²)² / Σ (σ_i⁴/m_i) degrees of freedom. With A = Σ v_i²/(m_i + 2),
E A = Σ σ_i⁴/m_i and E (V² − 2 A) = (Σ σ_i²)², since E v_i² = σ_i⁴ (1 + 2/m_i): ν is taken as V²/A − 2, which is m for a
single estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LEAST", "SummedVariance"]

LEAST = 10
"""Degrees of freedom below which a standard error is too uncertain to be planned for."""


@dataclass
class SummedVariance:
    """A sum of independently estimated variances."""

    value: float = 0.0
    """V."""
    doubt: float = 0.0
    """A."""

    @staticmethod
    def of_means(draws: Tensor) -> SummedVariance:
        """Of Σ_i mean_k, from each sample's own draws [k, n]: Σ_i s_i²/k; NaN of a single draw."""
        count, total = len(draws), SummedVariance()
        if count < 2:
            return SummedVariance(float("nan"))
        total.add(draws.var(0) / count, count - 1)
        return total

    def add(self, variances: Tensor | float, dof: float | None, times: Tensor | float = 1.0) -> None:
        """Variances of ``dof`` degrees of freedom each (``None``: known), each for ``times`` of its kind."""
        found = torch.as_tensor(variances, dtype=torch.float64)
        self.value += float((found * times).sum())
        if dof is not None:
            self.doubt += float((found.square() * times).sum()) / (dof + 2)

    def __add__(self, other: SummedVariance) -> SummedVariance:
        return SummedVariance(self.value + other.value, self.doubt + other.doubt)

    def scaled(self, factor: float) -> SummedVariance:
        """Of values ``factor`` times as large."""
        return SummedVariance(self.value * factor**2, self.doubt * factor**4)

    @property
    def stderr(self) -> float:
        """√V."""
        return self.value**0.5

    @property
    def freedom(self) -> float:
        """ν, at least 1; infinite where there is nothing to be uncertain about."""
        return max(1.0, self.value**2 / self.doubt - 2) if self.doubt > 0 else float("inf")

    @property
    def dof(self) -> int | None:
        """ν as :class:`flatkern.Estimate` states it; ``None`` where the error is 0 or not known."""
        freedom = self.freedom
        return int(freedom + 1e-9) if freedom < float("inf") else None
