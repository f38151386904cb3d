"""The base of all linear operators: what ``@`` means, and the algebra's entry points."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flatkern.problem import Layout

if TYPE_CHECKING:
    from flatkern.operators.algebra import Identity
    from flatkern.operators.blocks import Block, BlockDiagonal

__all__ = ["LinearOperator"]


class LinearOperator:
    """A linear map [Q, P] known by its products.

    Outside, several vectors are columns: ``A @ V`` maps [P, k] to [Q, k]. Storage is rows [k, P]; the ``.mT``
    of a contiguous [k, P] is read without a copy, and the result is again the ``.mT`` of contiguous rows.

    A subclass sets ``shape``, ``dtype`` and ``device`` through ``__init__`` and implements :meth:`_rows` (and
    :meth:`_adjoint_rows` unless it is symmetric). Products never track gradients.

    Attributes:
        shape: (Q, P).
        dtype: dtype of the vectors it takes and gives; nothing is converted silently.
        device: where they live.
        symmetric: whether A = Aᵀ is known, so that ``A.T`` is ``A``.
        semidefinite: whether A is known to be symmetric and positive semi-definite.
        layout: where each parameter lies in a vector, for operators in parameter space; else ``None``.
    """

    # NumPy must leave `array @ op` and `np.float64(2) * op` to the methods here instead of looping over
    # entries
    __array_ufunc__ = None
    semidefinite: bool = False

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        symmetric: bool = False,
        layout: Layout | None = None,
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = dtype
        self.device = torch.device(device)
        self.symmetric = symmetric
        self.layout = layout

    # -- to implement ------------------------------------------------------------------------------
    def _rows(self, rows: Tensor) -> Tensor:
        """Vectors as rows [k, P] → their images as rows [k, Q]."""
        raise NotImplementedError

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        """Vectors as rows [k, Q] → their images under the transpose as rows [k, P]."""
        if self.symmetric:
            return self._rows(rows)
        raise NotImplementedError(f"{type(self).__name__} has no product with its transpose")

    # -- products ----------------------------------------------------------------------------------
    def __matmul__(self, other: Any) -> Any:
        """``A @ v`` [P] → [Q]; ``A @ V`` [P, k] → [Q, k]; ``A @ B`` with another operator → their product.

        Raises:
            TypeError: not a tensor or an operator, or another dtype than the operator's.
            ValueError: wrong length or device.
        """
        if isinstance(other, LinearOperator):
            from flatkern.operators.algebra import Product

            return Product(self, other)
        self._check_vectors(other)
        with torch.no_grad():
            if other.ndim == 1:
                return self._rows(other.detach()[None])[0]
            return self._rows(other.detach().mT).mT

    def __rmatmul__(self, other: Any) -> Any:
        """``v @ A`` [Q] → [P] and ``V @ A`` [k, Q] → [k, P], through the transpose."""
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.T @ other if other.ndim == 1 else (self.T @ other.mT).mT

    def _check_vectors(self, v: Any) -> None:
        size = self.shape[1]
        if not isinstance(v, Tensor):
            hint = "; use torch.from_numpy(...) or op.to_scipy()" if isinstance(v, np.ndarray) else ""
            raise TypeError(f"v: expected a tensor [{size}] or [{size}, k], got {type(v).__name__}{hint}")
        if v.ndim not in (1, 2) or v.shape[0] != size:
            raise ValueError(
                f"v: expected shape [{size}] or [{size}, k] (vectors are columns), got {list(v.shape)}"
            )
        if v.dtype != self.dtype:
            raise TypeError(
                f"v: dtype {v.dtype} differs from the operator's {self.dtype}; convert with v.to(op.dtype)"
            )
        if v.device != self.device:
            raise ValueError(
                f"v: it is on {v.device} and the operator on {self.device}; convert with v.to(op.device)"
            )

    # -- algebra -----------------------------------------------------------------------------------
    @property
    def T(self) -> LinearOperator:
        """The transpose (the operator itself where it is symmetric)."""
        if self.symmetric:
            return self
        from flatkern.operators.algebra import Adjoint

        return Adjoint(self)

    def adjoint(self) -> LinearOperator:
        """The transpose; all operators here are real."""
        return self.T

    def eye(self) -> Identity:
        """The identity of the operator's size, dtype and device; for square operators."""
        from flatkern.operators.algebra import Identity

        self._check_square("eye")
        return Identity(self.shape[0], self.dtype, self.device, layout=self.layout)

    def shift(self, delta: float) -> LinearOperator:
        """A + δ I, for square operators; one vector operation beyond a product with A."""
        self._check_square("shift")
        return self + _as_scalar(delta, "delta") * self.eye()

    def __add__(self, other: Any) -> LinearOperator:
        """The sum of two operators of one shape; a bare scalar raises, as it could mean δ I or δ 1 1ᵀ."""
        from flatkern.operators.algebra import Sum

        if _is_scalar(other):
            raise TypeError("op + scalar is ambiguous; write op.shift(delta) or op + delta * op.eye()")
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __radd__(self, other: Any) -> LinearOperator:
        """``scalar + A`` raises, as ``A + scalar`` does."""
        return self.__add__(other)

    def __sub__(self, other: Any) -> LinearOperator:
        """The difference of two operators of one shape; a bare scalar raises."""
        return self + (-other)

    def __rsub__(self, other: Any) -> LinearOperator:
        """``scalar − A`` raises, as ``A + scalar`` does."""
        return (-self).__add__(other)

    def __mul__(self, other: Any) -> LinearOperator:
        """A scalar multiple; products of operators and with vectors are ``@``."""
        from flatkern.operators.algebra import Scaled

        return Scaled(self, _as_scalar(other, "factor")) if _is_scalar(other) else NotImplemented

    def __rmul__(self, other: Any) -> LinearOperator:
        """A scalar multiple."""
        return self.__mul__(other)

    def __truediv__(self, other: Any) -> LinearOperator:
        """A divided by a scalar."""
        return self * (1.0 / _as_scalar(other, "divisor")) if _is_scalar(other) else NotImplemented

    def __neg__(self) -> LinearOperator:
        """−A."""
        return self * -1.0

    # -- parts in parameter space ------------------------------------------------------------------
    def block(self, names: str | Sequence[str]) -> Block:
        """The principal block on some parameters: names, globs or a list of them, in the layout's order.

        It is an operator with a ``layout`` of its own, and shares kept graphs with this one. A curvature
        operator then differentiates in these parameters only.

        Raises:
            ValueError: no layout, not square, or a name that matches nothing.
        """
        from flatkern.operators.blocks import Block

        return Block(self, names)

    def block_diagonal(self, groups: Mapping[str, str | Sequence[str]] | None = None) -> BlockDiagonal:
        """This operator with everything between groups of parameters set to zero.

        ``groups``: name of a group → names or globs; disjoint. Default: one group a layer (a module that owns
        parameters). Parameters in no group have zero rows and columns. Cost: one product a block.
        """
        from flatkern.operators.blocks import BlockDiagonal

        return BlockDiagonal(self, groups)

    def _block_rows(self, rows: Tensor, names: Sequence[str]) -> Tensor:
        """Rows [k, |block|] → their images under the principal block; here by embedding in zeros."""
        layout = self.layout
        assert layout is not None
        columns = torch.cat([torch.arange(s.start, s.stop) for s in (layout.slices[n] for n in names)])
        columns = columns.to(self.device)
        full = rows.new_zeros(len(rows), self.shape[1])
        full[:, columns] = rows
        return self._rows(full)[:, columns]

    # -- recognising it in another process ---------------------------------------------------------
    def _identity(self) -> str | None:
        """A digest of what determines the products (weights, data, entries); ``None``: not known."""
        return None

    def _engine(self) -> dict[str, Any]:
        """What was chosen by timing and decides rounding, as plain values."""
        return {}

    def _use_engine(self, state: Mapping[str, Any]) -> None:
        """Take over choices made earlier (see :meth:`_engine`), so that products round alike."""

    def _expect(self, products: int) -> None:
        """So many products are coming: what is tried after some of them may be tried at once."""

    def _freeze_engine(self) -> None:
        """Choose no other way of doing products from now on; :meth:`_use_engine` with an earlier state undoes it."""

    # -- export ------------------------------------------------------------------------------------
    def to_dense(self, *, max_size: int = 8192, block_size: int = 64) -> Tensor:
        """The matrix [Q, P] itself, from P products in blocks; for small operators and tests.

        Raises:
            ValueError: Q or P exceeds ``max_size``.
        """
        if max(self.shape) > max_size:
            raise ValueError(
                f"to_dense: shape {self.shape} exceeds max_size={max_size}; raise it if you mean it"
            )
        rows, columns = self.shape
        dense = torch.empty(columns, rows, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            for start in range(0, columns, block_size):
                stop = min(start + block_size, columns)
                units = torch.zeros(stop - start, columns, dtype=self.dtype, device=self.device)
                units[:, start:stop].fill_diagonal_(1.0)
                dense[start:stop] = self._rows(units)
        return dense.mT

    def to_scipy(self) -> Any:
        """As a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays (copied to and from the device)."""
        import scipy.sparse.linalg

        def apply(op: LinearOperator, array: Any) -> Any:
            array = np.asarray(array).reshape(op.shape[1], -1) if np.ndim(array) == 1 else np.asarray(array)
            out = op @ torch.from_numpy(np.ascontiguousarray(array)).to(op.device, op.dtype)
            return out.cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        make: Any = scipy.sparse.linalg.LinearOperator  # its constructor is a factory that stubs do not know
        return make(
            shape=self.shape,
            dtype=numpy_dtype,
            matvec=lambda v: apply(self, v)[:, 0],
            matmat=lambda v: apply(self, v),
            rmatvec=lambda v: apply(self.T, v)[:, 0],
            rmatmat=lambda v: apply(self.T, v),
        )

    def _check_square(self, what: str) -> None:
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"{what}: the operator is {self.shape[0]} by {self.shape[1]}, not square")

    def __repr__(self) -> str:
        """Class, shape, dtype and device."""
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0)


def _as_scalar(value: Any, name: str) -> float:
    if not _is_scalar(value):
        raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"{name}: {number} is not finite")
    return number
