"""Cycles of an iterative method, each ended by residuals measured with products of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.estimators.checkpoint import Checkpoint
from flatkern.estimators.common import NotDefiniteError, require_finite
from flatkern.estimators.conjugate_gradients import ConjugateGradients
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.minres import MinRes
from flatkern.operators.base import LinearOperator

__all__ = ["Method", "Rows", "Solver"]

LOOK_EVERY = 10
"""Iterations between two looks at the device's flags."""
AIM = 0.9
"""Recurrent residual aimed at, relative to the tolerance that the true one must meet."""

Method = Literal["auto", "cg", "minres"]
Rows = Callable[[Tensor], Tensor]


class Solver:
    """The state of :func:`flatkern.estimators.solve`, columns of B as rows [k, P]."""

    def __init__(
        self,
        op: LinearOperator,
        right: Tensor,
        guess: Tensor | None,
        tol: float,
        method: Method,
        budget: int,
        precondition: Rows | None,
        file: Checkpoint,
        bar: tqdm,
    ) -> None:
        self._op, self._right, self._tol, self._budget = op, right, tol, budget
        self._precondition, self._file, self._bar = precondition, file, bar
        self._auto = method == "auto"
        self._minres = method == "minres"
        self._started = guess is not None  # whether x may differ from 0
        self.x = torch.zeros_like(right) if guess is None else guess.clone()
        self._norms = torch.linalg.vector_norm(right, dim=1)
        self.x[self._norms == 0] = 0.0
        self._norms_host = require_finite(self._norms.double().cpu(), "solve: B")
        self.residuals = torch.full((len(right),), float("inf"), dtype=torch.float64)
        self._open = torch.arange(len(right))  # columns still worked on
        self._scale = torch.zeros((), dtype=op.dtype, device=op.device)  # ‖A‖ as MINRES has seen it
        self.matvecs, self.iterations = 0, 0
        self._curvature, self._switched = (
            0.0,
            0,
        )  # what made conjugate gradients stop, after how many iterations
        self._interrupted = self._finished = self._spent = False
        self._cycle: ConjugateGradients | MinRes | None = None
        self._columns = self._open
        if file.state is not None:
            self._restore(file.state)
            file.state = None

    @property
    def method_name(self) -> str:
        """Which methods were used."""
        if self._switched:
            return "cg, then minres"
        return "minres" if self._minres else "cg"

    def notes(self, converged: bool) -> tuple[str, ...]:
        """What the caller should know."""
        notes = []
        if self._switched:
            notes.append(
                f"a direction of curvature {self._curvature:.3g} showed after {self._switched} iterations: op is not "
                "positive definite, MINRES went on from there"
            )
        if self._interrupted:
            notes.append(f"interrupted after {self.iterations} iterations")
        elif not converged:
            full = self.matvecs + 3 * len(self._open) > self._budget
            why = (
                "max_matvecs reached"
                if full
                else "rounding, or a singular operator, allows no smaller residual"
            )
            notes.append(f"{why}; largest relative residual {float(self.residuals.max()):.3g}")
        return tuple(notes)

    def run(self) -> None:
        """Until all columns are done, or cannot get better, or the budget is spent."""
        if self._finished:
            return
        with Interruptible() as stop:
            while self._cycle is not None or self._begin():
                self._iterate(stop)
                self._interrupted = stop.requested
        self._finished = True
        if not self._interrupted:
            self._save()

    def _begin(self) -> bool:
        """Measure the residuals of the open columns; whether there is more to do."""
        rows = self._open
        x, b = self.x[rows], self._right[rows]
        residual = b.clone()
        if self._started:
            residual -= (self._op @ x.mT).mT
            self._count(len(rows))
        self._started = True
        measured = require_finite(torch.linalg.vector_norm(residual, dim=1).double().cpu(), "solve")
        norms = self._norms_host[rows]
        relative = torch.where(norms > 0, measured / norms.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        # a cycle that the budget cut short says nothing about what is possible
        going = (relative > self._tol) & ((relative <= 0.5 * self.residuals[rows]) | self._spent)
        self.residuals[rows] = relative
        if self._switched and self.iterations == self._switched:
            going = relative > self._tol  # the other method starts here, whatever this one reached
        self._open = rows[going]
        self._spent = len(self._open) > 0 and self.matvecs + 2 * len(self._open) > self._budget
        if self._interrupted or self._spent or not len(self._open):
            return False
        self._columns = self._open
        x, residual, targets = x[going], residual[going], AIM * self._tol * self._norms[self._open]
        if self._minres:
            self._cycle = MinRes(self._op, x, residual, targets, self._precondition, self._scale)
        else:
            self._cycle = ConjugateGradients(self._op, x, residual, targets, self._precondition)
        return True

    def _iterate(self, stop: Interruptible) -> None:
        """One cycle of the method."""
        cycle = self._cycle
        assert cycle is not None
        while True:
            # the last products are for the residuals of all open columns
            affordable = self.matvecs + len(self._columns) + len(self._open) <= self._budget
            self._spent = not affordable
            if self._spent or stop.requested or (cycle.iterations % LOOK_EVERY == 0 and self._look(cycle)):
                break
            cycle.step()
            self.iterations += 1
            self._count(len(self._columns))
            if self._file.due():
                self._save()
        if stop.requested:
            self._save()
        self._take(cycle, torch.arange(len(self._columns)))
        if isinstance(cycle, MinRes):
            self._scale = torch.maximum(self._scale, cycle.scale.max())
        self._cycle = None

    def _take(self, cycle: ConjugateGradients | MinRes, rows: Tensor) -> None:
        """Take over those rows' x, unless their residuals have grown since the cycle's start.

        Those of conjugate gradients may grow on the way to a smaller error; where these met a singular or
        indefinite operator that excuse is void.
        """
        columns = self._columns[rows]
        excuse = 1.0 if self._minres else torch.finfo(self.x.dtype).eps ** -0.5
        better = cycle.look()[1][rows] <= excuse * self.residuals[columns] * self._norms_host[columns]
        self.x[columns[better]] = cycle.x[rows[better]]

    def _look(self, cycle: ConjugateGradients | MinRes) -> bool:
        """The flags on the host; whether the cycle is over."""
        active, norms, curvature, least = cycle.look()
        require_finite(norms, "solve")
        if float(least.min()) < 0:
            raise NotDefiniteError(
                f"preconditioner: it is not positive definite, rᵀ M r = {float(least.min()):.3g} for a residual r"
            )
        if bool(torch.isfinite(curvature).any()):
            worst = float(curvature.min())
            if not self._auto:
                raise NotDefiniteError(
                    f"op: it is not positive definite, pᵀ A p / pᵀ p = {worst:.6g} for a direction p; take "
                    'method="minres" or op.shift(delta)'
                )
            self._curvature, self._switched, self._minres = worst, self.iterations, True
            return True
        kept = active.nonzero()[:, 0]
        if 0 < len(kept) < len(active):
            done = (active == 0).nonzero()[:, 0]
            self._take(cycle, done)
            cycle.select(kept.to(cycle.x.device))
            self._columns = self._columns[kept]
        return len(kept) == 0

    def _count(self, products: int) -> None:
        self.matvecs += products
        self._bar.update(products)

    # -- going on in another process ---------------------------------------------------------------
    def _save(self) -> None:
        if not self._file.writes:
            return
        cycle = self._cycle
        numbers = [self.matvecs, self.iterations, self._switched, self._minres, self._finished, self._spent]
        state = {
            "all": self.x,
            "residuals": self.residuals,
            "open": self._open,
            "columns": self._columns,
            "numbers": torch.tensor([*numbers, -1 if cycle is None else cycle.iterations]),
            "curvature": torch.tensor(self._curvature, dtype=torch.float64),
        }
        if cycle is not None:
            state |= {f"cycle.{key}": value for key, value in cycle.state().items()}
        self._file.save(**state)

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self.x, self.residuals = state["all"].to(self.x), state["residuals"]
        self._open, self._columns, self._started = state["open"], state["columns"], True
        self.matvecs, self.iterations, self._switched, minres, finished, spent, inner = (
            int(n) for n in state["numbers"]
        )
        self._minres, self._finished, self._spent = bool(minres), bool(finished), bool(spent)
        self._curvature = float(state["curvature"])
        self._bar.update(self.matvecs)
        if inner >= 0:
            blank = torch.zeros_like(self._right[self._columns])
            make = MinRes if self._minres else ConjugateGradients
            self._cycle = make(self._op, blank, blank.clone(), self._norms[self._columns], self._precondition)
            prefix = "cycle."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            self._cycle.restore(own, inner)
