"""Inner products of long rows in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CHUNK", "inner"]

CHUNK = 1 << 16
"""Entries of a row that are converted to float64 at once."""


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of rows [j, P] and [k, P] as [j, k], float64 whatever their dtype, converted in chunks."""
    if a.dtype == torch.float64:
        return a @ b.mT
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], CHUNK):
        total.addmm_(a[:, start : start + CHUNK].double(), b[:, start : start + CHUNK].double().mT)
    return total
