"""Functions of torch whose second derivatives are missing or wrong, and equal forms that have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatkern import kernels
from flatkern.attention_form import FunctionForms, attention_forms

__all__ = ["Substitutes"]


class Substitutes(FunctionForms):
    """While it is in force, calls of the functions below go to the forms that can be differentiated twice.

    Source of the gaps: seen on torch 2.13, see docs/autograd-gaps.md. ``torch._weight_norm`` raises nothing and gives
    a second derivative that is not even symmetric.
    """

    def __init__(self) -> None:
        super().__init__(_FORMS)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖, the norm taken over all axes but ``dim`` (-1: over all)."""
    axes = [] if dim == -1 else [axis for axis in range(v.ndim) if axis != dim]
    norm = torch.linalg.vector_norm(v, dim=axes or None, keepdim=dim != -1)
    return v * (g / norm)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of ``weight``; the one at ``padding_idx`` is constant in forward mode too, where torch's has a tangent."""
    if padding_idx is None or max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    rows = F.embedding(input, weight)
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), rows.detach(), rows)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows of ``weight``, summed or averaged over each bag; ``padding_idx`` counts nowhere."""
    if mode == "max" or max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    if offsets is None:  # bags are the rows of `input`
        bags, count = (
            torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1]),
            len(input),
        )
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        count = len(starts)
        bags = torch.searchsorted(starts, torch.arange(len(input), device=input.device), right=True) - 1
    kept = torch.ones_like(input, dtype=weight.dtype)
    if padding_idx is not None:
        kept = (input != padding_idx % len(weight)).to(weight.dtype)
    factors = kept if per_sample_weights is None else kept * per_sample_weights
    rows = F.embedding(input.reshape(-1), weight) * factors.reshape(-1, 1)
    total = rows.new_zeros(count, weight.shape[1]).index_add(0, bags, rows)
    if mode == "sum":
        return total
    sizes = kept.new_zeros(count).index_add(0, bags, kept.reshape(-1))
    return total / sizes.clamp_min(1).unsqueeze(1)


def _attention(*tensors: Tensor | None, **options: Any) -> Tensor:
    return kernels.attention(*tensors, **options)  # type: ignore[arg-type]


_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: _hardsigmoid,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    **attention_forms(_attention, cpu_only=True),
}
