"""Orthonormal rows by classical Gram-Schmidt, twice, without looking at a value on the host."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthonormalize"]


def orthonormalize(
    basis: Tensor, vectors: Tensor, out: Tensor, *, coupled: int = 0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write orthonormal rows Q [b, P], orthogonal to orthonormal rows B [n, P], with V = CᵀB + RᵀQ.

    Two passes: twice is enough (Parlett, "The symmetric eigenvalue problem", 6.9). The first one is against the
    rows of B from ``coupled`` on, and the second against all. In a Lanczos step only the last rows have
    anything in common with the images but rounding errors, which the second pass takes out.

    With ``scale`` (0-d) a row of V of which no more than 10 eps · (that, or its largest coefficient) is left has
    no direction: its row of Q is zero, and R's diagonal 0 there. Without it only a zero row is.

    Returns:
        C [n, b] and R [b, b], upper triangular with a diagonal ≥ 0.
    """
    recent = basis[coupled:]
    first = _products(recent, vectors)
    threshold = vectors.new_zeros(())
    if scale is not None:
        threshold = 10 * torch.finfo(vectors.dtype).eps * torch.maximum(scale, first.abs().amax())
    _subtract(recent, first, vectors, out)
    triangle = None
    if len(vectors) > 1:
        # what the rows of a block take from each other can leave them oblique to the basis, and the second
        # pass must see that
        triangle = _normalize_rows(out, threshold)
        threshold = torch.full_like(threshold, 0.1)
    coefficients = _products(basis, out)
    _subtract(basis, coefficients, out, out)
    final = _normalize_rows(out, threshold)
    if triangle is not None:
        coefficients, final = coefficients @ triangle, final @ triangle
    coefficients[coupled:] += first
    return coefficients, final


def _products(basis: Tensor, vectors: Tensor) -> Tensor:
    """B Vᵀ [n, b]."""
    return torch.mv(basis, vectors[0])[:, None] if len(vectors) == 1 else basis @ vectors.mT


def _subtract(basis: Tensor, coefficients: Tensor, vectors: Tensor, out: Tensor) -> None:
    """out = V − CᵀB; ``out`` may be ``vectors`` itself."""
    if len(vectors) == 1:
        torch.addmv(vectors[0], basis.mT, coefficients[:, 0], alpha=-1, out=out[0])
    else:
        torch.addmm(vectors, coefficients.mT, basis, alpha=-1, out=out)


def _normalize_rows(rows: Tensor, threshold: Tensor) -> Tensor:
    """Orthonormal rows in place, those of a norm up to ``threshold`` zero; returns R [b, b]."""
    triangle = rows.new_zeros(len(rows), len(rows))
    for i, row in enumerate(rows):
        for _ in range(2 if i else 0):
            shares = torch.mv(rows[:i], row)
            row.addmv_(rows[:i].mT, shares, alpha=-1)
            triangle[:i, i] += shares
        norm = torch.linalg.vector_norm(row)
        alive = norm > threshold
        triangle[i, i] = torch.where(alive, norm, 0.0)
        row.mul_(torch.where(alive, 1 / norm, 0.0))
    return triangle
