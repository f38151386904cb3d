"""Attention and its derivatives by blocks of queries: plain loops over tensors, outside autograd.

Everything here takes q [B, Lq, d], k [B, Lk, d], v [B, Lk, e] and works on blocks [b, i, n] of b batch entries, i
queries and n keys; a block's buffers are reused, so that T × T is never stored. With S = scale q kᵀ + mask and
P = softmax(S), whose row statistics the forward pass keeps, a dot is a derivative along (q̇, k̇, v̇, ṁask, ġ):

    O   = P v
    dS  = P ∘ E,  E = g vᵀ − rowsum(g ∘ O)                 dq = scale dS k, dk = scale dSᵀ q, dv = Pᵀ g
    Ṡ   = scale (q̇ kᵀ + q k̇ᵀ) + ṁask
    Ṗ   = P ∘ (Ṡ − μ),  μ = rowsum(P ∘ Ṡ)                  Ȯ = (P ∘ Ṡ) v + P v̇ − μ ∘ O
    dṠ  = Ṗ ∘ E + P ∘ F,  F = g v̇ᵀ + ġ vᵀ − rowsum(g ∘ Ȯ + ġ ∘ O)
    dq˙ = scale (dṠ k + dS k̇), dk˙ = scale (dṠᵀ q + dSᵀ q̇), dv˙ = Ṗᵀ g + Pᵀ ġ
    ⟨g, Ö⟩ = Σ E ∘ P ∘ ((Ṡ − μ)² + 2 scale q̇ k̇ᵀ) + 2 Σ Ṗ ∘ (g v̇ᵀ)

Row constants enter as one more column of a product: E, F and log₂ P come out of it finished. Gradients in k and v
are summed transposed, [B, d, Lk], where the products are faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_layout import Blocks, Form, Saved, Scores, Sums, Weights


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """O [B, Lq, e] and the row statistics [B, Lq, 2]; a row without keys is zero."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    stats = q.new_empty(*q.shape[:2], 2)
    blocks = Blocks(q, k, mask, form, buffers=1)
    for b in blocks.chunks():
        left = q[b] * blocks.factor
        for i, n in blocks.queries():
            s = torch.bmm(left[:, i], k[b, :n].mT, out=blocks.buffer(0, b, i, n))
            blocks.add_mask(s, b, i, n)
            top = s.amax(-1, keepdim=True)
            top.masked_fill_(top == -torch.inf, 0.0)
            blocks.exponential(s.sub_(top))
            total = s.sum(-1, keepdim=True)
            inverse = torch.where(total == 0, 0.0, total.reciprocal())
            torch.mul(torch.bmm(s, v[b, :n]), inverse, out=out[b, i])
            stats[b, i, :1], stats[b, i, 1:] = top, inverse
    return out, stats


def tangent(
    saved: Saved, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dmask: Tensor | None, form: Form
) -> Tensor:
    """Ȯ along (q̇, k̇, v̇, ṁask), ``None`` for zeros."""
    image = torch.empty_like(saved.out)
    blocks = Blocks(saved.q, saved.k, saved.mask, form, buffers=2)
    for b in blocks.chunks():
        weights, scores = Weights(blocks, saved, b), Scores(blocks, saved, b, dq, dk)
        for i, n in blocks.queries():
            p = weights.block(i, n, 0)
            x = scores.block(i, n, 1, dmask)
            _tangent_block(saved, p, x, dv, (b, i, n), image[b, i])
    return image


