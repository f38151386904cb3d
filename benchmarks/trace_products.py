"""How many products Hutchinson, Hutch++ and XTrace need for a true error, from one sketch of the matrix.

All three are unbiased and leave Hutchinson samples of (I − QQᵀ)A(I − QQᵀ), Q an orthonormal basis of A times some
sign vectors: none for Hutchinson, N of 3 N products for Hutch++, k − 1 for each of the k terms of XTrace (2 k
products). With s²(N) the variance of gᵀ(I − Q_N Q_Nᵀ)A(I − Q_N Q_Nᵀ)g over sign vectors g the root mean square errors
are

- Hutchinson with m products: s(0)/√m,
- Hutch++: s(N)/√N,
- XTrace: s(k − 1)/√k, its terms taken as uncorrelated (they are a little, which costs it up to a third more error).

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
        count = self.forms.shape[1]
        variances = self.forms.var(1)
        value, outside = _products(variances / tolerance**2, method)
        # the variances without one of the samples
        away = (self.forms - self.forms.mean(1, keepdim=True)).square() * (count / (count - 1))
        left = ((count - 1) * variances.unsqueeze(1) - away) / (count - 2)
        without = torch.tensor([_products(v / tolerance**2, method)[0] for v in left.unbind(1)])
        spread = float((without - without.mean()).square().sum() * (count - 1) / count) ** 0.5
        return Needed(value, spread, outside)


def _products(variances: Tensor, method: str) -> tuple[float, bool]:
    """From s²(N) over the square of the tolerance; and whether N is beyond them."""
    if method == "hutchinson":
        return max(2.0, float(variances[0])), False
    share, more = (3, 0) if method == "hutch++" else (2, 1)
    largest = len(variances) - 1
    # samples are N + more: the first N where they suffice, and between it and the last one where they do not
    excess = (variances[1:] / (torch.arange(1, largest + 1) + more)).log()
    enough = (excess <= 0).nonzero().flatten().tolist()
    if enough:
        at = enough[0]
        part = float(excess[at] / (excess[at - 1] - excess[at])) if at else 0.0
        return share * (at + 1 + part + more), False
    # s²(N) ∝ N^(−q), no faster than it falls over the second half of what was seen
    half = max(1, largest // 2)
    seen = (
        math.log(float(variances[half] / variances[largest])) / math.log(largest / half)
        if largest > half
        else 0.0
    )
    return share * largest * (float(variances[largest]) / largest) ** (1 / (1 + max(0.0, seen))), True


def sketch(
    times: Callable[[Tensor], Tensor],
    size: int,
    *,
    most: int,
    probes: int,
    tolerance: float,
    seconds: float = math.inf,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
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
        dtype: of A.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(count: int) -> Tensor:
        return torch.randint(0, 2, (size, count), generator=generator).to(dtype).mul_(2).sub_(1)

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
        variances = torch.stack(rows).var(1) / max(tolerance, torch.finfo(dtype).tiny) ** 2
        reached = not any(_products(variances, m)[1] for m in METHODS)
        if reached or time.process_time() - begun > seconds:
            break
    return Sketch(torch.stack(rows))


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a.mT, b.mT, strict=True)])
