"""What a sampled trace is to reach, and how many probes that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatkern.estimators.common import check_count

__all__ = ["Goal", "Sampled", "Spread"]

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
        """Probes that meet the tolerance (of which ``share`` of the variance is ours), at least 2.

        Args:
            spread: of the residual's numerator over all samples.
            exact: what is added to the residual.
            denominator: of the loss.
            share: of the tolerance's square that is left for the residual.
            taken: standard error that what is added has itself (a sketch's); at least a quarter of the square
                stays for the residual.
        """
        if not denominator > 0 or spread.variance == 0.0:
            return 2
        tolerance = self.tolerance(exact + spread.mean / denominator) * share**0.5
        tolerance = max(tolerance**2 - taken**2, tolerance**2 / 4) ** 0.5
        if tolerance == 0.0:
            return self.max_samples + 1
        variance = spread.variance / denominator**2
        return max(2, math.ceil((RESERVE_ON_ALL if spread.complete else RESERVE) * variance / tolerance**2))


@dataclass(frozen=True)
class Spread:
    """A pilot's sums over samples: their means, the variance of one probe, their part of the denominator."""

    mean: float
    variance: float
    weight: float
    complete: bool = False
    """Whether the pilot saw all samples."""

    def scaled(self, factor: float) -> Spread:
        """The sums of so many times as many samples of the same kind."""
        return Spread(self.mean * factor, self.variance * factor, self.weight * factor, self.complete)


@dataclass
class Sampled:
    """Σ over chunks: per sample the mean of its values and their variance; a row a layer, or one for all."""

    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    totals: Tensor | None = None
    weight: float = 0.0

    def add(self, values: Tensor) -> None:
        """``values`` [k, rows, n]."""
        self.means.append(values.mean(0))
        self.variances.append(values.var(0) if len(values) > 1 else torch.zeros_like(values[0]))
        total = values.sum((1, 2))
        self.totals = total if self.totals is None else self.totals + total

    def spread(self) -> Spread:
        """As a pilot's."""
        mean, variance = (sum(float(t.sum()) for t in part) for part in (self.means, self.variances))
        return Spread(mean, variance, self.weight, complete=True)
