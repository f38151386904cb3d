"""Attention's compiled form, with the functions of ``_attention_blocks``: CUDA kernels over tiles of the scores.

What the kernels want beside the operands are numbers a row, which plain tensor operations give: rowsum(g ∘ O) and,
once Ȯ is known, rowsum(g ∘ Ȯ + ġ ∘ O). Row statistics have one convention in both forms.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._attention_layout import Form, Saved
from ._select import attention_available, runs_compiled_rows

MOST_WIDTH = 128
"""The largest head, of keys or values, that the kernels take."""
_MOST_DIMS = 8
_Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def takes(q: Tensor, v: Tensor, form: Form) -> bool:
    """Whether the kernels run: CUDA tensors in float32, heads that fit."""
    if q.device.type != "cuda" or not runs_compiled_rows(q.device) or not attention_available():
        return False
    return fits(q, v, form)


def fits(q: Tensor, v: Tensor, form: Form) -> bool:
    """Whether the kernels can do it, wherever the tensors are."""
    narrow = max(q.shape[-1], v.shape[-1]) <= MOST_WIDTH
    return q.dtype == torch.float32 and narrow and places(form.mask_rows) is not None


@lru_cache(maxsize=256)
def places(rows: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides, outermost first, such that entry b has the mask Σ_k digit_k(b) · stride_k, if there are any.

    Masks that were broadcast over batch axes, and vmapped, are always of this kind.
    """
    sizes: list[int] = []
    strides: list[int] = []
    rest = rows
    while len(rest) > 1:
        stride = rest[1] - rest[0]
        size = _run(rest, stride)
        if size < 2:
            return None
        sizes.append(size)
        strides.append(stride)
        rest = rest[::size]
    if (rest and rest[0] != 0) or len(sizes) > _MOST_DIMS or any(s < 0 for s in strides):
        return None
    return tuple(reversed(sizes)), tuple(reversed(strides))


def _run(rows: tuple[int, ...], stride: int) -> int:
    """The longest period whose every repetition ascends by ``stride``."""
    count = len(rows)
    ascends = [b - a == stride for a, b in pairwise(rows)]
    first = next((i + 1 for i, yes in enumerate(ascends) if not yes), count)
    for size in range(first, 1, -1):
        if count % size == 0 and all(yes for i, yes in enumerate(ascends) if (i + 1) % size):
            return size
    return 1


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """O [B, Lq, e] and the row statistics [B, Lq, 2]; a row without keys is zero."""
    result: tuple[Tensor, Tensor] = torch.ops.flatkern.attention_forward(
        *_contiguous(q, k, v, mask), *_options(mask, form)
    )
    return result


def tangent(
    saved: Saved, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dmask: Tensor | None, form: Form
) -> Tensor:
    """Ȯ along (q̇, k̇, v̇, ṁask), ``None`` for zeros."""
    return _tangent(saved, (dq, dk, dv, dmask), form)[0]


def gradient(saved: Saved, g: Tensor, form: Form, needs: tuple[bool, ...]) -> _Parts:
    """The gradients of ⟨g, O⟩ in q, k, v and mask, those needed."""
    parts = torch.ops.flatkern.attention_gradient(
        *_operands(saved), *_contiguous(g, (g * saved.out).sum(-1)), *_options(saved.mask, form), *needs
    )
    return _needed(parts, needs)


def second(
    saved: Saved,
    g: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dmask: Tensor | None,
    dg: Tensor | None,
    form: Form,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Ȯ, and what :func:`gradient` changes by along (q̇, k̇, v̇, ṁask, ġ)."""
    image, mean = _tangent(saved, (dq, dk, dv, dmask), form)
    change = (g * image).sum(-1)
    if dg is not None:
        change = change + (dg * saved.out).sum(-1)
    parts = torch.ops.flatkern.attention_second(
        *_operands(saved),
        *_contiguous(g, (g * saved.out).sum(-1), mean, change, dq, dk, dv, dmask, dg),
        *_options(saved.mask, form),
        *needs,
    )
    return image, *_needed(parts, needs)


def _tangent(saved: Saved, along: tuple[Tensor | None, ...], form: Form) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.flatkern.attention_tangent(
        *_operands(saved), *_contiguous(saved.out, *along), *_options(saved.mask, form)
    )
    return result


def _operands(saved: Saved) -> tuple[Tensor | None, ...]:
    return _contiguous(saved.q, saved.k, saved.v, saved.mask, saved.stats)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _options(mask: Tensor | None, form: Form) -> tuple[Any, ...]:
    found = places(form.mask_rows) if mask is not None else ((), ())
    assert found is not None  # `fits` has seen to it
    return *found, form.scale, form.causal


def _needed(parts: tuple[Tensor, ...], needs: tuple[bool, ...]) -> _Parts:
    q, k, v, mask = (part if need else None for part, need in zip(parts, needs, strict=True))
    return q, k, v, mask


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[:2], 2)


def _fake_tangent(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2])


def _fake_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    like = (q, k, v, q if mask is None else mask)
    return tuple(q.new_empty(t.shape if need else (0,)) for t, need in zip(like, rest[-4:], strict=True))


if attention_available():
    for _name, _fake in (
        ("forward", _fake_forward),
        ("tangent", _fake_tangent),
        ("gradient", _fake_sums),
        ("second", _fake_sums),
    ):
        torch.library.register_fake(f"flatkern::attention_{_name}", _fake)
