"""A Lanczos basis of bounded size with full re-orthogonalization and thick restarts."""

from __future__ import annotations

import torch
from torch import Tensor

from flatkern.estimators.common import NotSymmetricError, gaussian
from flatkern.operators.base import LinearOperator

__all__ = ["LanczosBasis"]

_COLUMNS = 1 << 18  # columns rotated at a time, so that a restart needs no second basis


class LanczosBasis:
    """Orthonormal rows V [m + 1, P] in one tensor, and the projection T = V A Vᵀ, measured entry by entry.

    A V_jᵀ = V_jᵀ T_j + β v_{j+1} e_jᵀ after j steps. Re-orthogonalization is two passes (twice is enough) of
    two matrix-vector products each. T is kept on the host in float64: one synchronization a step.

    Source: Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
    Anal. Appl. 22 (2000).
    """

    def __init__(self, op: LinearOperator, size: int, generator: torch.Generator) -> None:
        self._op, self._generator = op, generator
        self._eps = torch.finfo(op.dtype).eps
        self.size = size
        self.rows = torch.empty(size + 1, op.shape[0], dtype=op.dtype, device=op.device)
        self.projected = torch.zeros(size, size, dtype=torch.float64)
        self.known = 0  # vectors whose column of T is measured
        self.beta = 0.0  # coupling of the last of them to the next vector
        self.scale = 0.0  # largest Ritz value or entry seen: an estimate of ‖A‖ from below
        self._dropped = 0.0  # residual norms of the pairs whose couplings were cut by fresh starts
        self._random_row(0)

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space, so that T holds the whole spectrum."""
        return self.known == self._op.shape[0]

    def step(self) -> None:
        """One product with A, and one more basis vector."""
        j = self.known
        image = self._op @ self.rows[j]
        coefficients, image = self._orthogonalize(image, j + 1)
        numbers = torch.cat([coefficients, torch.linalg.vector_norm(image)[None]]).double().cpu()
        if not bool(torch.isfinite(numbers).all()):
            raise FloatingPointError(
                "eigsh: products with op gave NaN or Inf; look at the weights and the data"
            )
        column, beta = numbers[:-1], float(numbers[-1])
        self.scale = max(self.scale, float(column.abs().max()), beta)
        self._check_symmetry(column, j)
        self.projected[: j + 1, j] = column
        self.projected[j, : j + 1] = column
        self.known = j + 1
        if self.complete:
            self.beta = 0.0
            return
        # an invariant subspace is exhausted: go on with a random vector outside it, e.g. for multiple
        # eigenvalues
        if beta <= 10 * self._eps * self.scale:
            self.beta = 0.0
            self._random_row(j + 1)
        else:
            self.beta = beta
            torch.div(image, beta, out=self.rows[j + 1])
        if j + 1 < self.size:
            self.projected[j, j + 1] = self.projected[j + 1, j] = self.beta

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values [j] ascending, coordinates [j, j] as columns, residual norms [j] as T has them."""
        values, coordinates = torch.linalg.eigh(self.projected[: self.known, : self.known])
        self.scale = max(self.scale, float(values.abs().max()))
        return values, coordinates, self.beta * coordinates[-1].abs()

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Ritz vectors as rows [k, P] from coordinates [j, k]."""
        return coordinates.mT.to(self.rows) @ self.rows[: self.known]

    def restart(self, values: Tensor, coordinates: Tensor, *, fresh: bool) -> None:
        """Keep the Ritz vectors of the given values [p] and coordinates [j, p].

        Goes on with the last residual direction, or (``fresh``) with a random vector: that one sees what the
        old start vector did not.
        """
        kept, j = len(values), self.known
        rotation = coordinates.mT.to(self.rows)
        for start in range(0, self.rows.shape[1], _COLUMNS):
            block = self.rows[:, start : start + _COLUMNS]
            block[:kept] = rotation @ block[:j]
        coupling = self.beta * coordinates[-1]
        if fresh:
            self._dropped += float(coupling.norm())
            coupling = torch.zeros_like(coupling)
        self.projected.zero_()
        self.projected[range(kept), range(kept)] = values
        if kept < self.size:
            self.projected[kept, :kept] = self.projected[:kept, kept] = coupling
        if fresh:
            self._random_row(kept)
        else:
            self.rows[kept].copy_(self.rows[j])
        self.known = kept

    def _orthogonalize(self, vector: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Coefficients on the first ``count`` rows and what is left: two passes."""
        basis = self.rows[:count]
        first = torch.mv(basis, vector)
        vector = torch.addmv(
            vector, basis.mT, first, alpha=-1
        )  # a new tensor: the operator's result is its own
        second = torch.mv(basis, vector)
        return first + second, vector.addmv_(basis.mT, second, alpha=-1)

    def _random_row(self, index: int) -> None:
        vector = gaussian(1, self._op, self._generator)[0]
        for _ in range(2):  # a second time, as almost nothing may be left of the first in a nearly full space
            if index:
                _, vector = self._orthogonalize(vector, index)
            vector = vector / torch.linalg.vector_norm(vector)
        self.rows[index].copy_(vector)

    def _check_symmetry(self, column: Tensor, j: int) -> None:
        # T[i, j] was measured from A v_i already; here it is measured from A v_j
        expected = self.projected[:j, j]
        off = float((column[:j] - expected).abs().max()) if j else 0.0
        if off > (5e-2 if self._eps > 1e-10 else 1e-5) * self.scale + 2 * self._dropped:
            raise NotSymmetricError(
                f"op: it is not symmetric (two measurements of one projected entry differ by {off:.2g}, at a "
                f"scale of {self.scale:.2g}); eigsh needs A = Aᵀ"
            )
