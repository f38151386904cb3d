"""Known eigenpairs set apart, so that an estimate need not see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.estimators.common import require_finite
from flatkern.estimators.eigenpairs import Eigenpairs
from flatkern.operators.base import LinearOperator

__all__ = ["Deflation"]

_RESIDUAL = 1e-3
"""Largest residual, relative to the largest |eigenvalue| given: an eigenvalue is off by at most this much."""


@dataclass(frozen=True)
class Deflation:
    """j eigenvalues, [j] float64 on the host, and an orthonormal basis of their eigenvectors' span, rows [j, P]."""

    values: Tensor
    rows: Tensor

    @staticmethod
    def of(pairs: Eigenpairs | tuple[Tensor, Tensor], op: LinearOperator) -> Deflation | None:
        """The converged pairs of an :class:`Eigenpairs`, or values [j] and vectors [P, j]; j products.

        ``None`` where no pair has converged.

        Raises:
            TypeError, ValueError: naming ``deflate``: wrong shapes or dtype, not orthonormal, not eigenpairs.
        """
        if isinstance(pairs, Eigenpairs):
            values, vectors = (
                pairs.values[pairs.converged],
                pairs.vectors[:, pairs.converged.to(pairs.vectors.device)],
            )
            if len(values) == 0:
                return None
        elif isinstance(pairs, tuple) and len(pairs) == 2 and all(isinstance(t, Tensor) for t in pairs):
            values, vectors = pairs
        else:
            raise TypeError(
                f"deflate: expected Eigenpairs or a tuple (values [j], vectors [P, j]), got {type(pairs).__name__}"
            )
        size = op.shape[0]
        if values.ndim != 1 or vectors.shape != (size, len(values)) or not 0 < len(values) < size:
            raise ValueError(
                f"deflate: expected values [j] and vectors [{size}, j] with 0 < j < {size}, got "
                f"{list(values.shape)} and {list(vectors.shape)}"
            )
        if vectors.dtype != op.dtype or vectors.device != op.device:
            raise TypeError(
                f"deflate: vectors are {vectors.dtype} on {vectors.device}, the operator {op.dtype} on {op.device}"
            )
        values = values.detach().double().cpu()
        vectors = vectors.detach()
        images = op @ vectors
        residuals = torch.linalg.vector_norm(images - vectors * values.to(vectors), dim=0)
        gram = vectors.mT @ vectors
        overlap = (gram - torch.eye(len(values), dtype=gram.dtype, device=gram.device)).abs().max()
        measured = require_finite(torch.cat([residuals, overlap[None]]).double().cpu(), "spectral_density")
        scale = float(values.abs().max())
        if float(measured[-1]) > _RESIDUAL:
            raise ValueError("deflate: the vectors are not orthonormal")
        worst = int(measured[:-1].argmax())
        if float(measured[worst]) > _RESIDUAL * scale:
            raise ValueError(
                f"deflate: pair {worst} (eigenvalue {float(values[worst]):.6g}) has residual ‖A u − λ u‖ = "
                f"{float(measured[worst]):.2g}, too large at a scale of {scale:.2g}; give converged eigenpairs of "
                "this operator at its present weights"
            )
        return Deflation(values, torch.linalg.qr(vectors).Q.mT.contiguous())

    def __len__(self) -> int:
        """j."""
        return len(self.values)

    def directions(self, rows: Tensor) -> Tensor:
        """Rows [k, P] projected onto the complement, of unit norm; uniform there for Gaussian rows."""
        for _ in range(2):
            rows = rows.addmm_(rows @ self.rows.mT, self.rows, alpha=-1)
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)

    def add_to(self, nodes: Tensor, weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The complement's quadratures [k, m] with the known eigenvalues, of weight 1/P each, among the nodes."""
        known = len(self)
        share = torch.full((len(nodes), known), 1.0 / size, dtype=weights.dtype)
        nodes, order = torch.cat([nodes, self.values.expand(len(nodes), known)], dim=1).sort(dim=1)
        weights = torch.cat([weights * ((size - known) / size), share], dim=1)
        return nodes, weights.gather(1, order)
