"""How many products Hutchinson, Hutch++ and XTrace need for a true error, from one sketch of the matrix.

All three are unbiased and leave a Hutchinson sample of (I − QQᵀ)A(I − QQᵀ), Q an orthonormal basis of A times some sign
vectors: none for Hutchinson, N of 3 N products for Hutch++, k − 1 for each of the k terms of XTrace (2 k products). With
s²(N) the variance of gᵀ(I − Q_N Q_Nᵀ)A(I − Q_N Q_Nᵀ)g over sign vectors g their root mean square errors are

- Hutchinson with m products: s(0)/√m,
- Hutch++: s(N)/√N,
- XTrace: s(k − 1)/√k, its terms taken as uncorrelated.

One basis of N vectors holds those of all smaller N, and the same K vectors g serve for all: 2 N + K products.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["METHODS", "Needed", "Sketch", "sketch"]

METHODS = ("hutchinson", "hutch++", "xtrace")
COLUMNS = 8
"""Vectors that go into one product."""


@dataclass(frozen=True)
class Needed:
    """Products to a root mean square error."""

    products: float
    stderr: float
    """Of ``products``, from the K vectors (jackknife)."""
    extrapolated: bool
    """Whether that takes a larger basis than the sketch has."""


@dataclass(frozen=True)
class Sketch:
    """What is left of quadratic forms when a basis is taken out."""

    forms: Tensor
    """gᵀ(I − Q_N Q_Nᵀ)A(I − Q_N Q_Nᵀ)g, float64 [N + 1, K]."""

    @property
    def size(self) -> int:
        """N, of the largest basis."""
        return len(self.forms) - 1

    def error(self, method: str, products: float) -> float:
        """Root mean square error after so many products (a basis as large as the sketch's at most)."""
        variances = self.forms.var(1)
        if method == "hutchinson":
            return float(variances[0] / products) ** 0.5
        share = 3 if method == "hutch++" else 2
        drawn = products / share
        basis = min(self.size, round(drawn) if method == "hutch++" else max(0, round(drawn) - 1))
        return float(variances[basis] / drawn) ** 0.5

    def needed(self, method: str, tolerance: float) -> Needed:
        """Products for an error of ``tolerance``; beyond the sketch by the power of N seen over its second half."""
        value, outside = _products(self.forms, method, tolerance)
        count = self.forms.shape[1]
        without = torch.tensor(
            [
                _products(self.forms[:, [j for j in range(count) if j != i]], method, tolerance)[0]
                for i in range(count)
            ]
        )
        spread = float((without - without.mean()).square().sum() * (count - 1) / count) ** 0.5
        return Needed(value, spread, outside)


def _products(forms: Tensor, method: str, tolerance: float) -> tuple[float, bool]:
    variances = forms.var(1) / tolerance**2
    if method == "hutchinson":
        return max(2.0, float(variances[0])), False
    share, fewer = (3, 0) if method == "hutch++" else (2, 1)
    largest = len(variances) - 1
    for basis in range(1, largest + 1):
        if float(variances[basis]) <= basis + fewer:
            return float(share * (basis + fewer)), False
    # s²(N) ∝ N^(−q), no faster than it falls over the second half of what was seen
    half = max(1, largest // 2)
    seen = math.log(float(variances[half] / variances[largest])) / math.log(largest / half)
    power = max(0.0, seen) if largest > half else 0.0
    return share * largest * (float(variances[largest]) / largest) ** (1 / (1 + power)), True


def sketch(
    times: Callable[[Tensor], Tensor],
    size: int,
    *,
    most: int,
    probes: int,
    tolerance: float,
    seconds: float = math.inf,
    seed: int = 0,
) -> Sketch:
    """Sketch a symmetric matrix until Hutch++ and XTrace reach a tolerance.

    Args:
        times: V [P, k] → A V.
        size: P.
        most: vectors of the basis, at most.
        probes: K.
        tolerance: the error aimed at; a larger basis than it asks for is not made.
        seconds: CPU time after which the basis grows no more.
        seed: of the sign vectors.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(count: int) -> Tensor:
        return torch.randint(0, 2, (size, count), generator=generator).float().mul_(2).sub_(1)

    begun = time.process_time()
    left = signs(probes)
    images = torch.cat([times(part) for part in left.split(COLUMNS, 1)], 1)
    rows = [_dots(left, images)]  # of forms
    basis, image = left.new_empty(size, 0), left.new_empty(size, 0)
    own = torch.zeros(0, 0, dtype=torch.float64)  # Qᵀ A Q
    while basis.shape[1] < min(most, size):
        fresh = times(signs(min(COLUMNS, min(most, size) - basis.shape[1])))
        for _ in range(2):
            fresh = fresh - basis @ (basis.mT @ fresh)
            fresh = torch.linalg.qr(fresh).Q
        made = times(fresh)
        before, basis, image = basis.shape[1], torch.cat([basis, fresh], 1), torch.cat([image, made], 1)
        grown = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)
        grown[:before, :before] = own
        grown[:, before:] = (basis.mT @ made).double()
        grown[before:, :before] = grown[:before, before:].mT
        own = grown
        inside, across = (basis.mT @ left).double(), (image.mT @ left).double()
        for j in range(before, basis.shape[1]):
            # (g − Σ_i≤j q_i c_i)ᵀ A (the same), by what column j adds to it
            c, row = inside[: j + 1], own[j, : j + 1]
            added = c[j] * (2 * (row[:j] @ c[:j]) + row[j] * c[j] - 2 * across[j])
            rows.append(rows[-1] + added)
        reached = not any(_products(torch.stack(rows), m, tolerance)[1] for m in METHODS)
        if reached or time.process_time() - begun > seconds:
            break
    return Sketch(torch.stack(rows))


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a.mT, b.mT, strict=True)])
