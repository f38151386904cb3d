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

Row constants enter as one more column of a product: E, F and log₂ P come out of it finished. Gradients in k and v
are summed transposed, [B, d, Lk], where the products are faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
ROWS, CAUSAL_ROWS, FEWEST_ROWS = 256, 128, 16
"""Queries in a block, if memory allows; causal blocks are smaller so as to leave more keys out."""
BATCH_BYTES, MOST_BYTES = 1 << 20, 1 << 22
"""Of a block buffer on a CPU: up to the first, batch entries go together; the second is the limit."""
DEVICE_BYTES = 1 << 26


@dataclass(frozen=True)
class Form:
    """What is not a tensor: scale, causality, and which row of the mask [M, ·, ·] each batch entry has."""

    scale: float
    causal: bool
    mask_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Saved:
    """What the forward pass leaves for the derivatives: inputs, O [B, Lq, e], row maximum and 1/sum [B, Lq, 2]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    stats: Tensor
    out: Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """O [B, Lq, e] and the row statistics [B, Lq, 2]; a row without keys is zero."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    stats = q.new_empty(*q.shape[:2], 2)
    blocks = _Blocks(q, k, mask, form, buffers=1)
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
    blocks = _Blocks(saved.q, saved.k, saved.mask, form, buffers=2)
    for b in blocks.chunks():
        weights, scores = blocks.weights_of(saved, b), blocks.scores_of(saved, b, dq, dk)
        for i, n in blocks.queries():
            p = weights.block(i, n, 0)
            x = scores.block(i, n, 1, dmask)
            _tangent_block(saved, p, x, dv, (b, i, n), image[b, i])
    return image


