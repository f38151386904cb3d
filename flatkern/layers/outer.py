"""Gradients that are sums of outer products over positions: γ = Σ_t g_t a_tᵀ, for dense layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatkern.layers.shared_weight import cheaper_form, row_energy, weight_squared_norms
from flatkern.layers.term import Term, chunks

__all__ = ["Features", "OuterTerm"]


_CACHE_BYTES = 1 << 21
"""Patches formed at a time on a CPU."""
_KEPT_BYTES = 1 << 23
"""Patches of one layer that are kept once they are asked for again."""


class Features:
    """The layer's inputs a [n, G, T, d]: G groups that share nothing, T positions that share the weight.

    Formed from ``make(samples)`` whenever asked for: chunks that stay in the cache cost less than reading all of them
    again from memory. Small ones are kept from the second time on, when several cotangents need them. ``size``:
    bytes of an entry; 0 where asking takes no memory.
    """

    def __init__(
        self,
        make: Callable[[slice], Tensor],
        shape: tuple[int, int, int, int],
        size: int,
        pieces: Callable[[slice], list[Tensor]] | None = None,
    ) -> None:
        self.shape = shape
        self.bytes = torch.Size(shape).numel() * size
        self.pieces = pieces if self.bytes > _KEPT_BYTES else None
        """(samples) → parts [n' · G, d', T] whose rows together are those of aᵀ; ``None``: no cheaper than a."""
        self._make = make
        self._kept: Tensor | None = None
        self._formed = 0
        self._energy: Tensor | None = None

    @classmethod
    def of(cls, a: Tensor) -> Features:
        """Of a tensor [n, G, T, d] that is there already (or a view of one)."""
        n, g, t, d = a.shape
        return cls(a.__getitem__, (n, g, t, d), 0)

    def __call__(self, samples: slice) -> Tensor:
        """[n', G, T, d]."""
        n = self.shape[0]
        if self._kept is None and self._formed >= n and 0 < self.bytes <= _KEPT_BYTES:
            self._kept = self._make(slice(0, n))
        if self._kept is not None:
            return self._kept[samples]
        self._formed += samples.stop - samples.start
        return self._make(samples)

    @property
    def energy(self) -> Tensor:
        """‖a‖², float64 [n], for one position and group."""
        if self._energy is None:
            self._energy = row_energy(self(slice(0, self.shape[0])).flatten(1))
        return self._energy


class OuterTerm(Term):
    """γ = Σ_t g_t a_tᵀ in each group: a [n, G, T, d_a], g [K, n, G, T, d_g].

    Args:
        features: a.
        cotangents: g.
        shape: of the parameter; G·d_g·d_a entries in the order (group, g, a), or (group, a, g) where ``transposed``.
        energy: ‖g‖², float64 [K, n], where it is known already.
    """

    def __init__(
        self,
        features: Features,
        cotangents: Tensor,
        shape: torch.Size,
        *,
        transposed: bool = False,
        energy: Callable[[], Tensor] | None = None,
    ) -> None:
        self.features, self.cotangents, self.shape = features, cotangents, shape
        self.transposed, self._energy = transposed, energy
        self.k, self.n = cotangents.shape[:2]
        self.dtype, self.device = cotangents.dtype, cotangents.device

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """G, T, d_a, d_g."""
        _, groups, positions, d_a = self.features.shape
        return groups, positions, d_a, self.cotangents.shape[-1]

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """See :class:`flatkern.layers.term.Term`."""
        a, g = self.features(samples), self.cotangents[cotangents, samples]
        formed = a.mT @ g if self.transposed else g.mT @ a
        return formed.reshape(*g.shape[:2], *self.shape)

    def squared_norms(self, max_memory: int) -> Tensor:
        """‖g‖² ‖a‖² for one position, else the small gradient or two T × T Grams, whichever is cheaper."""
        groups, positions, _, d_g = self.sizes
        if groups == positions == 1:
            energy = row_energy(self.cotangents.flatten(2)) if self._energy is None else self._energy()
            return energy.sum(0) * self.features.energy
        step = self.n
        if self.features.bytes:
            wanted = min(max_memory // 4, _CACHE_BYTES) if self.device.type == "cpu" else max_memory // 4
            step = max(1, self.n * wanted // self.features.bytes)
        wanted = max_memory // (2 * self.k * self.shape.numel() * self.cotangents.element_size())
        explicit = cheaper_form(positions, self.sizes[2], d_g, self.k) == "explicit"
        if self.features.pieces is not None and explicit and wanted > 0:
            return torch.cat([self._energy_of_pieces(part) for part in chunks(self.n, min(step, wanted))])
        parts = []
        for part in chunks(self.n, step):
            a, g = self.features(part).flatten(0, 1), self.cotangents[:, part]
            # each group is a dense map of its own: groups are folded into the samples
            g = g.reshape(self.k, -1, positions, d_g)
            norms = weight_squared_norms(a, g, max_memory if step == self.n else max_memory // 2)
            parts.append(norms.reshape(-1, groups).sum(1))
        return torch.cat(parts)

    def _energy_of_pieces(self, samples: slice) -> Tensor:
        """Σ_k ‖γ_ik‖² where the order of the entries of γ does not matter."""
        assert self.features.pieces is not None
        groups, positions, _, d_g = self.sizes
        g = self.cotangents[:, samples].permute(1, 2, 0, 4, 3)  # [n', G, K, d_g, T]
        rows = g.reshape(-1, self.k * d_g, positions)
        energies = [row_energy((rows @ piece.mT).flatten(1)) for piece in self.features.pieces(samples)]
        return torch.stack(energies).sum(0).reshape(-1, groups).sum(1)

    def gram(self, other: Term, max_memory: int) -> Tensor:
        """Σ_{t,s} (g_t·g'_s)(a_t·a'_s) for all pairs, by formed gradients or pairwise, whichever is cheaper."""
        if not isinstance(other, OuterTerm) or other.transposed != self.transposed:
            return super().gram(other, max_memory)
        groups, t, d_a, d_g = self.sizes
        s = other.sizes[1]
        if groups == t == s == 1:
            return self._gram_of_single_positions(other)
        rows, columns = self.n * self.k, other.n * other.k
        formed = d_a * d_g * (rows * columns + rows * t + columns * s)
        paired = self.n * other.n * (t * s * (d_a + self.k * d_g) + self.k * other.k * s * d_g)
        return (
            self._gram_of_pairs(other, max_memory)
            if paired < formed
            else self._gram_of_formed(other, max_memory)
        )

    def _gram_of_single_positions(self, other: OuterTerm) -> Tensor:
        everything = slice(0, self.n), slice(0, other.n)
        a, b = self.features(everything[0]), other.features(everything[1])
        inputs = a.flatten(1).double() @ b.flatten(1).double().mT  # [n, n']
        g = self.cotangents.flatten(2).transpose(0, 1).reshape(self.n * self.k, -1).double()
        h = other.cotangents.flatten(2).transpose(0, 1).reshape(other.n * other.k, -1).double()
        product = (g @ h.mT).reshape(self.n, self.k, other.n, other.k)
        return (product.mul_(inputs[:, None, :, None])).reshape(self.n * self.k, -1)

    def _gram_of_formed(self, other: OuterTerm, max_memory: int) -> Tensor:
        """Gradients formed for some of the g axis at a time: [n K, n' K'] is accumulated in one place."""
        d_g = self.sizes[3]
        row_bytes = 16 * self.shape.numel() // d_g * (self.n * self.k + other.n * other.k)
        out = torch.zeros(self.n * self.k, other.n * other.k, dtype=torch.float64, device=self.device)
        for part in chunks(d_g, max_memory // max(1, row_bytes)):
            left, right = self._formed_rows(part), other._formed_rows(part)
            out.addmm_(left, right.mT)
        return out

    def _formed_rows(self, part: slice) -> Tensor:
        a = self.features(slice(0, self.n))
        formed = self.cotangents[..., part].mT.double() @ a.double()  # [K, n, G, part, d_a]
        return formed.flatten(2).transpose(0, 1).reshape(self.n * self.k, -1)

    def _gram_of_pairs(self, other: OuterTerm, max_memory: int) -> Tensor:
        groups, t, d_a, d_g = self.sizes
        s = other.sizes[1]
        out = torch.empty(self.n, self.k, other.n, other.k, dtype=torch.float64, device=self.device)
        pair_bytes = 8 * groups * (t * s + 2 * s * self.k * d_g)
        fixed = 8 * groups * (t * (d_a + self.k * d_g) + s * (d_a + other.k * d_g))
        at_once = max(1, int((max_memory / (2 * max(pair_bytes, fixed))) ** 0.5))
        for rows in chunks(self.n, at_once):
            a = self.features(rows).double().unsqueeze(1)  # [i, 1, G, T, d_a]
            g = self.cotangents[:, rows].double().permute(1, 2, 3, 0, 4).flatten(3).unsqueeze(1)
            for columns in chunks(other.n, at_once):
                b = other.features(columns).double().unsqueeze(0)
                h = other.cotangents[:, columns].double()  # [K', j, G, S, d_g]
                mixed = (b @ a.mT) @ g  # Σ_t (a_t·b_s) g_t: [i, j, G, S, K d_g]
                mixed = mixed.reshape(*mixed.shape[:4], self.k, d_g)
                out[rows, :, columns] = torch.einsum("ijgskd,ljgsd->ikjl", mixed, h)
        return out.reshape(self.n * self.k, other.n * other.k)

    def flipped(self) -> Term:
        """See :class:`flatkern.layers.term.Term`; only for one group and a matrix."""
        return OuterTerm(
            self.features,
            self.cotangents,
            torch.Size(reversed(self.shape)),
            transposed=not self.transposed,
            energy=self._energy,
        )

    def joined(self, others: Sequence[Term]) -> Term | None:
        """A weight used several times is shared over the positions of all its uses, cross terms included."""
        uses = [self]
        for other in others:
            if not (
                isinstance(other, OuterTerm)
                and other.transposed == self.transposed
                and (other.sizes[0], *other.sizes[2:]) == (self.sizes[0], *self.sizes[2:])
            ):
                return None
            uses.append(other)
        n, groups, _, d_a = self.features.shape
        positions = sum(use.sizes[1] for use in uses)
        every = [use.features for use in uses]
        size = self.cotangents.element_size()
        features = Features(
            lambda part: torch.cat([f(part) for f in every], 2), (n, groups, positions, d_a), size
        )
        cotangents = torch.cat([use.cotangents for use in uses], 3)
        return OuterTerm(features, cotangents, self.shape, transposed=self.transposed)
