"""Scaled dot-product attention by blocks of queries, twice differentiable, without its T × T weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._attention_autograd import attention as blocked
from ._attention_layout import Form, as_matrices, batch_shape, mask_rows, one_batch, shared_heads

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale query keyᵀ + mask) value: ``F.scaled_dot_product_attention`` that can be differentiated twice.

    It is computed by blocks of queries, and so are its derivatives: the weights P [Lq, Lk] are recomputed from the
    row statistics where they are needed and never stored. ``grad`` and ``jvp``, the derivatives of either in
    reverse mode, forward over reverse and ``vmap`` work, with a mask that is differentiated as well. Causal blocks
    leave out the keys they do not see.

    Args:
        query: [..., Lq, d], float64, float32, bfloat16 or float16; the last two are computed in float32.
        key: [..., Lk, d].
        value: [..., Lk, e]. Batch dimensions broadcast.
        attn_mask: broadcastable to [..., Lq, Lk]. Boolean: True takes part. Floating point: added to the scores.
        is_causal: query i sees keys 0 … i; not together with ``attn_mask``.
        scale: default 1/√d.
        enable_gqa: fewer heads (axis -3) in key and value, each serving as many of the query's.

    Returns:
        [..., Lq, e] in the query's dtype. A query with no key at all gives zero, as torch's decomposed form does.

    Cost, in products of T² d multiply-adds a head (half where causal): value 2, gradient 5, tangent 5, and 12 for
    the double backward that a Hessian-vector product needs. Memory: a few copies of the inputs, and up to four blocks
    of 1 to 4 MiB (64 MiB on a GPU). CUDA tensors in float32 (bfloat16, float16) with heads up to 128 take kernels that
    form some products again and store no blocks; docs/kernels.md.

    Raises:
        TypeError: another dtype, or dtypes that differ.
        ValueError: shapes that do not fit; a mask together with ``is_causal``.
        NotImplementedError: (when differentiating) third derivatives, and forward mode over forward mode.

    Source: row statistics: Dao et al., "FlashAttention" (2022), section 3.1; second derivatives: docs/kernels.md.

    Example:
        >>> import torch
        >>> from flatkern.kernels import attention
        >>> q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> attention(q, q, torch.tensor([[1.0], [3.0]]), is_causal=True)
        tensor([[1.0000],
                [2.3395]])
    """
    _check(query, key, value, attn_mask, is_causal)
    query, key, value = autocast(query, key, value)
    kind, dtype = query.device.type, query.dtype
    if dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    if enable_gqa:
        key, value = shared_heads(key, query), shared_heads(value, query)
    with torch.autocast(kind, enabled=False):
        return _canonical(query, key, value, attn_mask, is_causal, scale).to(dtype)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast makes of torch's own arguments, where it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _canonical(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """With one batch dimension."""
    batch = batch_shape(query, key, value, mask)
    if not (math.prod(batch) and query.numel() and key.numel() and value.numel()):
        # nothing to sum: zeros, or scores that are all equal
        return torch.softmax(query @ key.mT + (0.0 if mask is None else _as_scores(mask, query)), -1) @ value
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    flat = [one_batch(t, batch) for t in (query, key, value)]
    rows = () if mask is None else mask_rows(mask, batch)
    mask = None if mask is None else as_matrices(mask)
    out = blocked(flat[0], flat[1], flat[2], mask, Form(scale, causal, rows))
    return out.reshape(*batch, *out.shape[1:])


def _as_scores(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -torch.inf)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"attention: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in _DTYPES or t.layout != torch.strided:
            raise TypeError(
                f"attention: {name} has dtype {t.dtype} and layout {t.layout}; use a dense floating-point tensor"
            )
        if t.dim() < 2:
            raise ValueError(f"attention: {name} needs two dimensions at least, got shape {tuple(t.shape)}")
        if t.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"attention: {name} is {t.dtype} and query {query.dtype}; give them one dtype")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"attention: query [..., Lq, d], key [..., Lk, d] and value [..., Lk, e] expected, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if mask is None:
        return
    if causal:
        raise ValueError("attention: give attn_mask or is_causal, not both")
    if mask.dtype != torch.bool and mask.dtype not in _DTYPES:
        raise TypeError(f"attention: attn_mask must be boolean or floating point, got {mask.dtype}")
    queries, keys = query.shape[-2], key.shape[-2]
    if (
        mask.dim() == 0
        or mask.shape[-1] not in (1, keys)
        or (mask.dim() > 1 and mask.shape[-2] not in (1, queries))
    ):
        raise ValueError(
            f"attention: attn_mask {tuple(mask.shape)} does not broadcast to [..., {queries}, {keys}]"
        )
