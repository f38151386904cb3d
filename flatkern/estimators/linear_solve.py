"""Linear systems with a symmetric operator: conjugate gradients and MINRES, checked by true residuals."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.estimators.checkpoint import Checkpoint
from flatkern.estimators.common import (
    NotDefiniteError,
    check_count,
    check_positive,
    progress_bar,
    require_finite,
    square_operator,
)
from flatkern.estimators.conjugate_gradients import ConjugateGradients
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.minres import MinRes
from flatkern.operators.adapters import as_operator
from flatkern.operators.base import LinearOperator

__all__ = ["Solution", "solve"]

LOOK_EVERY = 10
"""Iterations between two looks at the device's flags."""
AIM = 0.9
"""Recurrent residual aimed at, relative to the tolerance that the true one must meet."""
DEFAULT_ITERATIONS = 1000

Method = Literal["auto", "cg", "minres"]
Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """Solutions of A X = B and how true they are."""

    x: Tensor = field(repr=False)
    """Of B's shape, [P] or [P, k], in the operator's dtype and on its device."""
    residuals: Tensor
    """‖b − A x‖ / ‖b‖ of each column, [k] float64, from products made with the final x; 0 where b = 0."""
    converged: Tensor
    """bool [k]: residual ≤ tol."""
    method: str
    """``"cg"``, ``"minres"``, or ``"cg, then minres"``."""
    iterations: int
    """Block products of the iterations; those that measure residuals are not among them."""
    matvecs: int
    seconds: float
    notes: tuple[str, ...] = ()


def solve(
    op: Any,
    B: Tensor,
    *,
    tol: float | None = None,
    x0: Tensor | None = None,
    preconditioner: Any = None,
    method: Method = "auto",
    max_matvecs: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
) -> Solution:
    """X with A X = B for a symmetric operator.

    All columns run in lockstep, one block product an iteration; a column that is done stops changing and leaves
    the block at the next look, every 10 iterations. When the recurrences say that all columns are done, the true
    residuals B − A X are measured; where rounding has made them larger than ``tol`` the iteration starts again
    from there, until that no longer halves them.

    Args:
        op: a symmetric flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``.
        B: right-hand side [P] or sides [P, k], in the operator's dtype and on its device.
        tol: relative residual ‖b − A x‖ ≤ tol · ‖b‖ of each column; default 1e-8 in float64, 1e-4 in float32.
        x0: where to start, of B's shape; default 0.
        preconditioner: an approximation M of A⁻¹, symmetric positive definite: an operator or matrix [P, P], or
            a callable that maps columns [P, k] to columns.
        method: ``"cg"`` for positive definite operators; ``"minres"`` for any symmetric one; ``"auto"``: conjugate
            gradients until a direction of curvature pᵀ A p ≤ 0 shows, then MINRES from the same point, which a
            note says.
        max_matvecs: products of all columns together, the measured residuals' included; at least 3 a column;
            default 1000 a column.
        progress: show a bar.
        checkpoint: file to keep the state in; a run killed at any moment and started again goes on from it to
            bit-identical results.
        checkpoint_seconds: least time between two writes.

    Returns:
        A :class:`Solution`. ``converged`` is decided by true residuals. After Ctrl-C x is what there is then.

    Cost: a product a column and iteration, and about 10 (CG) or 20 (MINRES) vector operations; one more product a
    column for the true residual, and one for ``x0``. Memory: B, X and 3 (CG) or 8 (MINRES) more such blocks. For a
    singular A, MINRES reaches a least-squares residual and reports it as not converged.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named.
        NotDefiniteError: ``method="cg"`` and a direction of curvature ≤ 0, or a preconditioner that is not positive
            definite.
        FloatingPointError: products gave NaN or Inf.

    Source: Hestenes, Stiefel (1952); Paige, Saunders (1975).

    Example:
        >>> import torch
        >>> from flatkern.estimators import solve
        >>> solve(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)).x
        tensor([1.0000, 0.5000, 0.2500])
    """
    start = time.perf_counter()
    operator = square_operator(op)
    right = _rows_of(B, operator, "B")
    guess = None if x0 is None else _rows_of(x0, operator, "x0", like=B)
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is unknown; expected one of {', '.join(get_args(Method))}")
    limit = check_positive(tol, "tol") or (1e-8 if operator.dtype == torch.float64 else 1e-4)
    count = len(right)
    budget = DEFAULT_ITERATIONS * count if max_matvecs is None else max_matvecs
    check_count(budget, "max_matvecs", least=3 * count)
    precondition = _preconditioner(preconditioner, operator)
    settings = {"B": right, "x0": guess, "tol": limit, "method": method, "max_matvecs": budget}
    settings["preconditioned"] = preconditioner is not None
    file = Checkpoint(checkpoint, what="solve", op=operator, settings=settings, seconds=checkpoint_seconds)
    with file, progress_bar(budget, enabled=progress, what="solve") as bar:
        solver = _Solver(operator, right, guess, limit, method, budget, precondition, file, bar)
        solver.run()
    residuals = solver.residuals
    return Solution(
        x=solver.x[0] if B.ndim == 1 else solver.x.mT,
        residuals=residuals,
        converged=residuals <= limit,
        method=solver.method_name,
        iterations=solver.iterations,
        matvecs=solver.matvecs,
        seconds=time.perf_counter() - start,
        notes=solver.notes(bool((residuals <= limit).all())),
    )


class _Solver:
    """Cycles of a method between measured residuals."""

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


def _rows_of(value: Any, op: LinearOperator, name: str, like: Tensor | None = None) -> Tensor:
    size = op.shape[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}; use torch.from_numpy(...)")
    if value.ndim not in (1, 2) or value.shape[0] != size or value.numel() == 0:
        raise ValueError(f"{name}: expected shape [{size}] or [{size}, k], got {list(value.shape)}")
    if like is not None and value.shape != like.shape:
        raise ValueError(f"{name}: expected B's shape {list(like.shape)}, got {list(value.shape)}")
    if value.dtype != op.dtype or value.device != op.device:
        raise TypeError(
            f"{name}: it is {value.dtype} on {value.device} and the operator {op.dtype} on {op.device}; convert it"
        )
    value = value.detach()
    return (value[None] if value.ndim == 1 else value.mT).contiguous()


def _preconditioner(given: Any, op: LinearOperator) -> Rows | None:
    if given is None:
        return None
    if callable(given) and not hasattr(given, "shape"):

        def apply(rows: Tensor) -> Tensor:
            columns = given(rows.mT)
            if not isinstance(columns, Tensor) or columns.shape != (rows.shape[1], rows.shape[0]):
                shape = list(columns.shape) if isinstance(columns, Tensor) else type(columns).__name__
                raise ValueError(f"preconditioner: expected columns {list(rows.mT.shape)}, got {shape}")
            return columns.detach().to(rows).mT.contiguous()

        return apply
    inverse = as_operator(given, name="preconditioner")
    if inverse.shape != op.shape or inverse.dtype != op.dtype or inverse.device != op.device:
        raise ValueError(
            f"preconditioner: it is {inverse.shape}, {inverse.dtype} on {inverse.device}; the operator is "
            f"{op.shape}, {op.dtype} on {op.device}"
        )
    return lambda rows: (inverse @ rows.mT).mT
