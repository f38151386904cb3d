"""Ghost norms in plain PyTorch: by tiles, and their first derivatives out of differentiable operations."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 256
"""Rows and columns of a tile."""


def flat(a: Tensor, g: Tensor, position_dims: int) -> tuple[Tensor, Tensor]:
    """[*samples, T, d_in] and [K, *samples, T, d_out]; patches of a convolution are copied."""
    samples = g.dim() - 2 - position_dims
    middle = a.shape[samples : samples + position_dims].numel()
    width = a.shape[samples + position_dims :].numel()
    return a.reshape(*a.shape[:samples], middle, width), g.reshape(
        *g.shape[: samples + 1], middle, g.shape[-1]
    )


def reference(a: Tensor, g: Tensor, position_dims: int, formed: bool) -> Tensor:
    """[K, *samples] in float64, tile by tile."""
    a, g = flat(a, g, position_dims)
    total = torch.zeros(g.shape[:-2], dtype=torch.float64, device=g.device)
    if formed:
        for left in g.split(SIDE, -1):
            for right in a.split(SIDE, -1):
                total = total + (left.mT @ right).square().sum((-2, -1), dtype=torch.float64)
        return total
    inputs, cotangents = a.split(SIDE, -2), g.split(SIDE, -2)
    for t in range(len(inputs)):
        for s in range(t, len(inputs)):
            tile = (inputs[t] @ inputs[s].mT) * (cotangents[t] @ cotangents[s].mT)
            total = total + (1 if t == s else 2) * tile.sum((-2, -1), dtype=torch.float64)
    return total


def reference_pullback(
    a: Tensor, g: Tensor, weight: Tensor, position_dims: int, formed: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Σ_k w_k times the gradient in a, and w_k times that in g_k: 2 g γ and 2 a γᵀ with γ = gᵀ a."""
    rows, columns = flat(a, g, position_dims)
    scaled = 2 * weight[..., None, None].to(g.dtype) * columns
    if formed:
        gradient = columns.mT @ rows
        to_a = (scaled @ gradient).sum(0) if wanted[0] else None
        to_g = 2 * weight[..., None, None].to(g.dtype) * (rows @ gradient.mT) if wanted[1] else None
    else:
        to_a = (scaled @ columns.mT).sum(0) @ rows if wanted[0] else None
        to_g = (rows @ rows.mT) @ scaled if wanted[1] else None
    return (
        None if to_a is None else to_a.reshape(a.shape),
        None if to_g is None else to_g.reshape(g.shape),
    )


def reference_tangent(
    position_dims: int, formed: bool, a: Tensor, g: Tensor, da: Tensor | None, dg: Tensor | None
) -> Tensor:
    """2 ⟨γ, γ̇⟩, γ̇ = ġᵀ a + gᵀ ȧ."""
    da = torch.zeros_like(a) if da is None else da
    dg = torch.zeros_like(g) if dg is None else dg
    rows, columns = flat(a, g, position_dims)
    d_rows, d_columns = flat(da, dg, position_dims)
    if formed:
        change = (columns.mT @ rows) * (d_columns.mT @ rows + columns.mT @ d_rows)
    else:
        change = (d_rows @ rows.mT) * (columns @ columns.mT) + (rows @ rows.mT) * (d_columns @ columns.mT)
    return 2 * change.sum((-2, -1), dtype=torch.float64)
