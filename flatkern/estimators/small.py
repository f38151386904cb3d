"""Inner products of long rows in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inner"]

_CHUNK = 1 << 16


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of rows [j, P] and [k, P] as [j, k], float64 whatever their dtype, converted in chunks."""
    if a.dtype == torch.float64:
        return a @ b.mT
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], _CHUNK):
        total.addmm_(a[:, start : start + _CHUNK].double(), b[:, start : start + _CHUNK].double().mT)
    return total
