"""The course of an eigenpair search: when to step, look, restart, ask again and stop."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.estimators.checkpoint import Checkpoint
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.restarted_lanczos import LanczosBasis

__all__ = ["Search", "Which", "ranking"]

Which = Literal["LA", "SA", "LM", "BE"]
_LOOK_EVERY = 4  # products between two looks at the projected matrix
_WIDEST = 8  # vectors a block grows to where multiple eigenvalues turn up


class Search:
    """Thick-restart Lanczos until the k wanted pairs have converged, and a fresh start finds no others.

    Everything that decides the further course is in the basis and in the fields here, so that a run taken up
    from :meth:`state` makes the same products in the same order.
    """

    def __init__(
        self, basis: LanczosBasis, k: int, which: Which, tol: float, *, verify: bool, adaptive: bool
    ) -> None:
        self.basis, self._k, self._which, self._tol = basis, k, which, tol
        self._verify, self._adaptive = verify, adaptive
        self.spent = 0
        self._unread = 0  # products since the last look
        self._confirmed: Tensor | None = None  # values that a fresh start is being asked about
        self.finished = self.verified = False

    def run(self, budget: int, checkpoint: Checkpoint, stop: Interruptible, bar: tqdm) -> None:
        """Go on until it is ``finished``, ``budget`` products are spent, or a stop is requested."""
        basis = self.basis
        while not self.finished:
            while self._unread < _LOOK_EVERY and not basis.full and self.spent + basis.pending <= budget:
                count = basis.pending
                basis.step()
                self.spent += count
                self._unread += count
                bar.update(count)
                if checkpoint.due():
                    checkpoint.save(**self.state())
                if stop.requested:
                    return
            if not self._decide(budget):
                return

    def _decide(self, budget: int) -> bool:
        """Look at the projected matrix and prepare what comes next; whether to go on."""
        basis, k = self.basis, self._k
        self._unread = 0
        if basis.look():
            self._widen()  # a direction that runs out is what multiple eigenvalues do
            basis.fill()
        values, coordinates, residuals = basis.ritz()
        order = ranking(values, self._which)
        wanted = order[:k]
        limit = self._tol * basis.scale
        done = len(values) >= k and bool((residuals[wanted] <= limit).all())
        if basis.complete:
            self.finished = self.verified = True
            return False
        confirming, full = self._confirmed is not None, basis.full
        if done and (full or not confirming):  # a round cut short has not looked properly
            found = values[wanted]
            same = self._confirmed is not None and bool((found - self._confirmed).abs().max() <= limit)
            self.finished, self.verified = same or not self._verify, same
            if self.finished:
                return False
            if confirming:
                self._widen()
            if self.spent + basis.block > budget:
                return False
            self._confirmed = found
            # only the pairs found are kept: what the old start vector led to would only lead there again
            basis.restart(found, coordinates[:, wanted], fresh=True)
        elif full:
            if confirming:
                self._confirmed = None
                self._widen()
            kept = min(k + max(1, (basis.size - k) // 2), len(basis.rows) - 2 * basis.block)
            basis.restart(values[order[:kept]], coordinates[:, order[:kept]], fresh=False)
        return self.spent + basis.pending <= budget

    def _widen(self) -> None:
        if self._adaptive:
            widest = max(1, min(_WIDEST, (self.basis.size - self._k) // 4))
            self.basis.block = min(2 * self.basis.block, widest)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """The wanted pairs as they stand: values [k], vectors as rows [k, P], and bounds on residuals."""
        if self._unread:
            self.basis.look()
            self._unread = 0
        values, coordinates, residuals = self.basis.ritz()
        wanted = ranking(values, self._which)[: self._k]
        if self._which == "BE":
            wanted = wanted.sort(descending=True).values
        vectors = self.basis.vectors(coordinates[:, wanted])
        vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        return values[wanted], vectors, residuals[wanted] + self.basis.dropped

    def state(self) -> dict[str, Tensor]:
        """What :meth:`resume` needs."""
        numbers = torch.tensor([self.spent, self._unread, self.finished, self.verified])
        none = torch.zeros(0, dtype=torch.float64)
        confirmed = none if self._confirmed is None else self._confirmed
        return {**self.basis.state(), "search": numbers, "confirmed": confirmed}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.basis.resume(state)
        self.spent, self._unread, finished, verified = state["search"].tolist()
        self.finished, self.verified = bool(finished), bool(verified)
        self._confirmed = state["confirmed"] if len(state["confirmed"]) else None


def ranking(values: Tensor, which: Which) -> Tensor:
    """Indices of ascending values, the most wanted first."""
    ascending = torch.arange(len(values))
    if which == "SA":
        return ascending
    if which == "LA":
        return ascending.flip(0)
    if which == "LM":
        return values.abs().sort(descending=True, stable=True).indices
    # both ends in turn, the upper one first
    return torch.stack([ascending.flip(0), ascending], dim=1).reshape(-1)[: len(values)]
