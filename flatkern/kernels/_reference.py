"""What the pure-PyTorch references share: Cholesky in float64 with the rules of the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky(G: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factor in float64 and which samples are numerically positive definite.

    A pivot at or below `tolerance` times its diagonal entry, or below the normal range of G's dtype, is no
    good, nor is a matrix with NaN or infinities in its lower triangle; the factor is then the identity.
    """
    lower = G.double().tril()
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(G.shape[-1], dtype=torch.float64, device=G.device)
    finite = lower.isfinite().all(-1).all(-1)
    L, info = torch.linalg.cholesky_ex(torch.where(finite[..., None, None], lower, identity))
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    enough = (pivots > tolerance * diagonal) & (pivots >= torch.finfo(G.dtype).tiny)
    good = finite & (info == 0) & enough.all(-1)
    return torch.where(good[..., None, None], L, identity), good


def logdet(G: Tensor, tolerance: float) -> Tensor:
    """log det G in float64: -inf where G is not numerically positive definite, NaN where it is not finite."""
    L, good = cholesky(G, tolerance)
    value = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    finite = G.tril().isfinite().all(-1).all(-1)
    return torch.where(good, value, torch.where(finite, -torch.inf, torch.nan))


def on_finite(weight: Tensor, logdet: Tensor) -> Tensor:
    """The weight of a log-determinant's derivative: as given where the log-determinant is finite.

    Elsewhere there is no derivative: NaN, except where the weight is zero (the caller masked the sample) and
    the contribution is zero whatever the derivative.
    """
    nothing = torch.where(weight == 0, 0.0, torch.nan).to(weight.dtype)
    return torch.where(logdet.isfinite(), weight, nothing)
