"""Orthonormal rows by classical Gram-Schmidt, twice, without looking at a value on the host."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthonormalize", "project_out"]

_COLUMNS = (
    1 << 15
)  # columns a sweep on the CPU, so that a piece of the basis is still in cache when used again


def project_out(basis: Tensor, vector: Tensor, out: Tensor) -> Tensor:
    """out [P] = (I − BᵀB)² v for orthonormal rows B [n, P]; returns the coefficients [n] taken out.

    Twice is enough (Parlett, "The symmetric eigenvalue problem", 6.9). The subtraction of the first pass and
    the products of the second go over B together: three readings of B for four matrix-vector products.
    ``out`` may be ``vector`` itself.
    """
    first = torch.mv(basis, vector)
    size = len(vector)
    step = _COLUMNS if basis.device.type == "cpu" else size
    second = torch.zeros_like(first)
    for start in range(0, size, step):
        piece, target = basis[:, start : start + step], out[start : start + step]
        torch.addmv(vector[start : start + step], piece.mT, first, alpha=-1, out=target)
        second.addmv_(piece, target)
    out.addmv_(basis.mT, second, alpha=-1)
    return first.add_(second)


def orthonormalize(
    basis: Tensor, vectors: Tensor, out: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Write orthonormal rows Q [b, P], orthogonal to orthonormal rows B [n, P], with V = CᵀB + RᵀQ.

    A row of V [b, P] of which nothing is left, ≤ 10 eps · (its coefficients and ``scale``, 0-d), has no
    direction: its row of Q is zero, and R's diagonal 0 there.

    Returns:
        C [n, b] and R [b, b], upper triangular with a diagonal ≥ 0.
    """
    if len(vectors) == 1:
        coefficients = project_out(basis, vectors[0], out[0])[:, None]
        return coefficients, _normalize_rows(out, _threshold(coefficients, scale, eps))
    coefficients = basis @ vectors.mT
    threshold = _threshold(coefficients, scale, eps)
    torch.addmm(vectors, coefficients.mT, basis, alpha=-1, out=out)
    triangle = _normalize_rows(out, threshold)
    # what the rows of a block take from each other can leave them oblique to the basis: both once more
    correction = basis @ out.mT
    out.addmm_(correction.mT, basis, alpha=-1)
    again = _normalize_rows(out, torch.full_like(threshold, 0.1))
    return coefficients + correction @ triangle, again @ triangle


def _threshold(coefficients: Tensor, scale: Tensor, eps: float) -> Tensor:
    if coefficients.numel():
        scale = torch.maximum(scale, coefficients.abs().amax())
    return 10 * eps * scale


def _normalize_rows(rows: Tensor, threshold: Tensor) -> Tensor:
    """Orthonormal rows in place, those of a norm up to ``threshold`` zero; returns R [b, b]."""
    triangle = rows.new_zeros(len(rows), len(rows))
    for i, row in enumerate(rows):
        if i:
            triangle[:i, i] = project_out(rows[:i], row, row)
        norm = torch.linalg.vector_norm(row)
        alive = norm > threshold
        triangle[i, i] = torch.where(alive, norm, 0.0)
        row.mul_(torch.where(alive, 1 / norm, 0.0))
    return triangle
