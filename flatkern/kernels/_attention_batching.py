"""Batching rules of the attention functions, under torch.func.vmap and under the older vmap of autograd.grad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention_layout import Form

MASK = 3
"""The mask's place among the tensors of every function."""


def batched(
    apply: Callable[..., Any], size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None],
    form: Form, rest: Sequence[Any], masks: Sequence[int], *, mask_gradient: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """The call on tensors [size · B, ...]: the new axis is one more batch axis.

    ``masks``: where masks and their tangents are. A mask is repeated only where that cannot be avoided.
    """
    apart = mask_gradient or any(tensors[i] is not None and in_dims[i] is not None for i in masks)
    apart = apart or any(tensors[i] is not None for i in masks[1:])

    def flat(t: Tensor | None, dim: int | None, index: int) -> Tensor | None:
        if t is None or (index in masks and not apart):
            return t
        t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.reshape(-1, *t.shape[2:])

    folded = [flat(t, d, i) for i, (t, d) in enumerate(zip(tensors, in_dims, strict=False))]
    mask = tensors[MASK]
    if mask is not None:
        count = mask.shape[0] if in_dims[MASK] is None else mask.movedim(in_dims[MASK] or 0, 0).shape[1]
        step = count if apart else 0
        form = replace(form, mask_rows=tuple(r + i * step for i in range(size) for r in form.mask_rows))
    result = apply(*folded, form, *rest)
    if isinstance(result, Tensor):
        return _unflatten(result, size), 0
    outputs = tuple(None if t is None else _unflatten(t, size) for t in result)
    return outputs, tuple(None if t is None else 0 for t in outputs)


def _unflatten(t: Tensor, size: int) -> Tensor:
    return t.reshape(size, t.shape[0] // size, *t.shape[1:])


def call(function: Any, inputs: Sequence[Any]) -> Any:
    """``function.apply``, also for what ``autograd.grad(is_grads_batched=True)`` hands to a backward pass.

    That is torch's older vmap, which knows nothing of a function's ``vmap``: its rule is called from here.
    """
    legacy = [isinstance(t, Tensor) and torch._C._functorch.is_legacy_batchedtensor(t) for t in inputs]
    if not any(legacy):
        return function.apply(*inputs)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    plain = [
        torch._remove_batch_dim(t, level, 1, 0) if flag else t for t, flag in zip(inputs, legacy, strict=True)
    ]
    if any(isinstance(t, Tensor) and torch._C._functorch.is_legacy_batchedtensor(t) for t in plain):
        raise NotImplementedError("attention: is_grads_batched inside is_grads_batched")
    size = next(len(t) for t, flag in zip(plain, legacy, strict=True) if flag)
    outputs, _ = function.vmap(_Info(size), [0 if flag else None for flag in legacy], *plain)
    if isinstance(outputs, Tensor):
        return torch._add_batch_dim(outputs, 0, level)
    return tuple(None if t is None else torch._add_batch_dim(t, 0, level) for t in outputs)


class _Info(NamedTuple):
    """What a batching rule is told."""

    batch_size: int
