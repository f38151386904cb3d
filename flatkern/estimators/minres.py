"""MINRES for several right-hand sides in lockstep: one block product an iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flatkern.estimators.lanczos import row_dots
from flatkern.operators.base import LinearOperator

__all__ = ["MinRes"]

_BLOCKS = ("x", "residual", "_earlier", "_latest", "_image", "_w", "_w_earlier")
_NUMBERS = (
    "targets",
    "_beta",
    "_beta_earlier",
    "_dbar",
    "_epsilon",
    "_phi",
    "_cosine",
    "_sine",
    "_least",
    "_root",
    "scale",
)


class MinRes:
    """A x = b for rows and any symmetric A, from x with residual r = b − A x, both [k, P] and taken over.

    Of all x in the Krylov space the one with the smallest residual (in the preconditioner's norm). A row stops,
    on the device, when its recurrent residual reaches ``targets``, when its Krylov space is exhausted, or when
    ‖A r‖ / ‖A‖ ‖r‖ has been below 100 √eps and rises again: for a singular A and a b outside its range rounding
    allows no more, and x would only grow from there. Memory: 8 blocks of k vectors beside the product.

    Attributes:
        scale: [k], an estimate of ‖A‖ from below; in a later run on the same operator, what the earlier one saw.

    Source: Paige, Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer. Anal.
    12 (1975).
    """

    name = "minres"

    def __init__(
        self,
        op: LinearOperator,
        x: Tensor,
        residual: Tensor,
        targets: Tensor,
        precondition: Callable[[Tensor], Tensor] | None,
        scale: Tensor | float = 0.0,
    ) -> None:
        self._op, self._precondition = op, precondition
        self._eps = torch.finfo(op.dtype).eps
        self.x, self.residual, self.targets = x, residual, targets
        self._earlier, self._latest = torch.zeros_like(residual), residual.clone()
        self._image = self._preconditioned(self._latest)
        self._least = row_dots(self._latest, self._image)
        self._beta = self._least.clamp(min=0).sqrt()
        self._beta_earlier = torch.ones_like(self._beta)
        self._dbar, self._epsilon = torch.zeros_like(self._beta), torch.zeros_like(self._beta)
        self._phi = self._beta.clone()
        self._cosine, self._sine = -torch.ones_like(self._beta), torch.zeros_like(self._beta)
        self._w, self._w_earlier = torch.zeros_like(residual), torch.zeros_like(residual)
        self._active = (torch.linalg.vector_norm(residual, dim=1) > targets) & (self._beta > 0)
        self.scale = torch.zeros_like(self._beta) + scale
        self._root = torch.full_like(self._beta, float("inf"))
        self.iterations = 0

    def step(self) -> None:
        """One iteration of all rows."""
        inverse = torch.where(self._active, 1 / self._beta, 0.0)
        v = self._image * inverse[:, None]
        image = (self._op @ v.mT).mT
        image = torch.addcmul(image, self._earlier, (self._beta / self._beta_earlier)[:, None], value=-1)
        alpha = row_dots(v, image)
        image.addcmul_(self._latest, (alpha * inverse)[:, None], value=-1)
        self._earlier, self._latest = self._latest, image
        self._image = self._preconditioned(image)
        square = row_dots(image, self._image)
        self._least = torch.where(self._active, torch.minimum(self._least, square), self._least)
        beta = square.clamp(min=0).sqrt()
        # the next plane rotation of the tridiagonal matrix's QR factorization
        delta = self._cosine * self._dbar + self._sine * alpha
        gbar = self._sine * self._dbar - self._cosine * alpha
        epsilon, self._epsilon = self._epsilon, self._sine * beta
        self._dbar = -self._cosine * beta
        gamma = torch.hypot(gbar, beta)
        coupling = self._beta if self.iterations else torch.zeros_like(beta)  # the first one is ‖r‖
        row = torch.stack([alpha, beta, coupling])
        self.scale = torch.maximum(self.scale, torch.linalg.vector_norm(row, dim=0))
        root = torch.hypot(gbar, self._dbar)  # ‖A r‖ / ‖r‖ of the iterate before
        self._root = torch.minimum(self._root, root)
        passed = (self._root <= 100 * self._eps**0.5 * self.scale) & (root > 10 * self._root)
        usable = self._active & ~passed & ~(gamma <= self._eps * self.scale)
        invert = torch.where(usable, 1 / gamma, 0.0)
        self._cosine, self._sine = gbar * invert, beta * invert
        step = torch.where(usable, self._cosine * self._phi, 0.0)
        w = torch.addcmul(v, self._w_earlier, epsilon[:, None], value=-1)
        w.addcmul_(self._w, delta[:, None], value=-1).mul_(invert[:, None])
        self._w_earlier, self._w = self._w, w
        self.x.addcmul_(w, step[:, None])
        phi = self._sine * self._phi
        # r_k = s² r_{k−1} − φ c v_{k+1}
        along = torch.where(usable & (beta > 0), phi * self._cosine / beta, 0.0)
        shrink = torch.where(usable, self._sine.square(), 1.0)
        self.residual.mul_(shrink[:, None]).addcmul_(self._latest, along[:, None], value=-1)
        norms = torch.linalg.vector_norm(self.residual, dim=1)
        self._phi = torch.where(usable, phi, self._phi)
        self._beta_earlier = torch.where(self._active, self._beta, 1.0)
        self._active = usable & ~(norms <= self.targets) & ~(beta <= 10 * self._eps * self.scale)
        self._beta = torch.where(self._active, beta, 0.0)
        self.iterations += 1

    def look(self) -> Tensor:
        """For the host, [4, k]: active, recurrent residual, +∞, least rᵀ M r."""
        norms = torch.linalg.vector_norm(self.residual, dim=1)
        never = torch.full_like(norms, float("inf"))
        return torch.stack([self._active.to(norms), norms, never, self._least]).double().cpu()

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        for name in (*_BLOCKS, *_NUMBERS, "_active"):
            setattr(self, name, getattr(self, name)[rows])

    def state(self) -> dict[str, Tensor]:
        """All that the next iteration depends on."""
        state = {name.removeprefix("_"): getattr(self, name) for name in _BLOCKS}
        return state | {
            "numbers": torch.stack([getattr(self, name) for name in _NUMBERS]),
            "active": self._active,
        }

    def restore(self, state: Mapping[str, Tensor], iterations: int) -> None:
        """Take over what :meth:`state` gave."""
        numbers = state["numbers"].to(self.x).unbind()
        for name, value in zip(_NUMBERS, numbers, strict=True):
            setattr(self, name, value)
        for name in _BLOCKS:
            setattr(self, name, state[name.removeprefix("_")].to(self.x))
        self._active, self.iterations = state["active"].to(self.x.device), iterations

    def _preconditioned(self, rows: Tensor) -> Tensor:
        return rows if self._precondition is None else self._precondition(rows)
