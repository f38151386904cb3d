"""Lanczos runs of several start vectors in lockstep: one block product a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.estimators.common import NotSymmetricError, require_finite
from flatkern.operators.base import LinearOperator

__all__ = ["Tridiagonals", "lockstep_lanczos"]


@dataclass(frozen=True)
class Tridiagonals:
    """The Jacobi matrices of k runs of m steps, on the host in float64."""

    diagonal: Tensor
    """[k, m]"""
    off_diagonal: Tensor
    """[k, m − 1]"""

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Gauss nodes and weights of each run, [k, m]; the weights of a run sum to 1."""
        matrices = torch.diag_embed(self.diagonal)
        if self.off_diagonal.shape[1]:
            matrices = matrices + torch.diag_embed(self.off_diagonal, offset=1)
            matrices = matrices + torch.diag_embed(self.off_diagonal, offset=-1)
        nodes, vectors = torch.linalg.eigh(matrices)
        return nodes, vectors[:, 0].square()


def lockstep_lanczos(
    op: LinearOperator, start: Tensor, steps: int, *, reorthogonalize: bool, bar: tqdm
) -> Tridiagonals:
    """Lanczos on each row of ``start`` [k, P], unit vectors, ``steps`` steps with one block product each.

    Memory: 3 k vectors, or (steps + 2) k with re-orthogonalization (two passes). A run whose Krylov space is
    exhausted goes on with zero vectors, which decouple from it: its quadrature is exact, its added weights
    are 0. Values are looked at on the host once, at the end.

    Raises:
        FloatingPointError: products gave NaN or Inf.
        NotSymmetricError: ⟨v_{j−1}, A v_j⟩ and ⟨v_j, A v_{j−1}⟩ disagree.
    """
    eps = torch.finfo(op.dtype).eps
    count = len(start)
    basis = (
        torch.empty(count, steps, start.shape[1], dtype=op.dtype, device=op.device)
        if reorthogonalize
        else None
    )
    # three blocks change places; fresh temporaries of this size would cost more than the arithmetic
    previous, current, residual = torch.zeros_like(start), start.clone(), torch.empty_like(start)
    beta = torch.zeros(count, dtype=op.dtype, device=op.device)
    scale, off = torch.zeros_like(beta), torch.zeros_like(beta)
    alphas, betas = [], []
    for j in range(steps):
        if basis is not None:
            basis[:, j] = current
        image = (op @ current.mT).mT
        alpha = _dots(current, image)
        # a residual of rounding size has no direction of its own, so a test on it would say nothing
        told = beta > eps**0.5 * scale
        off = torch.maximum(off, torch.where(told, (_dots(previous, image) - beta).abs(), 0.0))
        alphas.append(alpha)
        torch.addcmul(image, current, alpha[:, None], value=-1, out=residual)
        residual.addcmul_(previous, beta[:, None], value=-1)
        if basis is not None:
            for seen, vector in zip(basis[:, : j + 1], residual, strict=True):
                for _ in range(2):
                    vector.addmv_(seen.mT, torch.mv(seen, vector), alpha=-1)
        beta = torch.stack([torch.linalg.vector_norm(row) for row in residual])
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
        alive = beta > 10 * eps * scale
        beta = torch.where(alive, beta, 0.0)
        betas.append(beta)
        residual.mul_(torch.where(alive, 1 / beta, 0.0)[:, None])
        previous, current, residual = current, residual, previous
        bar.update(count)
    diagonal = torch.stack(alphas, dim=1).double().cpu()
    off_diagonal = torch.stack(betas, dim=1).double().cpu()
    require_finite(torch.cat([diagonal, off_diagonal], dim=1), "spectral_density")
    tolerance = 5e-2 if eps > 1e-10 else 1e-5
    if bool((off > tolerance * scale).any()):
        raise NotSymmetricError("op: it is not symmetric (products from the left and the right disagree)")
    return Tridiagonals(diagonal, off_diagonal[:, :-1])


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Row by row inner products [k], without a table of the entries' products."""
    return torch.stack([torch.dot(a, b) for a, b in zip(left, right, strict=True)])
