"""How attention is cut into blocks of queries: sizes, buffers, masks, and the score-like factors of a block.

The formulas, and the loops over what is here, are in ``_attention_blocks``.
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


def batch_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> torch.Size:
    """The batch dimensions, broadcast."""
    lead = () if mask is None else mask.shape[:-2]
    try:
        return torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2], lead)
    except RuntimeError as error:
        raise ValueError(
            f"attention: batch dimensions do not broadcast: query {tuple(query.shape)}, key {tuple(key.shape)}, value "
            f"{tuple(value.shape)}, attn_mask {None if mask is None else tuple(mask.shape)}"
        ) from error


def one_batch(t: Tensor, batch: torch.Size) -> Tensor:
    """[..., L, d] → [B, L, d]."""
    return t.expand(*batch, *t.shape[-2:]).reshape(math.prod(batch), *t.shape[-2:])


def as_matrices(mask: Tensor) -> Tensor:
    """A mask as [M, Lq or 1, Lk or 1]."""
    mask = mask[(None,) * max(0, 2 - mask.dim())]
    return mask.reshape(-1, *mask.shape[-2:])


def mask_rows(mask: Tensor, batch: torch.Size) -> tuple[int, ...]:
    """Which of these matrices each batch entry has."""
    lead = mask.shape[:-2]
    return tuple(torch.arange(math.prod(lead)).reshape(lead).expand(batch).reshape(-1).tolist())


def shared_heads(t: Tensor, query: Tensor) -> Tensor:
    """Each head of t [..., h, L, d] as often as the query's heads ask for."""
    heads, wanted = t.shape[-3], query.shape[-3]
    if heads == 0 or wanted % heads:
        raise ValueError(
            f"attention: enable_gqa needs a multiple of the heads of key and value in query, got {wanted} and {heads}"
        )
    return t.unsqueeze(-3).expand(*t.shape[:-3], heads, wanted // heads, *t.shape[-2:]).flatten(-4, -3)


class Blocks:
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
            block = self.mask_block(self.mask, b, i, n)
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

    def mask_block(self, mask: Tensor, b: slice, i: slice, n: int) -> Tensor:
        part = mask[:, i if mask.shape[-2] > 1 else slice(None), : n if mask.shape[-1] > 1 else 1]
        rows = self.form.mask_rows[b]
        first = rows[0]
        if all(row == first for row in rows):
            return part[first : first + 1]
        if rows == tuple(range(first, first + len(rows))):
            return part[first : first + len(rows)]
        return part[list(rows)]


class Weights:
    """P of a chunk, block by block."""

    def __init__(self, blocks: Blocks, saved: Saved, b: slice) -> None:
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


class Scores:
    """Ṡ of a chunk, block by block."""

    def __init__(self, blocks: Blocks, saved: Saved, b: slice, dq: Tensor | None, dk: Tensor | None) -> None:
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
            out.add_(self.blocks.mask_block(dmask, self.b, i, n))
        return out


class Sums:
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
