"""Norms of gradients that are sums over positions: ‖Σ_t g_t a_tᵀ‖_F², by the cheaper of two forms."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bias_squared_norms", "cheaper_form", "row_energy", "weight_squared_norms"]


def cheaper_form(positions: int, d_in: int, d_out: int, cotangents: int) -> str:
    """``"explicit"`` or ``"gram"``, by multiplications a sample.

    Explicit forms the K small gradients [d_out, d_in]: K·T·d_out·d_in. The Gram form uses
    Σ_k ‖Σ_t g_kt a_tᵀ‖² = ⟨A Aᵀ, Σ_k G_k G_kᵀ⟩ with T × T matrices: T²·(d_in + K·d_out).
    """
    explicit = cotangents * positions * d_out * d_in
    gram = positions**2 * (d_in + cotangents * d_out)
    return "explicit" if explicit <= gram else "gram"


def weight_squared_norms(
    inputs: Tensor, cotangents: Tensor, max_memory: int, form: str | None = None
) -> Tensor:
    """Σ_k ‖Σ_t g_kt a_tᵀ‖_F² for each sample.

    Args:
        inputs: a [n, T, d_in]; cotangents: g [K, n, T, d_out].
        max_memory: bytes for temporaries; samples (then cotangents) are taken in chunks to fit.
        form: ``"explicit"`` or ``"gram"`` to overrule :func:`cheaper_form`.

    Returns:
        float64 [n].
    """
    k, n, t, d_out = cotangents.shape
    d_in = inputs.shape[-1]
    result = torch.zeros(n, dtype=torch.float64, device=inputs.device)
    if t == 1:  # ‖g aᵀ‖² = ‖g‖² ‖a‖²
        return row_energy(cotangents).sum((0, 2)) * row_energy(inputs).sum(1)
    form = form or cheaper_form(t, d_in, d_out, k)
    size = inputs.element_size()
    per_cotangent = (d_out * d_in if form == "explicit" else t * d_out) * size
    fixed = 0 if form == "explicit" else 2 * t * t * size
    samples = max(1, max_memory // (fixed + k * per_cotangent))
    block = k if samples > 1 else max(1, min(k, (max_memory - fixed) // per_cotangent))
    # one small gradient may itself be large (a head of many classes): some of its rows at a time
    rows_at_once = d_out if block > 1 or form == "gram" else max(1, min(d_out, max_memory // (d_in * size)))
    for i in range(0, n, samples):
        a = inputs[i : i + samples]
        for j in range(0, k, block):
            g = cotangents[j : j + block, i : i + samples]
            if form == "explicit":
                for first in range(0, d_out, rows_at_once):
                    part = g[..., first : first + rows_at_once]
                    # cotangents folded into the rows: broadcasting a over them would copy it
                    rows = part.permute(1, 0, 3, 2).reshape(a.shape[0], -1, t)  # [n, k d_out, T]
                    result[i : i + samples] += row_energy((rows @ a).flatten(1))
            else:
                stacked = g.permute(1, 2, 0, 3).reshape(a.shape[0], t, -1)  # [n, T, K d_out]
                product = (a @ a.mT) * (stacked @ stacked.mT)
                result[i : i + samples] += product.sum((1, 2), dtype=torch.float64)
    return result


def bias_squared_norms(cotangents: Tensor) -> Tensor:
    """Σ_k ‖Σ_t g_kt‖² for each sample: cotangents [K, n, T, d_out] → float64 [n]."""
    total = cotangents.sum(2) if cotangents.shape[2] > 1 else cotangents[:, :, 0]
    return row_energy(total).sum(0)


def row_energy(rows: Tensor) -> Tensor:
    """‖row‖² over the last axis as float64, in one read and without a temporary of the rows' size."""
    wide = torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else None  # half would overflow
    return torch.linalg.vector_norm(rows, dim=-1, dtype=wide).double().square()
