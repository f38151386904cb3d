"""Random vectors and their images, kept for the estimators that learn the range of an operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatkern.estimators.sampling_run import Run
from flatkern.estimators.small import CHUNK, inner

__all__ = ["Sketch", "largest_sketch"]


def largest_sketch(op_rows: int, itemsize: int, max_memory: int) -> int:
    """How many vectors fit: at the peak, in the QR factorization, there are four tensors [m, P]."""
    return max_memory // (4 * op_rows * itemsize)


class Sketch:
    """Random rows Ω [m, P] and their images (A Ωᵀ)ᵀ, with the small inner products among them.

    It grows; all inner products are float64 on the operator's device and nothing is read here.

    Attributes:
        images_gram: G_ij = (A ω_i)·(A ω_j), [m, m].
        forms: M_ij = ω_i·(A ω_j).
        vectors_gram: N_ij = ω_i·ω_j.
        entries_gram: E_ij = d_i·d_j with d_i = ω_i ∘ A ω_i, whose mean is the diagonal: off its own diagonal E
            has the mean Σ_k A_kk².
    """

    def __init__(self, run: Run, draw: Callable[[int], Tensor]) -> None:
        self._run, self._draw = run, draw
        self._vectors: list[Tensor] = []
        self._images: list[Tensor] = []
        empty = torch.zeros(0, 0, dtype=torch.float64, device=run.op.device)
        self.images_gram = self.forms = self.vectors_gram = self.entries_gram = empty

    def __len__(self) -> int:
        return len(self.images_gram)

    def grow(self, size: int) -> None:
        """Add vectors until there are ``size``; fewer where the run was interrupted."""
        count = size - len(self)
        if count <= 0:
            return
        run, stage, done = self._run, f"sketch{len(self._images)}", 0
        vectors = torch.empty(count, run.op.shape[1], dtype=run.op.dtype, device=run.op.device)
        images = run.array(stage, vectors.shape, run.op.dtype)
        for block in run.blocks(stage, count):
            vectors[block.span] = self._draw(len(block))
            done = block.stop
            if not block.known:
                images[block.span] = (run.op @ vectors[block.span].mT).mT
        self._add(vectors[:done], images[:done])

    def _add(self, vectors: Tensor, images: Tensor) -> None:
        self._vectors.append(vectors)
        self._images.append(images)
        self.images_gram = _bordered(self.images_gram, self._against(self._images, images), None)
        self.vectors_gram = _bordered(self.vectors_gram, self._against(self._vectors, vectors), None)
        self.forms = _bordered(
            self.forms,
            self._against(self._vectors, images),
            torch.cat([inner(vectors, y) for y in self._images], dim=1),
        )
        pairs = zip(self._vectors, self._images, strict=True)
        cross = torch.cat([_entries(v, y, vectors, images) for v, y in pairs])
        self.entries_gram = _bordered(self.entries_gram, cross, None)

    @staticmethod
    def _against(parts: list[Tensor], new: Tensor) -> Tensor:
        return torch.cat([inner(part, new) for part in parts])  # [m, new]

    def vectors(self) -> list[Tensor]:
        """Ω in pieces of rows."""
        return self._vectors

    def images(self) -> list[Tensor]:
        """The images in pieces of rows."""
        return self._images

    def basis(self) -> tuple[Tensor, Tensor]:
        """Orthonormal rows Q [m, P] that span the images, and C [m, m] float64 with A ω_j = Σ_i C_ij q_i."""
        factor = torch.linalg.qr(torch.cat(self._images).mT)
        return factor.Q.mT.contiguous(), factor.R.double()


def _bordered(old: Tensor, right: Tensor, below: Tensor | None) -> Tensor:
    """The old square block with new columns ``right`` [m, k] and new rows (their transpose if not given)."""
    m, k = right.shape
    new = right.new_empty(m, m)
    new[: m - k, : m - k] = old
    new[:, m - k :] = right
    new[m - k :] = right.mT if below is None else below
    return new


def _entries(v: Tensor, y: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """(v ∘ y)·(w ∘ z) for all pairs of rows, float64, in chunks."""
    total = torch.zeros(len(v), len(w), dtype=torch.float64, device=v.device)
    for start in range(0, v.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        left = v[:, part].double() * y[:, part].double()
        total.addmm_(left, (w[:, part].double() * z[:, part].double()).mT)
    return total
