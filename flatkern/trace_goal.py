"""What a sampled trace is to reach, and how many probes that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from flatkern.estimators.common import check_count
from flatkern.freedom import LEAST, SummedVariance

__all__ = ["Goal", "Sampled", "Spread", "together"]

RESERVE = 1.5
"""Planned probes over those that the pilot's spread asks for, which is itself known to some 10 % only."""
RESERVE_ON_ALL = 1.2
"""The same where the pilot saw all samples."""


@dataclass(frozen=True)
class Goal:
    """What the user asked for."""

    rtol: float | None
    atol: float | None
    samples: int | None
    max_samples: int

    def __post_init__(self) -> None:
        check_count(self.max_samples, "max_samples", least=2)
        if self.samples is not None:
            check_count(self.samples, "samples", least=2)
        elif self.rtol is None and self.atol is None:
            object.__setattr__(self, "rtol", 0.01)

    @property
    def given(self) -> bool:
        """Whether there is a tolerance to meet."""
        return self.rtol is not None or self.atol is not None

    def tolerance(self, value: float) -> float:
        """The standard error aimed at, given the trace."""
        return max((self.rtol or 0.0) * abs(value), self.atol or 0.0)

    def probes(
        self, spread: Spread, exact: float, denominator: float, *, share: float = 1.0, taken: float = 0.0
    ) -> int:
        """Probes that meet the tolerance (of which ``share`` of the variance is ours) with an error that is known.

        At least 2, and as many as give it :data:`flatkern.freedom.LEAST` degrees of freedom.

        Args:
            spread: of the residual's numerator over all samples.
            exact: what is added to the residual.
            denominator: of the loss.
            share: of the tolerance's square that is left for the residual.
            taken: standard error that what is added has itself (a sketch's); at least a quarter of the square
                stays for the residual.
        """
        if not denominator > 0 or spread.variance == 0.0 or not math.isfinite(spread.variance):
            return 2
        least = 1 + math.ceil(LEAST / spread.effective)
        tolerance = self.tolerance(exact + spread.mean / denominator) * share**0.5
        tolerance = max(tolerance**2 - taken**2, tolerance**2 / 4) ** 0.5
        if tolerance == 0.0:
            return self.max_samples + 1
        variance = spread.variance / denominator**2
        return max(
            least, math.ceil((RESERVE_ON_ALL if spread.complete else RESERVE) * variance / tolerance**2)
        )


@dataclass(frozen=True)
class Spread:
    """Expected sums over samples: their means, the variance of one probe, their part of the denominator."""

    mean: float
    variance: float
    weight: float
    effective: float = 1.0
    """(Σ_i σ_i²)² / Σ_i σ_i⁴ of the samples seen: on so many of them the variance lies."""
    complete: bool = False
    """Whether the pilot saw all samples."""


@dataclass
class Sampled:
    """Σ over chunks: per sample the mean of its values and their variance; a row a layer, or one for all."""

    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    totals: Tensor | None = None
    probes: int = 0
    weight: float = 0.0

    def add(self, values: Tensor) -> None:
        """``values`` [k, rows, n]."""
        self.probes = len(values)
        self.means.append(values.mean(0))
        self.variances.append(values.var(0) if len(values) > 1 else torch.zeros_like(values[0]))
        total = values.sum((1, 2))
        self.totals = total if self.totals is None else self.totals + total

    @property
    def uninformative(self) -> bool:
        """Whether all draws coincide though they are too few for that to tell anything."""
        n = sum(t.shape[-1] for t in self.means)
        if self.dof * n >= LEAST or any(bool(t.any()) for t in self.variances):
            return False
        return any(bool(t.any()) for t in self.means)

    @property
    def dof(self) -> int:
        """Of each variance."""
        return max(1, self.probes - 1)

    def spread(self) -> Spread:
        """As a pilot's."""
        total = self.summed()
        effective = total.freedom / self.dof
        mean = sum(float(t.sum()) for t in self.means)
        return Spread(mean, total.value, self.weight, effective, complete=True)

    def summed(self) -> SummedVariance:
        """The variance of one value, all rows and samples together."""
        total = SummedVariance()
        for values in self.variances:
            total.add(values, self.dof)
        return total


def together(parts: list[Tensor]) -> Tensor:
    """Chunks [rows, n] side by side; those in which nothing was drawn have a single row of zeros."""
    rows = max(len(part) for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, rows - len(part))) for part in parts], 1)
