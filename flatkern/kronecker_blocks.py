"""Diagonal blocks of a curvature approximation: Kronecker products, dense ones, diagonals; their eigenvalues."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["CurvatureBlock", "DenseBlock", "DiagonalBlock", "Function", "KroneckerBlock", "Places"]

Function = Callable[[Tensor], Tensor]


class Places:
    """Which entries of a flat vector a block acts on, in the block's own order."""

    def __init__(self, parts: list[slice | Tensor]) -> None:
        self._parts = parts

    def take(self, rows: Tensor) -> list[Tensor]:
        """[k, P] → [k, size] for each part."""
        return [rows[:, part] for part in self._parts]

    def put(self, out: Tensor, values: list[Tensor]) -> None:
        """Write [k, size] for each part into [k, P]."""
        for part, value in zip(self._parts, values, strict=True):
            out[:, part] = value.to(out.dtype)


class CurvatureBlock(ABC):
    """A symmetric positive semi-definite block.

    Attributes:
        names: the parameters it belongs to.
        places: their entries.
    """

    names: tuple[str, ...]
    places: Places

    @property
    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """float64, one an entry, in no particular order."""

    @property
    @abstractmethod
    def trace(self) -> float:
        """Sum of the eigenvalues."""

    @abstractmethod
    def apply(self, rows: Tensor, out: Tensor) -> None:
        """The product, from [k, P] into [k, P]."""

    @abstractmethod
    def function(self, f: Function, rows: Tensor, out: Tensor) -> None:
        """The product with f of the block, likewise; f acts on eigenvalues."""


class KroneckerBlock(CurvatureBlock):
    """B ⊗ A on a weight as a matrix [G, d_out, d_in], a bias as one more column of it; G groups that share nothing.

    Attributes:
        input_factor: A, float64 [G, d_in (+ 1), d_in (+ 1)].
        output_factor: B, float64 [G, d_out, d_out].
    """

    def __init__(
        self, names: tuple[str, ...], places: Places, input_factor: Tensor, output_factor: Tensor
    ) -> None:
        self.names, self.places = names, places
        self.input_factor, self.output_factor = input_factor, output_factor

    def _matrices(self, rows: Tensor) -> Tensor:
        groups, d_out, _ = self.output_factor.shape
        parts = [part.double().reshape(len(rows), groups, d_out, -1) for part in self.places.take(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _put(self, matrices: Tensor, out: Tensor) -> None:
        if len(self.names) == 1:
            self.places.put(out, [matrices.flatten(1)])
        else:
            self.places.put(out, [matrices[..., :-1].flatten(1), matrices[..., -1].flatten(1)])

    def apply(self, rows: Tensor, out: Tensor) -> None:
        """B M A."""
        self._put(self.output_factor @ self._matrices(rows) @ self.input_factor, out)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values and vectors of A, values and vectors of B, for each group."""
        a, b = torch.linalg.eigh(self.input_factor), torch.linalg.eigh(self.output_factor)
        return a[0].clamp(min=0), a[1], b[0].clamp(min=0), b[1]

    @property
    def _grid(self) -> Tensor:
        a, _, b, _ = self.eigen
        return b.unsqueeze(-1) * a.unsqueeze(-2)

    def function(self, f: Function, rows: Tensor, out: Tensor) -> None:
        """Q_B (f(λ_B λ_Aᵀ) ∘ (Q_Bᵀ M Q_A)) Q_Aᵀ."""
        _, q_a, _, q_b = self.eigen
        turned = q_b.mT @ self._matrices(rows) @ q_a
        self._put(q_b @ (turned * f(self._grid)) @ q_a.mT, out)

    @property
    def eigenvalues(self) -> Tensor:
        """See :class:`CurvatureBlock`."""
        return self._grid.flatten()

    @property
    def trace(self) -> float:
        """See :class:`CurvatureBlock`."""
        a, b = (f.diagonal(dim1=-2, dim2=-1).sum(-1) for f in (self.input_factor, self.output_factor))
        return float((a * b).sum())


class DenseBlock(CurvatureBlock):
    """The exact block of a small parameter, float64 [size, size]."""

    def __init__(self, name: str, place: slice, matrix: Tensor) -> None:
        self.names, self.places, self.matrix = (name,), Places([place]), matrix

    def apply(self, rows: Tensor, out: Tensor) -> None:
        """See :class:`CurvatureBlock`."""
        self.places.put(out, [self.places.take(rows)[0].double() @ self.matrix])

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Values and vectors."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.clamp(min=0), vectors

    def function(self, f: Function, rows: Tensor, out: Tensor) -> None:
        """See :class:`CurvatureBlock`."""
        values, vectors = self.eigen
        turned = self.places.take(rows)[0].double() @ vectors
        self.places.put(out, [(turned * f(values)) @ vectors.mT])

    @property
    def eigenvalues(self) -> Tensor:
        """See :class:`CurvatureBlock`."""
        return self.eigen[0]

    @property
    def trace(self) -> float:
        """See :class:`CurvatureBlock`."""
        return float(self.matrix.trace())


class DiagonalBlock(CurvatureBlock):
    """The exact diagonal of a parameter's block, float64 [size]; what lies beside it is dropped."""

    def __init__(self, name: str, place: slice, values: Tensor) -> None:
        self.names, self.places, self.values = (name,), Places([place]), values

    def apply(self, rows: Tensor, out: Tensor) -> None:
        """See :class:`CurvatureBlock`."""
        self.places.put(out, [self.places.take(rows)[0].double() * self.values])

    def function(self, f: Function, rows: Tensor, out: Tensor) -> None:
        """See :class:`CurvatureBlock`."""
        self.places.put(out, [self.places.take(rows)[0].double() * f(self.values)])

    @property
    def eigenvalues(self) -> Tensor:
        """See :class:`CurvatureBlock`."""
        return self.values

    @property
    def trace(self) -> float:
        """See :class:`CurvatureBlock`."""
        return float(self.values.sum())
