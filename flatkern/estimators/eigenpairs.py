"""A few eigenpairs of a symmetric operator by block thick-restart Lanczos."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from flatkern.estimators.checkpoint import Checkpoint, require_seed
from flatkern.estimators.common import (
    check_count,
    check_positive,
    in_own_precision,
    make_generator,
    progress_bar,
    require_finite,
    square_operator,
)
from flatkern.estimators.eigen_search import Search, Which
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.restarted_lanczos import LanczosBasis
from flatkern.operators.base import LinearOperator

__all__ = ["Eigenpairs", "basis_width", "eigsh"]

_NOISE = 0.3  # norm of the random part of a first vector made from given ones; costs next to nothing
_INTERRUPTED = (
    "interrupted: residuals are bounds from the projected matrix, not from products with the vectors"
)


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues, eigenvectors, and how true they are."""

    values: Tensor
    """[k] float64 on the host, the most wanted first."""
    vectors: Tensor = field(repr=False)
    """[P, k], columns of unit norm, in the operator's dtype and on its device."""
    residuals: Tensor
    """‖A v − λ v‖₂ of each pair, [k] float64, from products made with the final vectors; after Ctrl-C bounds from
    the projected matrix."""
    converged: Tensor
    """bool [k]: residual ≤ tol · (largest |Ritz value| seen)."""
    verified: bool
    """Whether a second run, from a random start vector outside the pairs found, turned up no other one."""
    matvecs: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """k, or fewer where a run ended before it had as many vectors (a note says so)."""
        return len(self.values)


