"""Independent quadratic forms, on the whole space or on the complement of a basis; the exact trace."""

from __future__ import annotations

import torch
from torch import Tensor

from flatkern.estimators.probes import Probes
from flatkern.estimators.sampling_run import Run

__all__ = ["exact_trace", "quadratic_forms"]


def quadratic_forms(
    run: Run, probes: Probes, count: int, *, stage: str = "forms", basis: Tensor | None = None
) -> Tensor:
    """vᵀ A v of ``count`` independent sign vectors, [count] float64; fewer where the run was interrupted.

    The mean of one is Tr A, its variance 2 Σ_{i≠j} ((A_ij + A_ji)/2)² (Hutchinson, Communications in
    Statistics 18, 1989). With ``basis``, orthonormal rows Q [r, P], v is replaced by (I − QQᵀ)v, and the mean
    is Tr (I − QQᵀ)A(I − QQᵀ): the second half of Hutch++.
    """
    values = run.array(stage, (count,), torch.float64)
    done = 0
    for block in run.blocks(stage, count):
        first = probes.drawn
        rows = probes.signs(len(block))
        done = block.stop
        if block.known:
            continue
        if basis is None:
            values[block.span] = probes.sign_dots((run.op @ rows.mT).mT, first)
            continue
        rows = outside(rows, basis)
        image = (run.op @ rows.mT).mT
        values[block.span] = (rows.double() * image.double()).sum(1)
    return values[:done]


def outside(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows without their part in the span of orthonormal rows; done twice, for rounding."""
    rows = rows - (rows @ basis.mT) @ basis
    return rows - (rows @ basis.mT) @ basis


def exact_trace(run: Run) -> Tensor:
    """Σ_i e_iᵀ A e_i, 0-d float64, by P products with unit vectors."""
    total = run.array("exact", (), torch.float64)
    size = run.op.shape[1]
    for block in run.blocks("exact", size):
        if not block.known:
            total += unit_images(run, block.start, block.stop).sum()
    return total


def unit_images(run: Run, start: int, stop: int) -> Tensor:
    """Diagonal entries ``start`` to ``stop`` by products with unit vectors, float64."""
    size = run.op.shape[1]
    units = torch.zeros(stop - start, size, dtype=run.op.dtype, device=run.op.device)
    units[:, start:stop].fill_diagonal_(1.0)
    image = (run.op @ units.mT).mT
    return image[:, start:stop].diagonal().double()
