"""Independent unbiased values of a trace: one a probe vector."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.estimators.common import rademacher, rows_per_block
from flatkern.operators.base import LinearOperator

__all__ = ["HutchPlusPlus", "Hutchinson", "TraceSampler", "exact_trace"]


class TraceSampler(Protocol):
    """A known part of a trace and independent values whose mean is the rest; one product a value."""

    offset: Tensor
    setup_matvecs: int

    def draw(self, count: int, generator: torch.Generator, bar: tqdm) -> Tensor:
        """``count`` values, [count], float64."""
        ...


class Hutchinson:
    """vᵀ A v with independent signs v: mean Tr A, variance 2 Σ_{i≠j} ((A_ij + A_ji)/2)².

    Source: Hutchinson, Communications in Statistics 18 (1989).
    """

    setup_matvecs = 0

    def __init__(self, op: LinearOperator) -> None:
        self._op = op
        self.offset = torch.zeros((), dtype=torch.float64, device=op.device)

    def draw(self, count: int, generator: torch.Generator, bar: tqdm) -> Tensor:
        """``count`` values, [count], float64."""
        return _forms(self._op, count, generator, bar, None)


class HutchPlusPlus:
    """Exact on the range of a sketch, Hutchinson on its complement.

    Tr A = Tr QᵀAQ + E zᵀ(I − QQᵀ) A (I − QQᵀ)z, with Q an orthonormal basis of A S, S of ``rank`` random sign
    vectors: 2 · rank products once. The values are independent given Q, so their spread is the whole error.

    Source: Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation", SOSA 2021.
    """

    def __init__(self, op: LinearOperator, rank: int, generator: torch.Generator, bar: tqdm) -> None:
        self._op = op
        self.setup_matvecs = 2 * rank
        sketch = (op @ rademacher(rank, op, generator).mT).contiguous()
        bar.update(rank)
        self._basis = torch.linalg.qr(sketch).Q.mT.contiguous()  # rows [rank, P]
        image = op @ self._basis.mT
        bar.update(rank)
        self.offset = (self._basis * image.mT).sum(dtype=torch.float64)

    def draw(self, count: int, generator: torch.Generator, bar: tqdm) -> Tensor:
        """``count`` values, [count], float64."""
        return _forms(self._op, count, generator, bar, self._basis)


def _forms(
    op: LinearOperator, count: int, generator: torch.Generator, bar: tqdm, basis: Tensor | None
) -> Tensor:
    # nothing here looks at a value: the host waits once, when the result is read
    parts, block = [], rows_per_block(op)
    for start in range(0, count, block):
        rows = rademacher(min(block, count - start), op, generator)
        if basis is not None:
            rows -= (rows @ basis.mT) @ basis
        parts.append((rows * (op @ rows.mT).mT).sum(1, dtype=torch.float64))
        bar.update(len(rows))
    return torch.cat(parts)


def exact_trace(op: LinearOperator, bar: tqdm) -> Tensor:
    """Σ_i e_iᵀ A e_i, 0-d float64, by P products with unit vectors."""
    total = torch.zeros((), dtype=torch.float64, device=op.device)
    size, block = op.shape[1], rows_per_block(op)
    for start in range(0, size, block):
        stop = min(start + block, size)
        units = torch.zeros(stop - start, size, dtype=op.dtype, device=op.device)
        units[:, start:stop].fill_diagonal_(1.0)
        image = (op @ units.mT).mT
        total = total + image[:, start:stop].diagonal().sum(dtype=torch.float64)
        bar.update(stop - start)
    return total
