"""Tangent and second-order term of attention along many directions at one point, by blocks of queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _attention_blocks as by_blocks
from ._attention_layout import Form, Saved, as_matrices, batch_shape, mask_rows, one_batch, shared_heads


def _wide(t: Tensor) -> Tensor:
    """Half precision as float32, which attention is computed in."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


class LinearizedAttention:
    """O = softmax(scale q kᵀ + mask) v at given arguments, those of :func:`flatkern.kernels.attention`.

    Ȯ along (q̇, k̇, v̇, ṁask) takes 5 products of T² d multiply-adds a head, with ⟨g, D²O[ẋ, ẋ]⟩ for every query 8. What
    is kept beside the arguments are the row statistics, [B, Lq, 2]. Half precision is computed in float32. Nothing is
    differentiable.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self._heads, self._dtype = query if enable_gqa else None, query.dtype
        query, key, value = _wide(query), _wide(key), _wide(value)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        key, value = self._shared(key), self._shared(value)
        self._batch = batch_shape(query, key, value, attn_mask)
        rows = () if attn_mask is None else mask_rows(attn_mask, self._batch)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        self._form = Form(scale, is_causal, rows)
        q, k, v = (one_batch(t, self._batch) for t in (query, key, value))
        mask = None if attn_mask is None else as_matrices(attn_mask)
        with torch.no_grad():
            out, stats = by_blocks.forward(q, k, v, mask, self._form)
        self._saved = Saved(q, k, v, mask, stats, out)

    def tangent(
        self, query: Tensor | None, key: Tensor | None, value: Tensor | None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Ȯ [..., Lq, e]; each tangent in its argument's shape, ``None`` for 0."""
        with torch.no_grad():
            image = by_blocks.tangent(self._saved, *self._flat(query, key, value, attn_mask), self._form)
        return image.reshape(*self._batch, *image.shape[1:]).to(self._dtype)

    def jet(
        self,
        cotangent: Tensor,
        query: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ȯ [..., Lq, e], and ⟨g, D²O[ẋ, ẋ]⟩ [..., Lq] for a cotangent g in the shape of O."""
        g = one_batch(_wide(cotangent), self._batch)
        with torch.no_grad():
            image, bent = by_blocks.jet(self._saved, g, *self._flat(query, key, value, attn_mask), self._form)
        shape = *self._batch, image.shape[1]
        return image.reshape(*shape, image.shape[2]).to(self._dtype), bent.reshape(shape)

    def _flat(
        self, query: Tensor | None, key: Tensor | None, value: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        def flat(t: Tensor | None) -> Tensor | None:
            return None if t is None else one_batch(_wide(t), self._batch)

        key, value = (None if t is None else self._shared(t) for t in (key, value))
        return (
            flat(query),
            flat(key),
            flat(value),
            None if attn_mask is None else as_matrices(_wide(attn_mask)),
        )

    def _shared(self, t: Tensor) -> Tensor:
        return t if self._heads is None else shared_heads(t, self._heads)
