"""What an estimator takes before it runs: products, and vectors held beside what a product itself needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flatkern.estimators.common import row_bytes, rows_per_block
from flatkern.estimators.diagonal import diagonal
from flatkern.estimators.eigenpairs import basis_width, eigsh
from flatkern.estimators.linear_solve import DEFAULT_ITERATIONS, solve
from flatkern.estimators.log_determinant import logdet
from flatkern.estimators.matrix_function import EXACT_SIZE, kept_of_group, trace_function
from flatkern.estimators.slq import BASIS_BYTES, kept_vectors, spectral_density
from flatkern.estimators.stochastic_quadrature import PILOT, group_size
from flatkern.estimators.stochastic_trace import trace
from flatkern.operators.base import LinearOperator

__all__ = ["FOOTPRINTS", "Footprint"]


@dataclass(frozen=True)
class Footprint:
    """Products and memory of one call."""

    matvecs: int
    columns: int
    """Vectors in one product."""
    vectors: float
    """Vectors [P] in the operator's dtype that are held at the peak beside what a product takes."""
    at_most: bool = False
    """Whether the data decide, so that these are bounds."""


Arguments = Mapping[str, Any]


def _eigsh(op: LinearOperator, a: Arguments) -> Footprint:
    size, k, block = op.shape[0], a["k"], a["block_size"] or 1
    width = basis_width(size, k, block, a["basis_size"])
    return Footprint(min(a["max_matvecs"], size * 4), block, width + k + 3 * block, at_most=True)


def _spectral_density(op: LinearOperator, a: Arguments) -> Footprint:
    probes, steps = a["probes"], min(a["steps"], op.shape[0])
    if a["max_matvecs"] is not None:
        steps = max(1, min(steps, a["max_matvecs"] // probes))
    keep = kept_vectors(a["reorthogonalize"], steps, BASIS_BYTES // (probes * row_bytes(op)))
    return Footprint(probes * steps, probes, probes * (3 + keep))


def _quadrature(op: LinearOperator, a: Arguments) -> Footprint:
    size, probes, steps = op.shape[0], a["probes"], a["steps"]
    if a["method"] == "exact" or (
        a["method"] == "auto" and size <= EXACT_SIZE and probes is None and steps is None
    ):
        return Footprint(size, min(size, 64), size + 64)
    group = group_size(op, probes or PILOT)
    known = probes is not None and steps is not None
    most = min(size, steps or a["max_matvecs"] // (probes or PILOT))
    keep = kept_of_group(op, group, a["reorthogonalize"])
    chunks = 16 * -(-min(keep, most) // 16)  # room is made for so many at a time
    matvecs = probes * most if known else a["max_matvecs"]
    return Footprint(matvecs, group, group * (3 + min(keep, chunks)), at_most=not known)


def _solve(op: LinearOperator, a: Arguments) -> Footprint:
    columns = a["B"].shape[1] if a["B"].ndim == 2 else 1
    most = a["max_matvecs"] or DEFAULT_ITERATIONS * columns
    return Footprint(most, columns, columns * (9 if a["method"] == "minres" else 6), at_most=True)


def _sampled(op: LinearOperator, a: Arguments, *, entrywise: bool = False) -> Footprint:
    """Trace and diagonal: probes in blocks, or a sketch that is kept."""
    size, method, k = op.shape[0], a["method"], a["samples"]
    block = min(rows_per_block(op), k or PILOT)
    wide = 8 / op.dtype.itemsize  # quadratic forms are summed in float64
    if k is None:
        sketch = min(size, a["max_memory"] // (4 * row_bytes(op)), a["max_matvecs"] // 2)
        sketch = 0 if method == "hutchinson" else sketch
        return Footprint(a["max_matvecs"], rows_per_block(op), max(4 * sketch, 8 * block), at_most=True)
    if method == "exact" or (method == "auto" and size <= k):
        return Footprint(size, min(size, rows_per_block(op)), 2 * min(size, rows_per_block(op)))
    forms = block
    if entrywise or method not in (
        "auto",
        "hutchinson",
    ):  # products entry by entry; dots with signs need no room
        forms = block * (1 + wide + (2 * wide if wide > 1 else 0))
    products = {"auto": k, "hutchinson": k, "hutch++": 3 * k, "xtrace": 2 * k, "xdiag": 2 * k, "xnystrace": k}
    kept = {"hutch++": 4 * k, "xtrace": 4 * k, "xdiag": 4 * k, "xnystrace": 3.3 * k}.get(method, 0)
    return Footprint(products[method], block, max(kept, forms + kept / 2))


FOOTPRINTS: dict[Callable[..., Any], Callable[[LinearOperator, Arguments], Footprint]] = {
    eigsh: _eigsh,
    spectral_density: _spectral_density,
    logdet: _quadrature,
    trace_function: _quadrature,
    solve: _solve,
    trace: _sampled,
    diagonal: partial(_sampled, entrywise=True),
}
