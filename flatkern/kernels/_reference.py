"""What the pure-PyTorch references share: factorizations in float64 with the rules of the compiled kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import few_dims
from ._registration import concrete, register
from ._select import runs_compiled


def symmetric(T: Tensor) -> Tensor:
    """(T + Tᵀ) / 2."""
    return (T + T.mT) / 2


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


def logdet_of(L: Tensor, good: Tensor, finite: Tensor) -> Tensor:
    """log det L Lᵀ: -inf where the matrix is not numerically positive definite, NaN where it is not finite."""
    value = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.where(good, value, torch.where(finite, -torch.inf, torch.nan))


def rows_factor(x: Tensor, wanted: Tensor) -> Tensor:
    """L of x = L Q with a diagonal ≥ 0, [..., c, c] in float64, for the samples in ``wanted``; anything for the others.

    Only those are factored, except where finding out which they are would wait for a GPU (or for a tracer) and there is
    no kernel that branches by itself.
    """
    if runs_compiled(x, cuda=False, limit=math.inf):
        few = few_dims(x)
        factor: Tensor = torch.ops.flatkern.lq_factor(few, wanted.reshape(few.shape[:-2]).contiguous())
        return factor.reshape(*x.shape[:-1], x.shape[-2])
    if concrete(x):
        out = x.new_zeros((*x.shape[:-1], x.shape[-2]), dtype=torch.float64)
        if bool(wanted.any()):
            out[wanted] = _qr(x[wanted])
        return out
    return _qr(torch.where(wanted[..., None, None], x, 0.0))


def _qr(x: Tensor) -> Tensor:
    c, d = x.shape[-2:]
    wide = x.double() if d >= c else torch.nn.functional.pad(x.double(), (0, c - d))
    R = torch.linalg.qr(wide.mT, mode="r").R
    negative = R.diagonal(dim1=-2, dim2=-1) < 0
    return torch.where(negative[..., None, :], -R.mT, R.mT)


def on_finite(weight: Tensor, logdet: Tensor) -> Tensor:
    """The weight of a log-determinant's derivative: as given where the log-determinant is finite.

    Elsewhere there is no derivative: NaN, except where the weight is zero (the caller masked the sample) and
    the contribution is zero whatever the derivative.
    """
    nothing = torch.where(weight == 0, 0.0, torch.nan).to(weight.dtype)
    return torch.where(logdet.isfinite(), weight, nothing)


def _fake_factor(x: Tensor, _wanted: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=torch.float64)


register("lq_factor", _fake_factor)
