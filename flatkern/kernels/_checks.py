"""Arguments every operator takes: what is refused, and how it is said. Works for tensors and for arrays."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BATCH_DIMS = 8


def check_matrices(name: str, x: Tensor, *, square: bool) -> None:
    """Raises TypeError for anything but a float32 or float64 tensor, ValueError for a wrong shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    check_dtype(name, x.dtype)
    if x.layout != torch.strided:
        raise TypeError(f"{name}: layout {x.layout} is not supported; use a dense tensor")
    if x.dim() < 2:
        raise ValueError(f"{name}: expected at least two dimensions, got shape {tuple(x.shape)}")
    if square and x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name}: expected square matrices [..., c, c], got shape {tuple(x.shape)}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError for anything but float32 and float64."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: dtype {dtype} is not supported; use torch.float32 or torch.float64")


def few_dims(x: Tensor) -> Tensor:
    """The tensor as the compiled kernels take it: flattened where it has more than eight batch dimensions."""
    if x.dim() - 2 <= MAX_BATCH_DIMS:
        return x
    return x.reshape(-1, *x.shape[-2:])
