"""Golub–Kahan bidiagonalization of many matrices in lockstep: one pair of block products a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bidiagonals", "LockstepBidiagonalization"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bidiagonals:
    """The lower bidiagonal matrices L [R, m, m] of R runs, on the host in float64, with all their SVDs.

    A Vᵀ-side basis V and a U-side basis U obey Aᵀ U = V Lᵀ and A V = U L + β_{m+1} u_{m+1} e_mᵀ, so with L q = s p,
    Lᵀ p = s q the triplet (s, U p, V q) has Aᵀ(U p) = s V q exactly and ‖A(V q) − s U p‖ = β_{m+1} |q_m|.
    """

    lower: Tensor
    """L, [R, m, m]."""
    coupling: Tensor
    """β_{m+1}, [R]."""
    values: Tensor
    """s, descending, [R, m]."""
    weights: Tensor
    """p_1², [R, m]: Σ_j weights_j f(s_j²) is the Gauss quadrature of u_1ᵀ f(A Aᵀ) u_1."""
    residuals: Tensor
    """β_{m+1} |q_m|, [R, m]: a singular value of A lies within it of s."""

    def from_zero(self) -> tuple[Tensor, Tensor]:
        """Singular values and weights [R, m] of Gauss–Radau quadrature with one more node at 0.

        Its Jacobi matrix is B Bᵀ with the m + 1 rows of B = [L; β_{m+1} e_mᵀ], so nothing is squared. What the weights
        lack to 1 lies at 0: never less than the true weight there.
        """
        m = self.lower.shape[1]
        last = self.lower.new_zeros(len(self.lower), 1, m)
        last[:, 0, -1] = self.coupling
        left, values, _ = torch.linalg.svd(torch.cat([self.lower, last], 1), full_matrices=False)
        return values, left[:, 0].square()

    @property
    def captured(self) -> tuple[Tensor, Tensor]:
        """Tr QᵀCQ and ‖CQ‖_F² with C = A Aᵀ and Q the m basis vectors on the U side, [R] each."""
        gram = self.lower @ self.lower.mT
        last = self.coupling * self.lower[:, -1, -1]
        return self.lower.square().sum((1, 2)), gram.square().sum((1, 2)) + last.square()


class LockstepBidiagonalization:
    """u_1 = start/‖start‖, then A V_m = U_{m+1} B, Aᵀ U_m = V_m Lᵀ, for each row of ``start`` its own A.

    The basis on the U side is kept and orthogonalized against, twice, which keeps the other side orthogonal as well
    where A is not too ill-conditioned (one-sided reorthogonalization). A run whose Krylov space is exhausted goes on
    with zero vectors. Values come to the host in :meth:`bidiagonals` only.

    Args:
        pull: u ↦ Aᵀ u, rows [R, S] → [R, L].
        push: v ↦ A v, rows [R, L] → [R, S].
        start: [R, S], not zero.
        room: the most steps.

    Memory: R · room · S numbers for the basis and three rows of length L each.

    Source: Golub & Kahan, SIAM J. Numer. Anal. B 2 (1965); Simon & Zha, SIAM J. Sci. Comput. 21 (2000).
    """

    def __init__(self, pull: Product, push: Product, start: Tensor, room: int) -> None:
        self._pull, self._push = pull, push
        self._eps = torch.finfo(start.dtype).eps
        self._basis = start.new_zeros(len(start), room, start.shape[1])
        self._u = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
        self._scale = start.new_zeros(len(start))
        self._coupling: Tensor | None = None
        self._v: Tensor | None = None
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Steps made."""
        return len(self._alphas)

    @property
    def basis(self) -> Tensor:
        """u_1 … u_m of each run, [R, m, S]."""
        return self._basis[:, : self.steps]

    def step(self) -> None:
        """One product with Aᵀ and one with A for all runs."""
        m = self.steps
        self._basis[:, m] = self._u
        image = self._pull(self._u)
        if self._v is not None and self._coupling is not None:
            image = image - self._coupling[:, None] * self._v
        alpha = torch.linalg.vector_norm(image, dim=1)
        alpha, self._v = self._normalized(image, alpha)
        image = self._push(self._v) - alpha[:, None] * self._u
        seen = self._basis[:, : m + 1]
        for _ in range(2):
            image = image - torch.bmm(seen.mT, torch.bmm(seen, image[:, :, None]))[:, :, 0]
        beta = torch.linalg.vector_norm(image, dim=1)
        self._coupling, self._u = self._normalized(image, beta)
        self._alphas.append(alpha)
        self._betas.append(self._coupling)

    def _normalized(self, rows: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        self._scale = torch.maximum(self._scale, norms)
        alive = norms > 10 * self._eps * self._scale
        return torch.where(alive, norms, 0.0), rows * torch.where(alive, 1 / norms, 0.0)[:, None]

    def bidiagonals(self) -> Bidiagonals:
        """The matrices so far.

        Raises:
            FloatingPointError: products gave NaN or Inf.
        """
        table = torch.stack([*self._alphas, *self._betas], 1).double().cpu()
        if not bool(torch.isfinite(table).all()):
            raise FloatingPointError("model: products with its Jacobian are NaN or Inf; measure in float64")
        m = self.steps
        alphas, betas = table[:, :m], table[:, m:]
        lower = torch.diag_embed(alphas)
        if m > 1:
            lower = lower + torch.diag_embed(betas[:, :-1], offset=-1)
        left, values, right = torch.linalg.svd(lower)
        coupling = betas[:, -1]
        return Bidiagonals(
            lower=lower,
            coupling=coupling,
            values=values,
            weights=left[:, 0].square(),
            residuals=coupling[:, None] * right[:, :, -1].abs(),
        )
