"""Lookup tables: a token's row gets the cotangents of its occurrences, so that a_t·a_s = [token_t = token_s]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatkern.layers.outer import OuterTerm
from flatkern.layers.rule import Cotangent, Opened, Site, register
from flatkern.layers.shared_weight import row_energy
from flatkern.layers.term import Term, chunks

__all__ = ["RowsTerm", "padding_index"]


class RowsTerm(Term):
    """γ = Σ_e [sample e = i] onehot(row e) g_eᵀ over entries e, none of them ever formed as [V, d].

    Args:
        samples: [E], which sample an entry belongs to.
        rows: [E], which row of the table.
        cotangents: g, [K, E, d].
        n: number of samples.
        shape: of the table, [V, d].
    """

    def __init__(self, samples: Tensor, rows: Tensor, cotangents: Tensor, n: int, shape: torch.Size) -> None:
        self.samples, self.rows, self.cotangents = samples, rows, cotangents
        self.n, self.k, self.shape = n, len(cotangents), shape
        self.dtype, self.device = cotangents.dtype, cotangents.device

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """See :class:`flatkern.layers.term.Term`."""
        keep = (self.samples >= samples.start) & (self.samples < samples.stop)
        index = (self.samples[keep] - samples.start) * self.shape[0] + self.rows[keep]
        g = self.cotangents[cotangents][:, keep]
        count = samples.stop - samples.start
        out = g.new_zeros(len(g), count * self.shape[0], self.shape[1])
        return out.index_add_(1, index, g).reshape(len(g), count, *self.shape)

    def squared_norms(self, max_memory: int) -> Tensor:
        """Occurrences of one token in one sample are added up, then their norms: O(E d), no T × T Gram."""
        keys, inverse = torch.unique(self.samples * self.shape[0] + self.rows, return_inverse=True)
        if len(keys) == len(self.rows):
            return self._spread(self.samples, row_energy(self.cotangents).sum(0))
        total = self.cotangents.new_zeros(self.k, len(keys), self.shape[1])
        total.index_add_(1, inverse, self.cotangents)
        return self._spread(keys // self.shape[0], row_energy(total).sum(0))

    def _spread(self, samples: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(self.n).index_add_(0, samples, values)

    def gram(self, other: Term, max_memory: int) -> Tensor:
        """By gradients with respect to the rows that both use, in chunks of these."""
        if not isinstance(other, RowsTerm):
            return super().gram(other, max_memory)
        out = torch.zeros(self.n * self.k, other.n * other.k, dtype=torch.float64, device=self.device)
        used = torch.unique(self.rows)
        used = used[torch.isin(used, other.rows)]
        row_bytes = 16 * self.shape[1] * (len(out) + out.shape[1])
        for part in chunks(len(used), max_memory // row_bytes):
            out.addmm_(self._compact(used[part]), other._compact(used[part]).mT)
        return out

    def _compact(self, rows: Tensor) -> Tensor:
        """Gradients with respect to some rows (sorted), [n K, rows d] float64."""
        place = torch.searchsorted(rows, self.rows).clamp(max=len(rows) - 1)
        keep = rows[place] == self.rows
        small = RowsTerm(
            self.samples[keep],
            place[keep],
            self.cotangents[:, keep].double(),
            self.n,
            torch.Size((len(rows), self.shape[1])),
        )
        return small._rows(slice(0, self.n))

    def joined(self, others: Sequence[Term]) -> Term | None:
        """More entries; with a dense layer of the same weight, norms and cross Gram."""
        rows = [self, *(o for o in others if isinstance(o, RowsTerm))]
        rest = [o for o in others if not isinstance(o, RowsTerm)]
        table = RowsTerm(
            torch.cat([t.samples for t in rows]),
            torch.cat([t.rows for t in rows]),
            torch.cat([t.cotangents for t in rows], 1),
            self.n,
            self.shape,
        )
        if not rest:
            return table
        head = rest[0].joined(rest[1:]) if len(rest) > 1 else rest[0]
        if isinstance(head, OuterTerm) and head.sizes[0] == 1 and not head.transposed:
            return _TableAndHead(table, head)
        return None


class _TableAndHead(Term):
    """A table that is also the weight [V, d] of a dense layer: ‖γ + γ'‖² = ‖γ‖² + ‖γ'‖² + 2⟨γ, γ'⟩."""

    def __init__(self, table: RowsTerm, head: OuterTerm) -> None:
        self.table, self.head = table, head
        self._like(table)

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """See :class:`flatkern.layers.term.Term`."""
        return self.table.explicit(samples, cotangents) + self.head.explicit(samples, cotangents)

    def squared_norms(self, max_memory: int) -> Tensor:
        """⟨Σ_e onehot(v_e) g_eᵀ, Σ_s h_s a_sᵀ⟩ = Σ_{e,s} h_s[v_e] (g_e·a_s), by samples or chunks of entries."""
        total = self.table.squared_norms(max_memory) + self.head.squared_norms(max_memory)
        table, entries = self.table, len(self.table.rows)
        each = entries // self.n
        order = torch.arange(self.n, device=self.device).repeat_interleave(each)
        if entries == each * self.n and torch.equal(table.samples, order):
            return total + 2 * self._cross_of_even_samples(each, max_memory)
        head = self.head
        entry_bytes = head.cotangents.element_size() * head.sizes[1] * (2 * self.k + head.sizes[2])
        for part in chunks(entries, max_memory // max(1, 2 * entry_bytes)):
            sample, row = table.samples[part], table.rows[part]
            a = head.features(slice(0, self.n))[sample, 0]  # [E, S, d]
            picked = head.cotangents[:, sample, 0, :, row]  # [E, K, S]: advanced indices apart put E first
            inner = a @ table.cotangents[:, part].permute(1, 2, 0)  # [E, S, K]
            cross = (picked.transpose(1, 2).double() * inner).sum((1, 2))
            total += 2 * table._spread(sample, cross)
        return total

    def _cross_of_even_samples(self, each: int, max_memory: int) -> Tensor:
        """The cross terms [n] where every sample has so many entries, in order: products [E, d] times [d, S]."""
        table, head = self.table, self.head
        pair_bytes = 16 * each * head.sizes[1] * self.k
        out = []
        for part in chunks(self.n, max_memory // max(1, pair_bytes)):
            entries = slice(part.start * each, part.stop * each)
            count = part.stop - part.start
            g = table.cotangents[:, entries].reshape(self.k, count, each, -1)
            inner = g @ head.features(part)[:, 0].mT  # [K, n', E, S]
            rows = table.rows[entries].reshape(1, count, 1, each)
            h = head.cotangents[:, part, 0]  # [K, n', S, V]
            picked = h.gather(-1, rows.expand(self.k, count, h.shape[2], each))
            out.append((inner * picked.mT).sum((0, 2, 3), dtype=torch.float64))
        return torch.cat(out)

    def gram(self, other: Term, max_memory: int) -> Tensor:
        """Table with table and head with head cheaply, the mixed ones likewise in chunks of samples."""
        if not isinstance(other, _TableAndHead):
            return super().gram(other, max_memory)
        total = self.table.gram(other.table, max_memory) + self.head.gram(other.head, max_memory)
        total += _table_head_gram(self.table, other.head)
        return total + _table_head_gram(other.table, self.head).mT


def _table_head_gram(table: RowsTerm, head: OuterTerm) -> Tensor:
    """⟨γ_ik, γ'_jl⟩ of a table and a head, [n K, n' K'], one sample of the head at a time."""
    k, out = table.k, []
    for j in range(head.n):
        a = head.features(slice(j, j + 1))[0, 0].double()  # [S, d]
        picked = head.cotangents[:, j, 0][:, :, table.rows].double()  # [L, S, E]
        inner = table.cotangents.double() @ a.mT  # [K, E, S]
        entries = torch.einsum("lse,kes->ekl", picked, inner)
        column = entries.new_zeros(table.n, k, head.k).index_add_(0, table.samples, entries)
        out.append(column.reshape(table.n * k, head.k))
    return torch.stack(out, 1).reshape(table.n * k, head.n * head.k)


@register("Embedding")
def embedding(site: Site) -> Opened | None:
    """Positions at ``padding_idx`` get no gradient."""
    node: Any = site.node
    if site.operand != 0 or node._saved_scale_grad_by_freq:  # that gradient is not the function's
        return None
    tokens = site.samples_first(node._saved_indices.unsqueeze(0).unsqueeze(-1))[0].reshape(site.n, -1)
    keep = (tokens != padding_index(node)).flatten()
    return _entries(tokens, keep, site, None)


def padding_index(node: Any) -> int:
    """The row that gets no gradient, −1 where there is none."""
    index = int(node._saved_padding_idx)
    return -1 if index >= 1 << 63 else index  # unsigned in the graph


def _entries(tokens: Tensor, keep: Tensor, site: Site, weights: Tensor | None) -> Opened:
    everything = bool(keep.all())
    positions = tokens.shape[1]
    samples = torch.arange(site.n, device=tokens.device).repeat_interleave(positions)
    rows = tokens.flatten()
    if not everything:
        samples, rows = samples[keep], rows[keep]

    def term(g: Cotangent) -> Term:
        value = g.samples_first.reshape(len(g.value), -1, site.shape[-1])
        return RowsTerm(samples, rows, value if everything else value[:, keep], site.n, site.shape)

    return term


@register("EmbeddingBag")
def embedding_bag(site: Site) -> Opened | None:
    """Sum and mean over bags: a token's share of its bag's cotangent."""
    node: Any = site.node
    if site.operand != 0 or node._saved_scale_grad_by_freq or node._saved_mode not in (0, 1):
        return None
    indices, offsets = node._saved_indices, node._saved_offsets
    entries = torch.arange(len(indices), device=indices.device)
    bag = torch.searchsorted(offsets, entries, right=True) - 1
    keep = indices != padding_index(node)
    rows, bag = indices[keep], bag[keep]
    weight = node._saved_per_sample_weights
    share = None if weight is None else weight.detach()[keep]
    bags = node._input_metadata[0].shape[0]
    if node._saved_mode == 1:
        share = 1 / torch.bincount(bag, minlength=bags).clamp(min=1)[bag].double()
    # which sample a bag belongs to, by the layout of the output
    place = torch.arange(bags, device=indices.device).reshape(1, bags, 1)
    grouped = site.samples_first(place)[0].reshape(site.n, -1)
    owner = torch.empty(bags, dtype=torch.long, device=indices.device)
    owner[grouped.flatten()] = torch.arange(site.n, device=indices.device).repeat_interleave(grouped.shape[1])

    def term(g: Cotangent) -> Term:
        value = g.value[:, bag]
        if share is not None:
            value = value * share.to(value.dtype).unsqueeze(-1)
        return RowsTerm(owner[bag], rows, value, site.n, site.shape)

    return term
