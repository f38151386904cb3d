"""Linear systems with a symmetric operator: conjugate gradients and MINRES, checked by true residuals."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from flatkern.estimators.checkpoint import Checkpoint
from flatkern.estimators.common import (
    check_count,
    check_positive,
    in_own_precision,
    progress_bar,
    square_operator,
)
from flatkern.estimators.solve_cycles import Method, Rows, Solver
from flatkern.operators.adapters import as_operator
from flatkern.operators.base import LinearOperator

__all__ = ["Solution", "solve"]

DEFAULT_ITERATIONS = 1000


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


@in_own_precision
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
        solver = Solver(operator, right, guess, limit, method, budget, precondition, file, bar)
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
