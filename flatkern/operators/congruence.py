"""Cᵀ A C of a square operator: a curvature matrix in rescaled or otherwise changed parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from flatkern.operators.algebra import Composed
from flatkern.operators.base import LinearOperator
from flatkern.operators.identity import digest

__all__ = ["Congruence", "Mixing", "Scaling"]


class Scaling(LinearOperator):
    """diag(s) [P, P] of a vector s [P]."""

    def __init__(self, scales: Tensor) -> None:
        size = len(scales)
        super().__init__((size, size), scales.dtype, scales.device, symmetric=True)
        self._scales = scales

    def _identity(self) -> str | None:
        return digest("scaling", self._scales)

    def _rows(self, rows: Tensor) -> Tensor:
        return rows * self._scales


class Mixing(LinearOperator):
    """L ⊗ I: matrices U [m, d] → L U [C, d], both flattened row by row; L [C, m].

    ``transposed``: Uᵀ [d, m] → (L U)ᵀ [d, C] instead, for weights that are kept as [in, out].
    """

    def __init__(self, factor: Tensor, columns: int, *, transposed: bool = False) -> None:
        out, inner = factor.shape
        super().__init__((out * columns, inner * columns), factor.dtype, factor.device)
        self._factor, self._columns, self._transposed = factor, columns, transposed

    def _identity(self) -> str | None:
        return digest("mixing", self._factor, self._columns, self._transposed)

    def _rows(self, rows: Tensor) -> Tensor:
        return self._mixed(rows, self._factor)

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self._mixed(rows, self._factor.mT)

    def _mixed(self, rows: Tensor, factor: Tensor) -> Tensor:
        if self._transposed:
            return (rows.reshape(len(rows), self._columns, -1) @ factor.mT).flatten(1)
        return (factor @ rows.reshape(len(rows), -1, self._columns)).flatten(1)


class Congruence(Composed):
    """Cᵀ A C; one product with each of the three."""

    def __init__(self, base: LinearOperator, change: LinearOperator) -> None:
        base._check_square("congruence")
        if base.shape[1] != change.shape[0]:
            raise ValueError(f"congruence: shapes {base.shape} and {change.shape} do not chain")
        size = change.shape[1]
        super().__init__((size, size), base.dtype, base.device, symmetric=base.symmetric)
        self.base, self.change = base, change
        self.semidefinite = base.semidefinite

    def _parts(self) -> tuple[LinearOperator, ...]:
        return (self.base, self.change)

    def _rows(self, rows: Tensor) -> Tensor:
        return self._through(rows, adjoint=False)

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self._through(rows, adjoint=True)

    def _through(self, rows: Tensor, *, adjoint: bool) -> Tensor:
        with torch.no_grad():
            changed = self.change._rows(rows)
            image = self.base._adjoint_rows(changed) if adjoint else self.base._rows(changed)
            return self.change._adjoint_rows(image)
