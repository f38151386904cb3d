"""A few eigenpairs of a symmetric operator by thick-restart Lanczos."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flatkern.estimators.common import (
    check_count,
    check_positive,
    make_generator,
    progress_bar,
    require_finite,
    square_operator,
)
from flatkern.estimators.restarted_lanczos import LanczosBasis
from flatkern.operators.base import LinearOperator

__all__ = ["Eigenpairs", "eigsh"]

Which = Literal["LA", "SA", "LM", "BE"]


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues, eigenvectors, and how true they are."""

    values: Tensor
    """[k] float64 on the host, the most wanted first."""
    vectors: Tensor = field(repr=False)
    """[P, k], columns of unit norm, in the operator's dtype and on its device."""
    residuals: Tensor
    """‖A v − λ v‖₂ of each pair, [k] float64, from products made with the final vectors."""
    converged: Tensor
    """bool [k]: residual ≤ tol · (largest |Ritz value| seen)."""
    verified: bool
    """Whether a second run, from a random start vector outside the pairs found, turned up no other one."""
    matvecs: int
    seconds: float

    def __len__(self) -> int:
        """k."""
        return len(self.values)


def eigsh(
    op: Any,
    k: int = 6,
    *,
    which: Which = "LA",
    tol: float | None = None,
    max_matvecs: int = 2000,
    basis_size: int | None = None,
    verify: bool = True,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """The k most wanted eigenpairs of a symmetric operator, A v = λ v.

    Thick-restart Lanczos with full re-orthogonalization in a basis of bounded size. A Krylov space of one
    start
    vector holds one vector of each eigenspace, so copies of a multiple eigenvalue would be missed: where all
    k pairs have converged, the run goes on once more from a random vector orthogonal to them (``verify``),
    and again as long as that finds something. Copies are found one a round; an eigenvalue closer to the k-th
    than such a round resolves can still be missed. Each pair returned is true to its residual in any case.

    Args:
        op: a symmetric flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``.
        k: number of pairs, 1 to P.
        which: ``"LA"`` largest (returned descending), ``"SA"`` smallest (ascending), ``"LM"`` largest in
            magnitude (descending in it), ``"BE"`` from both ends (descending; the odd one from the upper
            end).
        tol: residual relative to the largest |Ritz value|; default 1e-8 in float64 and 1e-4 in float32. Far
            below 1e-6 in float32 rounding decides, and the pairs are reported as not converged.
        max_matvecs: all products together, at least 2 k; the k products of the final residuals included.
        basis_size: vectors kept, more than k (or P); default max(2 k + 12, 24). Memory (basis_size + 1 + k) ·
            P.
        verify: look for missed copies; costs at least (basis_size − k) further products.
        seed: integer seed; or ``generator``: a ``torch.Generator`` to draw from. The global one is never
            used.
        generator: see ``seed``.
        progress: show a bar.

    Cost: a product and 8 · j · P flops of re-orthogonalization a step, j ≤ basis_size.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named; an operator seen to be non-symmetric.
        FloatingPointError: products gave NaN or Inf.

    Source: Wu, Simon, SIAM J. Matrix Anal. Appl. 22 (2000).

    Example:
        >>> import torch
        >>> from flatkern.estimators import eigsh
        >>> eigsh(torch.diag(torch.arange(1.0, 101.0).double()), k=2, seed=0).values.round(decimals=6)
        tensor([100.,  99.], dtype=torch.float64)
    """
    start = time.perf_counter()
    operator = square_operator(op)
    size = operator.shape[0]
    check_count(k, "k", most=size)
    if which not in get_args(Which):
        raise ValueError(f"which: {which!r} is unknown; expected one of {', '.join(get_args(Which))}")
    check_count(max_matvecs, "max_matvecs", least=2 * k)
    limit = check_positive(tol, "tol") or (1e-8 if operator.dtype == torch.float64 else 1e-4)
    width = min(size, max(2 * k + 12, 24)) if basis_size is None else min(size, basis_size)
    check_count(width, "basis_size", least=min(size, k + 1))
    basis = LanczosBasis(operator, width, make_generator(seed, generator, operator.device))
    with progress_bar(max_matvecs, enabled=progress, what="eigsh") as bar:
        verified, spent = _iterate(basis, k, which, limit, max_matvecs - k, verify, bar)
    values, coordinates, _ = basis.ritz()
    wanted = _ranking(values, which)[:k]
    if which == "BE":
        wanted = wanted.sort(descending=True).values
    vectors = basis.vectors(coordinates[:, wanted])
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    residuals = _residuals(operator, values[wanted], vectors)
    return Eigenpairs(
        values=values[wanted],
        vectors=vectors.mT,
        residuals=residuals,
        converged=residuals <= limit * basis.scale,
        verified=verified,
        matvecs=spent + k,
        seconds=time.perf_counter() - start,
    )


def _iterate(
    basis: LanczosBasis, k: int, which: Which, tol: float, budget: int, verify: bool, bar: Any
) -> tuple[bool, int]:
    """Until the wanted pairs have converged and a fresh start finds no others; (verified, products)."""
    spent, confirmed = 0, None
    while True:
        while basis.known < basis.size and spent < budget:
            basis.step()
            spent += 1
            bar.update()
        values, coordinates, residuals = basis.ritz()
        if basis.complete:
            return True, spent
        ranking = _ranking(values, which)
        wanted = ranking[:k]
        done = bool((residuals[wanted] <= tol * basis.scale).all())
        if done:
            found = values[wanted]
            full = basis.known == basis.size  # a round cut short has not looked properly
            if confirmed is not None and full and bool((found - confirmed).abs().max() <= tol * basis.scale):
                return True, spent
            confirmed = found
        if spent >= budget or (done and not verify):
            return False, spent
        # a look for what is missing keeps the pairs found and nothing else; a restart also keeps the next
        # best
        kept = wanted if done else ranking[: min(k + max(1, (basis.size - k) // 2), basis.size - 1)]
        basis.restart(values[kept], coordinates[:, kept], fresh=done)


def _ranking(values: Tensor, which: Which) -> Tensor:
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


def _residuals(op: LinearOperator, values: Tensor, vectors: Tensor) -> Tensor:
    """‖A v − λ v‖ of each row, [k] float64, vector by vector: the images of all would be one more basis."""
    norms = [torch.linalg.vector_norm(op @ v - float(t) * v) for t, v in zip(values, vectors, strict=True)]
    return require_finite(torch.stack(norms).double().cpu(), "eigsh")
