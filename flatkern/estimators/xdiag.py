"""XDiag: every test vector gives an unbiased diagonal with the range that the others have found."""

from __future__ import annotations

import torch
from torch import Tensor

from flatkern.estimators.sampling_run import Run
from flatkern.estimators.sketch import Sketch
from flatkern.estimators.xtrace import downdates

__all__ = ["xdiag"]

_NUMBERS = 1 << 22


def xdiag(run: Run, sketch: Sketch) -> tuple[Tensor, Tensor] | None:
    """Diagonal and its squared standard errors, both [P] float64; m further products, A symmetric.

    With u_i = Q s_i, v_i = A u_i and the notation of XTrace, the diagonal of test vector i (random signs) is

        d_i = diag(Q_i Q_iᵀ A) + ω_i ∘ (I − Q_i Q_iᵀ) A ω_i = diag(Q QᵀA) − u_i ∘ v_i + (s_i·c_i) ω_i ∘ u_i.

    Leaving out j as well, the projector on the directions taken out has the inverse Gram matrix of s_i, s_j,
    and as in XTrace Cov(d_i, d_j) = E (d_i − d_ij)(d_j − d_ji), entry by entry. ``None``: interrupted.

    Source: Epperly, Tropp, Webber, SIAM J. Matrix Anal. Appl. 45 (2024), section 2.4, for d_i.
    """
    basis, coefficients = sketch.basis()
    m, size = basis.shape
    images = run.array("images", basis.shape, basis.dtype)
    for block in run.blocks("range", m):
        if not block.known:
            images[block.span] = (run.op @ basis[block.span].mT).mT
    if run.interrupted:
        return None
    finite = torch.isfinite(coefficients).all()
    s, left, _ = downdates(torch.nan_to_num(coefficients), torch.finfo(basis.dtype).eps)
    own, cosines = (s * coefficients).sum(0), s.mT @ s
    determinant = (1 - cosines.square()).clamp_min(1e-14)[..., None]
    values = torch.empty(size, dtype=torch.float64, device=basis.device)
    squares = torch.empty_like(values)
    chunk = max(1, _NUMBERS // (m * m))
    off = 1 - torch.eye(m, dtype=torch.float64, device=basis.device)[..., None]
    for start in range(0, size, chunk):
        part = slice(start, start + chunk)
        q, z = basis[:, part].double(), images[:, part].double()
        w = torch.cat([v[:, part].double() for v in sketch.vectors()])
        whole = ((left.mT @ q) * (left.mT @ z)).sum(0)
        u, v = s.mT @ q, s.mT @ z
        tested = own[:, None] * w  # the image of ω_i outside Q_i is own_i u_i
        single = whole - u * v + tested * u
        cos = cosines[..., None]
        taken = (u * v)[:, None] + (u * v)[None] - cos * (u[:, None] * v[None] + u[None] * v[:, None])
        pair = whole - taken / determinant + tested[:, None] * (u[:, None] - cos * u[None]) / determinant
        changes = (single[:, None] - pair) * off
        shared = (changes * changes.transpose(0, 1)).sum((0, 1)) / (m * (m - 1))
        values[part] = single.mean(0)
        squares[part] = single.var(0) / m + shared.clamp_min(0.0)
    return torch.where(finite, values, torch.nan), squares
