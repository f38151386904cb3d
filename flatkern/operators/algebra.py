"""Sums, multiples, products, transposes and identities of linear operators; nothing is ever formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatkern.operators.base import LinearOperator
from flatkern.operators.identity import digest
from flatkern.problem import Layout

__all__ = ["Adjoint", "Composed", "Identity", "Product", "Scaled", "Sum"]


def _check_kin(left: LinearOperator, right: LinearOperator, what: str) -> None:
    if left.dtype != right.dtype:
        raise TypeError(f"{what}: the operators have dtypes {left.dtype} and {right.dtype}")
    if left.device != right.device:
        raise ValueError(f"{what}: the operators are on {left.device} and {right.device}")


class Composed(LinearOperator):
    """An operator made of others: its identity and engine are theirs."""

    def _parts(self) -> tuple[LinearOperator, ...]:
        raise NotImplementedError

    def _settings(self) -> tuple[Any, ...]:
        return ()

    def _identity(self) -> str | None:
        parts = [part._identity() for part in self._parts()]
        return None if None in parts else digest(type(self).__name__, self._settings(), parts)

    def _engine(self) -> dict[str, Any]:
        return {str(i): part._engine() for i, part in enumerate(self._parts())}

    def _expect(self, products: int) -> None:
        for part in self._parts():
            part._expect(products)

    def _freeze_engine(self) -> None:
        for part in self._parts():
            part._freeze_engine()

    def _use_engine(self, state: Mapping[str, Any]) -> None:
        for i, part in enumerate(self._parts()):
            part._use_engine(state.get(str(i), {}))


class Identity(LinearOperator):
    """I [P, P]."""

    semidefinite = True

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        layout: Layout | None = None,
    ) -> None:
        super().__init__((size, size), dtype, device, symmetric=True, layout=layout)

    def _identity(self) -> str | None:
        return digest("identity", self.shape, str(self.dtype))

    def _rows(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def _block_rows(self, rows: Tensor, names: Sequence[str]) -> Tensor:
        return rows.clone()


class Scaled(Composed):
    """c A; one scaling beyond a product with A."""

    def __init__(self, base: LinearOperator, factor: float) -> None:
        super().__init__(base.shape, base.dtype, base.device, symmetric=base.symmetric, layout=base.layout)
        self.base, self.factor = base, factor
        self.semidefinite = base.semidefinite and factor >= 0

    def _parts(self) -> tuple[LinearOperator, ...]:
        return (self.base,)

    def _settings(self) -> tuple[Any, ...]:
        return (self.factor,)

    def _rows(self, rows: Tensor) -> Tensor:
        return self.base._rows(rows) * self.factor

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self.base._adjoint_rows(rows) * self.factor

    def _block_rows(self, rows: Tensor, names: Sequence[str]) -> Tensor:
        return self.base._block_rows(rows, names) * self.factor


class Sum(Composed):
    """A + B; one product with each."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.shape != right.shape:
            raise ValueError(f"sum: the operators have shapes {left.shape} and {right.shape}")
        _check_kin(left, right, "sum")
        both = left.symmetric and right.symmetric
        super().__init__(
            left.shape, left.dtype, left.device, symmetric=both, layout=left.layout or right.layout
        )
        self.semidefinite = left.semidefinite and right.semidefinite
        self.left, self.right = left, right

    def _parts(self) -> tuple[LinearOperator, ...]:
        return (self.left, self.right)

    def _rows(self, rows: Tensor) -> Tensor:
        return _add(self.left._rows(rows), self.right, rows)

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self.left._adjoint_rows(rows) + self.right._adjoint_rows(rows)

    def _block_rows(self, rows: Tensor, names: Sequence[str]) -> Tensor:
        left, right = self.left.layout, self.right.layout
        if left is None or right is None or left.slices != right.slices:
            return super()._block_rows(rows, names)
        return self.left._block_rows(rows, names) + self.right._block_rows(rows, names)


def _add(image: Tensor, term: LinearOperator, rows: Tensor) -> Tensor:
    # a shift costs one pass over the vectors, with no temporary for δ v
    if isinstance(term, Scaled) and isinstance(term.base, Identity):
        return torch.add(image, rows, alpha=term.factor)
    return image + (rows if isinstance(term, Identity) else term._rows(rows))


class Product(Composed):
    """A B: first B, then A. Not known to be symmetric even where A and B are."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"product: shapes {left.shape} and {right.shape} do not chain")
        _check_kin(left, right, "product")
        super().__init__((left.shape[0], right.shape[1]), left.dtype, left.device, layout=right.layout)
        self.left, self.right = left, right

    def _parts(self) -> tuple[LinearOperator, ...]:
        return (self.left, self.right)

    def _rows(self, rows: Tensor) -> Tensor:
        return self.left._rows(self.right._rows(rows))

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self.right._adjoint_rows(self.left._adjoint_rows(rows))


class Adjoint(Composed):
    """Aᵀ."""

    def __init__(self, base: LinearOperator) -> None:
        # the layout belongs to the domain; the transpose of a rectangular operator has another one
        layout = base.layout if base.shape[0] == base.shape[1] else None
        super().__init__((base.shape[1], base.shape[0]), base.dtype, base.device, layout=layout)
        self.base = base

    def _parts(self) -> tuple[LinearOperator, ...]:
        return (self.base,)

    @property
    def T(self) -> LinearOperator:
        """The operator this is the transpose of."""
        return self.base

    def _rows(self, rows: Tensor) -> Tensor:
        return self.base._adjoint_rows(rows)

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self.base._rows(rows)