def gradient(
    saved: Saved, g: Tensor, form: Form, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ⟨g, O⟩ in q, k, v and mask, those needed."""
    q, k, v = saved.q, saved.k, saved.v
    need_q, need_k, need_v, need_mask = needs
    sums = _Sums(saved, needs)
    blocks = _Blocks(q, k, saved.mask, form, buffers=2)
    for b in blocks.chunks():
        weights = blocks.weights_of(saved, b)
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
    sums = _Sums(saved, needs)
    blocks = _Blocks(q, k, saved.mask, form, buffers=4)
    for b in blocks.chunks():
        weights, scores = blocks.weights_of(saved, b), blocks.scores_of(saved, b, dq, dk)
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


class _Blocks:
    """How the work is cut, and the buffers of a block."""

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, form: Form, *, buffers: int) -> None:
        self.batch, self.queries_, self.keys = q.shape[0], q.shape[1], k.shape[1]
        self.mask, self.form = mask, form
        self.additive = mask is not None and mask.dtype != torch.bool
        # base 2 is faster; but a float mask may hold the dtype's least number, which must not overflow
        self.factor = form.scale if self.additive else form.scale * LOG2E
        size = q.element_size() * max(1, self.keys)
        together, most = (BATCH_BYTES, MOST_BYTES) if q.device.type == "cpu" else (DEVICE_BYTES, DEVICE_BYTES)
        rows = min(CAUSAL_ROWS, max(CAUSAL_ROWS // 2, self.queries_ // 8)) if form.causal else ROWS
        self.rows = max(1, min(self.queries_, rows, max(FEWEST_ROWS, most // size)))
        self.entries = max(1, min(self.batch, together // (size * self.rows)))
        self._buffers = [q.new_empty(self.entries * self.rows * self.keys) for _ in range(buffers)]

    def chunks(self) -> Iterator[slice]:
        """Slices of the batch."""
        for start in range(0, self.batch, self.entries):
            yield slice(start, min(start + self.entries, self.batch))

    def queries(self) -> Iterator[tuple[slice, int]]:
        """Slices of the queries, and how many keys they see."""
        for start in range(0, self.queries_, self.rows):
            stop = min(start + self.rows, self.queries_)
            yield slice(start, stop), min(stop, self.keys) if self.form.causal else self.keys

    def buffer(self, which: int, b: slice, i: slice, n: int) -> Tensor:
        """A buffer as a block."""
        shape = (b.stop - b.start, i.stop - i.start, n)
        return self._buffers[which][: math.prod(shape)].view(shape)

    def exponential(self, s: Tensor) -> Tensor:
        """exp of scores, in place, whichever their base."""
        return (s.mul_(LOG2E) if self.additive else s).exp2_()

    def add_mask(self, s: Tensor, b: slice, i: slice, n: int) -> None:
        """Mask and causality of a block of scores, in place."""
        if self.mask is not None:
            block = self._mask_block(self.mask, b, i, n)
            if self.additive:
                s.add_(block)
            else:
                s.masked_fill_(~block, -torch.inf)
        if self.form.causal and i.start < n:
            corner = s[..., i.start :]
            corner.masked_fill_(
                torch.ones(corner.shape[-2:], dtype=torch.bool, device=s.device).triu_(1), -torch.inf
            )

    def add_to_mask(self, total: Tensor, ds: Tensor, b: slice, i: slice, n: int) -> None:
        """Sums a block of dS into the mask's gradient."""
        if total.shape[-1] == 1:
            ds = ds.sum(-1, keepdim=True)
        if total.shape[-2] == 1:
            ds = ds.sum(-2, keepdim=True)
        where = total[:, i if total.shape[-2] > 1 else slice(None), : n if total.shape[-1] > 1 else 1]
        for entry, row in zip(ds, self.form.mask_rows[b], strict=True):
            where[row].add_(entry)

    def _mask_block(self, mask: Tensor, b: slice, i: slice, n: int) -> Tensor:
        part = mask[:, i if mask.shape[-2] > 1 else slice(None), : n if mask.shape[-1] > 1 else 1]
        rows = self.form.mask_rows[b]
        first = rows[0]
        if all(row == first for row in rows):
            return part[first : first + 1]
        if rows == tuple(range(first, first + len(rows))):
            return part[first : first + len(rows)]
        return part[list(rows)]

    def weights_of(self, saved: Saved, b: slice) -> _Weights:
        """P of a chunk."""
        return _Weights(self, saved, b)

    def scores_of(self, saved: Saved, b: slice, dq: Tensor | None, dk: Tensor | None) -> _Scores:
        """Ṡ of a chunk."""
        return _Scores(self, saved, b, dq, dk)


class _Weights:
    """P of a chunk, block by block."""

    def __init__(self, blocks: _Blocks, saved: Saved, b: slice) -> None:
        self.blocks, self.b = blocks, b
        q, k, self.stats = saved.q[b], saved.k[b], saved.stats[b]
        self.left, self.right = q * blocks.factor, k
        if not blocks.additive:  # log₂ P comes out of the product
            lse = self.stats[..., :1] - self.stats[..., 1:].log2()
            self.left = torch.cat([self.left, lse.neg_()], -1)
            self.right = torch.cat([k, k.new_ones(*k.shape[:2], 1)], -1)

    def block(self, i: slice, n: int, which: int) -> Tensor:
        """P of a block, in the buffer ``which``."""
        blocks = self.blocks
        s = torch.bmm(self.left[:, i], self.right[:, :n].mT, out=blocks.buffer(which, self.b, i, n))
        blocks.add_mask(s, self.b, i, n)
        if not blocks.additive:
            return s.exp2_()
        return blocks.exponential(s.sub_(self.stats[:, i, :1])).mul_(self.stats[:, i, 1:])


class _Scores:
    """Ṡ of a chunk, block by block."""

    def __init__(self, blocks: _Blocks, saved: Saved, b: slice, dq: Tensor | None, dk: Tensor | None) -> None:
        self.blocks, self.b = blocks, b
        scale, q, k = blocks.form.scale, saved.q, saved.k
        pairs = [(a[b], c[b]) for a, c in ((dq, k), (q, dk)) if a is not None and c is not None]
        self.empty = not pairs
        if pairs:
            self.left = torch.cat([a for a, _ in pairs], -1).mul_(scale)
            self.right = torch.cat([c for _, c in pairs], -1)

    def block(self, i: slice, n: int, which: int, dmask: Tensor | None) -> Tensor | None:
        """Ṡ of a block, in the buffer ``which``; ``None`` where it is zero."""
        if self.empty and dmask is None:
            return None
        out = self.blocks.buffer(which, self.b, i, n)
        if self.empty:
            out.zero_()
        else:
            torch.bmm(self.left[:, i], self.right[:, :n].mT, out=out)
        if dmask is not None:
            out.add_(self.blocks._mask_block(dmask, self.b, i, n))
        return out


class _Sums:
    """The gradients being summed, those needed; in k and v transposed."""

    def __init__(self, saved: Saved, needs: tuple[bool, ...]) -> None:
        self.needs = needs
        q, k, v = saved.q, saved.k, saved.v
        self.q = torch.empty_like(q) if needs[0] else q
        self.k = k.new_zeros(k.shape[0], k.shape[2], k.shape[1]) if needs[1] else k
        self.v = v.new_zeros(v.shape[0], v.shape[2], v.shape[1]) if needs[2] else v
        self.mask = q.new_zeros(saved.mask.shape) if needs[3] and saved.mask is not None else q

    def add_q(self, b: slice, i: slice, ds: Tensor, k: Tensor) -> None:
        torch.bmm(ds, k, out=self.q[b, i])

    def add_k(self, b: slice, n: int, q: Tensor, ds: Tensor) -> None:
        self.k[b, :, :n].baddbmm_(q.mT, ds)

    def add_v(self, b: slice, n: int, g: Tensor, p: Tensor) -> None:
        self.v[b, :, :n].baddbmm_(g.mT, p)

    def result(self, scale: float) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        needs = self.needs
        return (
            self.q.mul_(scale) if needs[0] else None,
            self.k.mul_(scale).mT if needs[1] else None,
            self.v.mT if needs[2] else None,
            self.mask if needs[3] else None,
        )