def gradient(
    saved: Saved, g: Tensor, form: Form, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ⟨g, O⟩ in q, k, v and mask, those needed."""
    q, k = saved.q, saved.k
    need_q, need_k, need_v, need_mask = needs
    sums = Sums(saved, needs)
    blocks = Blocks(q, k, saved.mask, form, buffers=2)
    for b in blocks.chunks():
        weights = Weights(blocks, saved, b)
        left, right = _centred(saved, g, b)
        for i, n in blocks.queries():
            p = weights.block(i, n, 0)
            if need_v:
                sums.add_v(b, n, g[b, i], p)
            if not (need_q or need_k or need_mask):
                continue
            ds = torch.bmm(left[:, i], right[:, :n].mT, out=blocks.buffer(1, b, i, n)).mul_(p)
            if need_q:
                sums.add_q(b, i, ds, k[b, :n])
            if need_k:
                sums.add_k(b, n, q[b, i], ds)
            if need_mask:
                blocks.add_to_mask(sums.mask, ds, b, i, n)
    return sums.result(form.scale)


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
    q, k, v = saved.q, saved.k, saved.v
    need_q, need_k, need_v, need_mask = needs
    image = torch.empty_like(saved.out)
    sums = Sums(saved, needs)
    blocks = Blocks(q, k, saved.mask, form, buffers=4)
    for b in blocks.chunks():
        weights, scores = Weights(blocks, saved, b), Scores(blocks, saved, b, dq, dk)
        left, right = _centred(saved, g, b)
        ones = right[..., -1:]
        # F of the formulas; its last column is known once Ȯ is
        pairs = [(a[b], c[b]) for a, c in ((g, dv), (dg, v)) if a is not None and c is not None]
        f_left = torch.cat([*(a for a, _ in pairs), torch.empty_like(left[..., -1:])], -1)
        f_right = torch.cat([*(c for _, c in pairs), ones], -1)
        for i, n in blocks.queries():
            p = weights.block(i, n, 0)
            x = scores.block(i, n, 1, dmask)
            o = image[b, i]
            mean = _tangent_block(saved, p, x, dv, (b, i, n), o)
            if x is not None and mean is not None:
                x.addcmul_(p, mean, value=-1)  # Ṗ
            if need_v:
                if x is not None:
                    sums.add_v(b, n, g[b, i], x)
                if dg is not None:
                    sums.add_v(b, n, dg[b, i], p)
            if not (need_q or need_k or need_mask):
                continue
            change = (g[b, i] * o).sum(-1)
            if dg is not None:
                change += (dg[b, i] * saved.out[b, i]).sum(-1)
            f_left[:, i, -1] = change.neg_()
            ds_dot = torch.bmm(f_left[:, i], f_right[:, :n].mT, out=blocks.buffer(2, b, i, n)).mul_(p)
            ds = None
            if x is not None:
                ds = torch.bmm(left[:, i], right[:, :n].mT, out=blocks.buffer(3, b, i, n))
                ds_dot.addcmul_(x, ds)
                ds.mul_(p)
            if need_q:
                sums.add_q(b, i, ds_dot, k[b, :n])
                if dk is not None and ds is not None:
                    sums.q[b, i].baddbmm_(ds, dk[b, :n])
            if need_k:
                sums.add_k(b, n, q[b, i], ds_dot)
                if dq is not None and ds is not None:
                    sums.add_k(b, n, dq[b, i], ds)
            if need_mask:
                blocks.add_to_mask(sums.mask, ds_dot, b, i, n)
    return image, *sums.result(form.scale)


def jet(
    saved: Saved,
    g: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dmask: Tensor | None,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Ȯ, and ⟨g, Ö⟩ along the straight line (q̇, k̇, v̇, ṁask) for every query, [B, Lq]."""
    image = torch.empty_like(saved.out)
    bent = saved.out.new_zeros(saved.out.shape[:2])
    blocks = Blocks(saved.q, saved.k, saved.mask, form, buffers=4)
    for b in blocks.chunks():
        weights, scores = Weights(blocks, saved, b), Scores(blocks, saved, b, dq, dk)
        left, right = _centred(saved, g, b)
        curved = None if dq is None or dk is None else (dq[b] * (2 * form.scale), dk[b])
        for i, n in blocks.queries():
            p = weights.block(i, n, 0)
            x = scores.block(i, n, 1, dmask)
            o = image[b, i]
            if x is None:
                o.zero_()
            else:
                moved = torch.mul(p, x, out=blocks.buffer(2, b, i, n))
                mean = moved.sum(-1, keepdim=True)
                moved.addcmul_(p, mean, value=-1)  # Ṗ
                torch.bmm(moved, saved.v[b, :n], out=o)
                x.sub_(mean).mul_(moved)  # P ∘ (Ṡ − μ)²
                if curved is not None:
                    s = torch.bmm(curved[0][:, i], curved[1][:, :n].mT, out=blocks.buffer(3, b, i, n))
                    x.addcmul_(p, s)
                e = torch.bmm(left[:, i], right[:, :n].mT, out=blocks.buffer(3, b, i, n))
                bent[b, i] = x.mul_(e).sum(-1)
                if dv is not None:
                    f = torch.bmm(g[b, i], dv[b, :n].mT, out=blocks.buffer(3, b, i, n))
                    bent[b, i].add_(moved.mul_(f).sum(-1), alpha=2)
            if dv is not None:
                o.baddbmm_(p, dv[b, :n])
    return image, bent


def _tangent_block(
    saved: Saved, p: Tensor, x: Tensor | None, dv: Tensor | None, at: tuple[slice, slice, int], o: Tensor
) -> Tensor | None:
    """Ȯ of a block into ``o``; turns Ṡ, in ``x``, into P ∘ Ṡ, and returns its row sums."""
    b, i, n = at
    mean = None
    if x is None:
        o.zero_()
    else:
        mean = x.mul_(p).sum(-1, keepdim=True)
        torch.bmm(x, saved.v[b, :n], out=o)
        o.addcmul_(mean, saved.out[b, i], value=-1)
    if dv is not None:
        o.baddbmm_(p, dv[b, :n])
    return mean


def _centred(saved: Saved, g: Tensor, b: slice) -> tuple[Tensor, Tensor]:
    """Two factors whose product is E."""
    v = saved.v[b]
    total = (g[b] * saved.out[b]).sum(-1, keepdim=True)
    return torch.cat([g[b], total.neg_()], -1), torch.cat([v, v.new_ones(*v.shape[:2], 1)], -1)
