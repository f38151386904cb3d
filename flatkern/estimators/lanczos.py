"""Lanczos runs of several start vectors in lockstep: one block product a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flatkern.estimators.common import NotSymmetricError, require_finite
from flatkern.estimators.quadrature import Tridiagonals
from flatkern.kernels import lanczos_step
from flatkern.operators.base import LinearOperator

__all__ = ["LockstepLanczos", "row_dots"]

_CHECKED_STEPS = 4
_CHECK_EVERY = 8
_SMALL, _TINY = 1 << 17, 1 << 11


class LockstepLanczos:
    """Lanczos on each row of ``start`` [k, P], unit vectors; :meth:`step` makes one block product.

    Memory: 3 k vectors, and k for each one kept. The three-term recurrence leaves components of rounding size
    along earlier vectors; one pass against all of them keeps the basis orthogonal to some eps, since nothing of
    the new vector's size is taken away. Against the first ones only, the directions that have converged by then
    stay out, and these are what grows back first. A run whose Krylov space is exhausted goes on with zero
    vectors. Nothing is looked at on the host before :meth:`tridiagonals`.

    Args:
        op: a symmetric operator.
        start: the start vectors, rows; orthogonal to ``outside``.
        keep: how many of its first vectors each run keeps and orthogonalizes against.
        chunk: vectors a run for which room is made at a time.
        outside: orthonormal rows [j, P] spanning an invariant subspace that the runs stay out of.
        what: the estimator's name, for messages.
    """

    def __init__(
        self,
        op: LinearOperator,
        start: Tensor,
        *,
        keep: int = 0,
        chunk: int = 16,
        outside: Tensor | None = None,
        what: str = "lanczos",
    ) -> None:
        self._op, self._what, self._outside = op, what, outside
        self._eps = torch.finfo(op.dtype).eps
        # two blocks change places; fresh temporaries of this size would cost more than the arithmetic
        self._previous, self._current = torch.zeros_like(start), start.clone()
        self._beta = torch.zeros(len(start), dtype=torch.float64, device=op.device)
        self._scale, self._off = torch.zeros_like(self._beta), torch.zeros_like(self._beta)
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []
        self._basis: list[Tensor] = []
        self._kept, self._chunk = keep, chunk

    @property
    def count(self) -> int:
        """k, the number of runs and of products a step."""
        return len(self._current)

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return len(self._alphas)

    def step(self) -> None:
        """One step of all runs."""
        current, previous = self._current, self._previous
        self._keep(self.steps, current)
        image = (self._op @ current.mT).mT
        checked = self.steps < _CHECKED_STEPS or self.steps % _CHECK_EVERY == 0
        coupling = row_dots(previous, image) if checked else self._beta
        # the residual takes the place of the vectors before the present ones
        residual, alpha, beta = lanczos_step(image, current, previous, self._beta, out=previous)
        if checked:
            # a residual of rounding size has no direction of its own, so a test on it would say nothing
            told = self._beta > self._eps**0.5 * self._scale
            gap = (coupling - self._beta).abs() / torch.maximum(self._scale, alpha.abs())
            self._off = torch.maximum(self._off, torch.where(told, gap, 0.0))
        if self._outside is not None:
            residual.addmm_(residual @ self._outside.mT, self._outside, alpha=-1)
        for block in self._filled(self.steps + 1):
            _project_out(block, residual)
        if self._outside is not None or self._kept:
            beta = torch.linalg.vector_norm(residual, dim=1, dtype=torch.float64)
        self._scale = torch.maximum(self._scale, torch.maximum(alpha.abs(), beta))
        alive = beta > 10 * self._eps * self._scale
        self._beta = torch.where(alive, beta, 0.0)
        self._alphas.append(alpha)
        self._betas.append(self._beta)
        residual.mul_(torch.where(alive, 1 / self._beta, 0.0)[:, None].to(residual.dtype))
        self._previous, self._current = current, residual

    def tridiagonals(self) -> Tridiagonals:
        """The Jacobi matrices so far; the one place where values come to the host.

        Raises:
            FloatingPointError: products gave NaN or Inf.
            NotSymmetricError: ⟨v_{j−1}, A v_j⟩ and ⟨v_j, A v_{j−1}⟩ disagree.
        """
        table = torch.stack([*self._alphas, *self._betas, self._off], dim=1).double().cpu()
        require_finite(table, self._what)
        m = self.steps
        if bool((table[:, -1] > (5e-2 if self._eps > 1e-10 else 1e-5)).any()):
            raise NotSymmetricError("op: it is not symmetric (products from the left and the right disagree)")
        return Tridiagonals.of_runs(table[:, :m], table[:, m : 2 * m])

    # -- going on in another process ---------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        state = {
            "previous": self._previous,
            "current": self._current,
            "vectors": torch.stack([self._beta, self._scale, self._off]),
            "alphas": torch.stack(self._alphas),
            "betas": torch.stack(self._betas),
        }
        if self._basis:
            state["basis"] = torch.cat(self._filled(self.steps), dim=1)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave; memory is laid out as if the steps had been made here."""
        self._previous.copy_(state["previous"])
        self._beta, self._scale, self._off = state["vectors"].to(self._beta).unbind()
        for j, vectors in enumerate(state["basis"].unbind(1) if "basis" in state else ()):
            self._keep(j, vectors.to(self._current))
        self._alphas = list(state["alphas"].to(self._beta).unbind())
        self._betas = list(state["betas"].to(self._beta).unbind())
        self._current.copy_(state["current"])

    def _keep(self, index: int, vectors: Tensor) -> None:
        if index >= self._kept:
            return
        block, place = divmod(index, self._chunk)
        if block == len(self._basis):
            room = min(self._chunk, self._kept - index)
            self._basis.append(vectors.new_empty(len(vectors), room, vectors.shape[1]))
        self._basis[block][:, place] = vectors

    def _filled(self, count: int) -> list[Tensor]:
        """What is kept of each run's first ``count`` vectors, in blocks [k, ≤ chunk, P]."""
        starts = range(0, min(count, self._kept), self._chunk)
        return [self._basis[i][:, : count - start] for i, start in enumerate(starts)]


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Row by row inner products [k]."""
    if left.is_cuda:
        return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]
    if left.numel() <= _SMALL:
        return (left * right).sum(1)
    # a table of the products would cost more than launching k times
    return torch.stack([torch.dot(a, b) for a, b in zip(left, right, strict=True)])


def _project_out(basis: Tensor, rows: Tensor) -> None:
    """Subtract from each of k rows [k, P] its components along that row's orthonormal basis, [k, c, P]; in place."""
    if rows.is_cuda or rows.numel() <= _TINY:
        column = rows[:, :, None]
        column.baddbmm_(basis.mT, torch.bmm(basis, column), alpha=-1)
        return
    # batched products of thin matrices are several times slower than these on the CPU
    for seen, vector in zip(basis, rows, strict=True):
        vector.addmv_(seen.mT, torch.mv(seen, vector), alpha=-1)
