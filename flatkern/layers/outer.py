"""Gradients that are sums of outer products over positions: γ = Σ_t g_t a_tᵀ, for dense layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatkern.kernels._ghost_gram import inner_products
from flatkern.kernels._ghost_norm import ghost_norms
from flatkern.kernels._select import runs_compiled_rows
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
    bytes of an entry; 0 where asking takes no memory. ``view``: see :meth:`as_view`.
    """

    def __init__(
        self,
        make: Callable[[slice], Tensor],
        shape: tuple[int, int, int, int],
        size: int,
        pieces: Callable[[slice], list[Tensor]] | None = None,
        view: tuple[Callable[[slice], Tensor], int] | None = None,
    ) -> None:
        self.shape = shape
        self._view = view
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

    def as_view(self, samples: slice) -> tuple[Tensor, int]:
        """[n', G, *positions, *features] that need not be formed, and over how many dimensions the positions spread."""
        if self._view is None:
            return self(samples), 1
        return self._view[0](samples), self._view[1]

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
        if self._by_kernel():
            return torch.cat([self._tiled_squared_norms(part) for part in chunks(self.n, step)])
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

    def _by_kernel(self) -> bool:
        """Whether the compiled kernel takes these, where it was measured to win: on a CPU."""
        plain = self.dtype in (torch.float32, torch.float64)
        return plain and self.device.type == "cpu" and runs_compiled_rows(self.device)

    def _tiled_squared_norms(self, samples: slice) -> Tensor:
        """Σ_k ‖γ_ik‖² by tiles, of inputs that are read where they lie."""
        a, dims = self.features.as_view(samples)
        g = self.cotangents[:, samples].unflatten(3, a.shape[2 : 2 + dims])
        return ghost_norms(a.to(g.dtype), g, dims).sum((0, 2))

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
        if self.sizes[:2] == other.sizes[:2] == (1, 1):
            return self._gram_of_single_positions(other)
        pairs = inner_products(self.features, self.cotangents, other.features, other.cotangents, max_memory)
        return pairs.reshape(self.n * self.k, other.n * other.k)

    def _gram_of_single_positions(self, other: OuterTerm) -> Tensor:
        everything = slice(0, self.n), slice(0, other.n)
        a, b = self.features(everything[0]), other.features(everything[1])
        inputs = a.flatten(1).double() @ b.flatten(1).double().mT  # [n, n']
        g = self.cotangents.flatten(2).transpose(0, 1).reshape(self.n * self.k, -1).double()
        h = other.cotangents.flatten(2).transpose(0, 1).reshape(other.n * other.k, -1).double()
        product = (g @ h.mT).reshape(self.n, self.k, other.n, other.k)
        return (product.mul_(inputs[:, None, :, None])).reshape(self.n * self.k, -1)

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
