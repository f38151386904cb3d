"""A subspace of the outputs, as orthonormal columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["orthonormal_columns"]


def orthonormal_columns(subspace: Tensor | Sequence[int], entries: int) -> Tensor:
    """Q [N, r] float64 with orthonormal columns spanning the given ones, or unit columns of the given entries.

    Args:
        subspace: a floating-point tensor [N, r] of rank r, or integers: indices of entries of the flattened output.
        entries: N.

    Raises:
        TypeError, ValueError: anything else; indices that repeat or are out of range; columns that are dependent.
    """
    tensor = subspace if isinstance(subspace, Tensor) else torch.as_tensor(list(subspace))
    if tensor.numel() == 0:
        raise ValueError("subspace: it is empty")
    if not tensor.is_floating_point():
        if tensor.dtype == torch.bool or tensor.is_complex() or tensor.ndim != 1:
            raise TypeError(
                "subspace: expected columns [N, r] of floating point, or a list of indices of outputs"
            )
        indices = tensor.long()
        if bool(((indices < -entries) | (indices >= entries)).any()):
            raise ValueError(f"subspace: an index lies outside the {entries} entries of a sample's output")
        indices = indices % entries
        if len(indices.unique()) != len(indices):
            raise ValueError("subspace: an index is there twice")
        columns = torch.zeros(entries, len(indices), dtype=torch.float64, device=tensor.device)
        columns[indices, torch.arange(len(indices), device=tensor.device)] = 1
        return columns
    if tensor.ndim != 2 or tensor.shape[0] != entries:
        raise ValueError(
            f"subspace: expected columns [N, r] with N = {entries} entries of a sample's output, got "
            f"{tuple(tensor.shape)}"
        )
    columns = tensor.detach().double()
    if not bool(torch.isfinite(columns).all()):
        raise ValueError("subspace: it holds NaN or Inf")
    values = torch.linalg.svdvals(columns)
    if len(values) < columns.shape[1] or float(values[-1]) <= 1e-10 * float(values[0]):
        raise ValueError("subspace: its columns are linearly dependent; give a basis")
    return torch.linalg.qr(columns).Q
