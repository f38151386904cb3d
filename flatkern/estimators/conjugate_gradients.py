"""Conjugate gradients for several right-hand sides in lockstep: one block product an iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flatkern.estimators.lanczos import row_dots
from flatkern.operators.base import LinearOperator

__all__ = ["ConjugateGradients"]


class ConjugateGradients:
    """A x = b for rows, from x with residual r = b − A x, both [k, P] and taken over.

    A row stops, on the device, when its recurrent residual reaches ``targets`` or when a direction p with
    pᵀ A p ≤ 0 shows that A is not positive definite; its x is then that of the iteration before. Memory: 4
    blocks of k vectors beside the product.

    Source: Hestenes, Stiefel, J. Res. Nat. Bur. Standards 49 (1952).
    """

    name = "cg"

    def __init__(
        self,
        op: LinearOperator,
        x: Tensor,
        residual: Tensor,
        targets: Tensor,
        precondition: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._op, self._precondition = op, precondition
        self.x, self.residual, self.targets = x, residual, targets
        image = self._preconditioned()
        self._direction = image.clone()
        self._product = row_dots(residual, image)
        self._active = (torch.linalg.vector_norm(residual, dim=1) > targets) & (self._product > 0)
        self._curvature = torch.full_like(self._product, float("inf"))
        self._least = self._product.clone()
        self.iterations = 0

    def step(self) -> None:
        """One iteration of all rows."""
        p = self._direction
        image = (self._op @ p.mT).mT
        curvature = row_dots(p, image)
        seen = self._active & (curvature <= 0)
        quotient = curvature / row_dots(p, p)
        self._curvature = torch.where(seen, quotient, self._curvature)
        self._active = self._active & ~seen
        step = torch.where(self._active, self._product / curvature, 0.0)[:, None]
        self.x.addcmul_(p, step)
        self.residual.addcmul_(image, step, value=-1)
        image = self._preconditioned()
        product = row_dots(self.residual, image)
        self._least = torch.where(self._active, torch.minimum(self._least, product), self._least)
        norms = torch.linalg.vector_norm(self.residual, dim=1)
        grow = torch.where(self._active, product / self._product, 0.0)[:, None]
        self._active = self._active & ~(norms <= self.targets) & ~(product <= 0)
        p.mul_(grow).add_(image)
        self._product = product
        self.iterations += 1

    def look(self) -> Tensor:
        """For the host, [4, k]: active, recurrent residual, curvature that stopped a row, least rᵀ M r."""
        norms = torch.linalg.vector_norm(self.residual, dim=1)
        return torch.stack([self._active.to(norms), norms, self._curvature, self._least]).double().cpu()

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        for name in ("x", "residual", "targets", "_direction", "_product", "_active", "_curvature", "_least"):
            setattr(self, name, getattr(self, name)[rows])

    def state(self) -> dict[str, Tensor]:
        """All that the next iteration depends on."""
        return {
            "x": self.x,
            "residual": self.residual,
            "direction": self._direction,
            "numbers": torch.stack([self.targets, self._product, self._curvature, self._least]),
            "active": self._active,
        }

    def restore(self, state: Mapping[str, Tensor], iterations: int) -> None:
        """Take over what :meth:`state` gave."""
        self.x, self.residual = state["x"].to(self.x), state["residual"].to(self.x)
        self._direction = state["direction"].to(self.x)
        self.targets, self._product, self._curvature, self._least = state["numbers"].to(self.x).unbind()
        self._active, self.iterations = state["active"].to(self.x.device), iterations

    def _preconditioned(self) -> Tensor:
        return self.residual if self._precondition is None else self._precondition(self.residual)
