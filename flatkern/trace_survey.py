"""The sizes of samples, and what they let one expect of the draws that a Hessian's trace takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatkern.trace_groups import group_columns, over_bound
from flatkern.trace_plan import Outlook, Scatter, Way

__all__ = ["Batch", "Expected", "expected", "largest_and_some", "outlooks"]

_POWER = 1.5
"""Means go with a sample's size, variances with its square; a pilot's probabilities are in between."""
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48)


@dataclass
class Batch:
    """What a plain forward pass tells of a batch."""

    step: int
    residuals: Tensor
    """‖∂ℓ_i/∂f_i‖, [n]."""
    squares: Tensor
    """‖s_ik‖², [n, K]."""
    weight: float
    """Its part of the denominator."""
    sizes: Tensor = field(init=False)
    """Shares of ‖∂ℓ_i/∂f_i‖ and of ‖S_i‖² in all data's, added, [n]."""
    order: Tensor = field(init=False)
    """The samples by falling size."""

    def measure(self, residuals: float, squares: float) -> None:
        """Sizes, from the sums over all data."""
        self.sizes = self.residuals / residuals + self.squares.sum(1) / squares
        self.order = self.sizes.argsort(descending=True, stable=True)

    def __len__(self) -> int:
        return len(self.residuals)

    def tells(self) -> bool:
        """Whether there is a residual and curvature to go by."""
        return bool(self.residuals.square().sum() > 0) and bool(self.squares.square().sum() > 0)

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """About so many samples, large ones with more probability, and their inverse probabilities."""
        sizes = self.sizes**_POWER
        ends = sizes[self.order].cumsum(0)
        marks = (torch.arange(count, dtype=ends.dtype, device=ends.device) + 0.5) * (ends[-1] / count)
        places, times = torch.searchsorted(ends, marks).clamp(max=len(self) - 1).unique(return_counts=True)
        chosen = self.order[places]
        return chosen, times.to(ends) * ends[-1] / count / sizes[chosen]


def largest_and_some(sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Half of ``count`` samples are the largest, the other half evenly spread over the others by rank.

    Where few samples have most of the weight they are among them.

    Args:
        sizes: [n], n > count.
        count: at least 2.

    Returns:
        Indices, and how many samples each stands for.
    """
    order = sizes.argsort(descending=True, stable=True)
    half = count // 2
    others = order[half:]
    places = torch.linspace(0, len(others) - 1, count - half, dtype=torch.float64).round().long()
    counts = torch.ones(count, dtype=torch.float64)
    counts[half:] = len(others) / len(places)
    return torch.cat([order[:half], others[places]]), counts


@dataclass
class Expected:
    """What a pilot tells of both parts; sums over a batch."""

    ggn: float
    """Σ_i over all samples,"""
    residual: float
    gain: float
    """mean of (‖J_iᵀS_i‖²/‖S_i‖²)², weighted with ‖S_i‖⁴,"""
    coherence: float
    """mean of the squared cosine of two columns' gradients,"""
    probe: float
    """variance of one probe over ‖r_i‖²,"""
    probe_squared: float
    """the square of that variance over ‖r_i‖⁴,"""
    single: float
    """the second moment over ‖r_i‖²."""


def expected(batch: Batch, chosen: Tensor, counts: Tensor, sketches: Tensor, residuals: Tensor) -> Expected:
    """From a few draws of the plain sketch and of the residual, [k, m], on the chosen samples.

    ``counts``: how many samples each stands for.
    """
    squares = batch.squares[chosen]
    sizes = squares.sum(1)
    gains = torch.where(sizes > 0, sketches.mean(0) / sizes, 0.0)
    pairs = group_columns(squares, 0, 1).pairs
    mean, variance = residuals.mean(0), residuals.var(0)
    energies = batch.residuals.square()
    energy, freedom = float(energies.sum()), len(residuals) - 1

    def over_all(values: Tensor) -> float:
        return float((counts * values).sum())

    coherent, largest = over_all(sketches.var(0)), 4 * over_all(gains.square() * pairs)
    return Expected(
        ggn=over_all(sketches.mean(0)),
        residual=over_all(mean),
        gain=over_all(sketches.mean(0).square()) / over_all(sizes.square()),
        coherence=min(1.0, coherent / largest) if largest > 0 else 1.0,
        probe=over_all(variance) / energy,
        # s⁴ is larger than σ⁴ by 1 + 2/freedom on average
        probe_squared=over_all(variance.square()) * freedom / (freedom + 2) / float(energies.square().sum()),
        single=over_all(variance + mean.square()) / energy,
    )


def outlooks(batch: Batch, spread: Expected) -> list[Outlook]:
    """Of the batch's chunks, in order: the variances of one sample are taken to go with the squares of its sizes."""
    squares, energies = batch.squares[batch.order], batch.residuals[batch.order].square()
    columns = squares.shape[1]
    ways = {Way(columns, 0, 0): torch.zeros_like(energies)}
    for count in _COUNTS:
        if count >= columns:
            break
        # drawn once: alone or not, what is known of the variance is its bound
        groups = group_columns(squares, 0, count)
        ways[Way(0, count, 1)] = spread.gain * (over_bound(groups.sizes) * groups.sums.square()).sum(1)
        pairs = {(0, count): groups.pairs, (count - 1, 1): group_columns(squares, count - 1, 1).pairs}
        for (alone, others), sizes in pairs.items():
            ways[Way(alone, others, 2)] = spread.gain * spread.coherence * 2 * sizes
    by_way = [_scatters(variances, batch.step) for variances in ways.values()]
    return [
        Outlook(
            size,
            dict(zip(ways, sketches, strict=True)),
            Scatter(spread.probe * energy.variance, spread.probe_squared * energy.squares),
            Scatter(spread.single * energy.variance, spread.single**2 * energy.squares),
        )
        for size, energy, *sketches in zip(
            (len(part) for part in energies.split(batch.step)),
            _scatters(energies, batch.step),
            *by_way,
            strict=True,
        )
    ]


def _scatters(variances: Tensor, step: int) -> list[Scatter]:
    """Of chunks of ``step`` samples."""
    moments = [[part.sum(), part.square().sum()] for part in variances.split(step)]
    return [Scatter(*row) for row in torch.tensor(moments, dtype=torch.float64).tolist()]