@in_own_precision
def eigsh(
    op: Any,
    k: int = 6,
    *,
    which: Which = "LA",
    tol: float | None = None,
    max_matvecs: int = 2000,
    basis_size: int | None = None,
    block_size: int | None = None,
    start: Eigenpairs | Tensor | None = None,
    verify: bool = True,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
) -> Eigenpairs:
    """The k most wanted eigenpairs of a symmetric operator, A v = λ v.

    Block thick-restart Lanczos with full re-orthogonalization in a basis of bounded size. A Krylov space of one
    start vector holds one vector of each eigenspace, so copies of a multiple eigenvalue would be missed: where
    all k pairs have converged, the run goes on once more from a random vector orthogonal to them (``verify``),
    and again as long as that finds something. A block of b vectors finds copies up to b-fold at once. An
    eigenvalue closer to the k-th than such a round resolves can still be missed. Each pair returned is true to
    its residual in any case.

    Args:
        op: a symmetric flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``.
        k: number of pairs, 1 to P.
        which: ``"LA"`` largest (returned descending), ``"SA"`` smallest (ascending), ``"LM"`` largest in
            magnitude (descending in it), ``"BE"`` from both ends (descending; the odd one from the upper
            end).
        tol: residual relative to the largest |Ritz value|; default 1e-8 in float64 and 1e-4 in float32. Far
            below 1e-6 in float32 rounding decides, and the pairs are reported as not converged.
        max_matvecs: all products together, at least 2 k; the k products of the final residuals included.
        basis_size: vectors kept, at least k + block_size (or P); default max(24, 2 k + 12, k + 6 block_size).
            Memory (basis_size + block_size + k) · P.
        block_size: vectors multiplied at once. Default: 1, and wider (to 8) once directions run out or a fresh
            start finds a missed copy, as multiple eigenvalues do. A fixed b > 1 takes more products in all and
            pays where b products together cost much less than b products, or where copies are expected.
        start: where to start: :class:`Eigenpairs` of a nearby operator (earlier weights), or vectors [P] or
            [P, j]. Saves products where they are close to the wanted vectors.
        verify: look for missed copies; costs at least (basis_size − k) further products.
        seed: integer seed; or ``generator``: a ``torch.Generator`` to draw from. The global one is never
            used.
        generator: see ``seed``.
        progress: show a bar.
        checkpoint: a file to keep the state of the run in, written at most every ``checkpoint_seconds``; a
            run killed at any moment and started again goes on from it to bit-identical results. It takes
            basis_size · P numbers. A finished run returns at once. ``max_matvecs`` may be raised.
        checkpoint_seconds: see ``checkpoint``.

    Ctrl-C ends the run after the present product and returns what is there, with ``converged`` false; a second
    one raises ``KeyboardInterrupt``.

    Cost: beside a product, about 4 · j · P flops a step and vector in two readings of the basis, j ≤ basis_size;
    the host waits for the device once every four products and at restarts.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named; an operator seen to be non-symmetric; a
            checkpoint of another run.
        FloatingPointError: products gave NaN or Inf.

    Source: Wu, Simon, SIAM J. Matrix Anal. Appl. 22 (2000); blocks: Golub, Underwood, "The block Lanczos method
    for computing eigenvalues", Mathematical Software III (1977).

    Example:
        >>> import torch
        >>> from flatkern.estimators import eigsh
        >>> eigsh(torch.diag(torch.arange(1.0, 101.0).double()), k=2, seed=0).values.round(decimals=6)
        tensor([100.,  99.], dtype=torch.float64)
    """
    begun = time.perf_counter()
    operator = square_operator(op)
    size = operator.shape[0]
    check_count(k, "k", most=size)
    if which not in get_args(Which):
        raise ValueError(f"which: {which!r} is unknown; expected one of {', '.join(get_args(Which))}")
    limit = check_positive(tol, "tol") or (1e-8 if operator.dtype == torch.float64 else 1e-4)
    block = min(size, 1 if block_size is None else check_count(block_size, "block_size"))
    check_count(max_matvecs, "max_matvecs", least=k + -(-k // block) * block)
    if basis_size is not None:
        check_count(basis_size, "basis_size")
    width = basis_width(size, k, block, basis_size)
    check_count(width, "basis_size", least=min(size, k + block))
    first = None if start is None else _start_vectors(start, operator)
    require_seed(checkpoint, generator)
    settings = {
        "k": k,
        "which": which,
        "tol": limit,
        "basis_size": width,
        "block_size": block_size,
        "start": first,
        "verify": verify,
        "seed": seed,
    }
    basis = LanczosBasis(operator, width, block, make_generator(seed, generator, operator.device))
    search = Search(basis, k, which, limit, verify=verify, adaptive=block_size is None)
    with (
        Checkpoint(
            checkpoint, what="eigsh", op=operator, settings=settings, seconds=checkpoint_seconds
        ) as saved,
        progress_bar(max_matvecs, enabled=progress, what="eigsh") as bar,
        Interruptible() as stop,
    ):
        residuals = None
        if saved.state is None:
            basis.fill(None if first is None else _leading(first, basis))
        else:
            search.resume(saved.state)
            residuals = saved.state.get("residuals")
            saved.state = None
            bar.update(search.spent)
        before = search.spent
        search.run(max_matvecs - k, saved, stop, bar)
        cut = stop.requested and not search.finished
        if search.spent > before:
            residuals = None
        if cut:
            saved.save(**search.state())
        values, vectors, estimates = search.best()
        if cut:
            residuals = estimates
        elif residuals is None:
            residuals = _residuals(operator, values, vectors, basis.block)
            saved.save(**search.state(), residuals=residuals)
    notes = [_INTERRUPTED] if cut else []
    if len(values) < k:
        notes.append(
            f"{k - len(values)} pairs are missing: the run ended too early; none counts as converged"
        )
    good = (residuals <= limit * basis.scale) & (not notes)
    return Eigenpairs(
        values=values,
        vectors=vectors.mT,
        residuals=residuals,
        converged=good,
        verified=search.verified,
        matvecs=search.spent + (0 if cut else len(values)),
        seconds=time.perf_counter() - begun,
        notes=tuple(notes),
    )


def basis_width(size: int, k: int, block: int, asked: int | None) -> int:
    """How many vectors the basis holds beside the pending block."""
    return min(size, max(24, 2 * k + 12, k + 6 * block) if asked is None else asked)


def _start_vectors(start: Any, op: LinearOperator) -> Tensor:
    """Vectors to start from as rows [j, P] of unit norm, in the operator's dtype and on its device."""
    columns = start.vectors if isinstance(start, Eigenpairs) else start
    if not isinstance(columns, Tensor):
        raise TypeError(f"start: expected Eigenpairs or a tensor [P] or [P, j], got {type(start).__name__}")
    columns = columns.detach()
    rows = columns[None] if columns.ndim == 1 else columns.mT
    if rows.ndim != 2 or rows.shape[1] != op.shape[0] or not len(rows):
        raise ValueError(f"start: expected [{op.shape[0]}] or [{op.shape[0]}, j], got {list(columns.shape)}")
    rows = rows.to(op.device, op.dtype)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise ValueError("start: a vector is zero or holds NaN or Inf; leave it out")
    return rows / norms


def _leading(rows: Tensor, basis: LanczosBasis) -> Tensor:
    """The first block [b, P]: sums of the start vectors, with a little of everything else.

    Without the latter a start vector inside an invariant subspace would never leave it.
    """
    block = basis.probes.normals(basis.block)
    block *= _NOISE / torch.linalg.vector_norm(block, dim=1, keepdim=True)
    for i, row in enumerate(rows):
        block[i % len(block)] += row
    return block


def _residuals(op: LinearOperator, values: Tensor, vectors: Tensor, block: int) -> Tensor:
    """‖A v − λ v‖ of each row, [k] float64, a block at a time: the images of all would be one more basis."""
    norms = []
    for start in range(0, len(vectors), block):
        rows = vectors[start : start + block]
        images = (op @ rows[0])[None] if len(rows) == 1 else (op @ rows.mT).mT
        off = torch.addcmul(images, values[start : start + block, None].to(rows), rows, value=-1)
        norms.append(torch.linalg.vector_norm(off, dim=1))
    return require_finite(torch.cat(norms).double().cpu(), "eigsh")
