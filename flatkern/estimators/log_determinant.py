"""The log-determinant of a positive definite operator, with bounds."""

from __future__ import annotations

import os
from typing import Any

import torch

from flatkern.estimators.common import in_own_precision
from flatkern.estimators.function_trace import FunctionTrace
from flatkern.estimators.matrix_function import Method, integrate_trace

__all__ = ["logdet"]


@in_own_precision
def logdet(
    op: Any,
    *,
    floor: float | None = None,
    ceiling: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    probes: int | None = None,
    steps: int | None = None,
    max_matvecs: int = 4000,
    method: Method = "auto",
    reorthogonalize: bool | int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
) -> FunctionTrace:
    """log det A = Tr log A of a symmetric positive definite operator.

    By :func:`flatkern.estimators.trace_function` with f = log, whose Gauss quadrature is an upper bound for every
    probe. With ``floor`` = a ≤ λ_min, Gauss–Radau quadrature with a node at a is a lower bound, and both enclose
    what each probe would give with exact arithmetic. ``floor`` is known e.g. for ``H.shift(delta)`` with H
    positive semidefinite (a GGN): it is ``delta``.

    Args:
        op: a symmetric positive definite flatkern operator, matrix, or any object with ``shape``, ``dtype`` and
            ``@``.
        floor: a positive number known to be ≤ λ_min; without, ``lower`` is an indication.
        ceiling: a number known to be ≥ λ_max: tightens the upper bound.
        rtol: as in :func:`flatkern.estimators.trace_function`, like all that follows.
        atol: see there; a log-determinant may be near 0.
        probes: see there.
        steps: see there.
        max_matvecs: see there.
        method: see there.
        reorthogonalize: see there; it matters near singularity.
        seed: see there.
        generator: see there.
        progress: show a bar.
        checkpoint: see there.
        checkpoint_seconds: see there.

    Returns:
        A :class:`FunctionTrace`.

    Raises:
        NotDefiniteError: a Ritz value is not positive, or not to rounding (4 eps · max|θ|, where there is no
            ``floor``); the message says the smallest one. Negative eigenvalues that no Ritz value has come near
            cannot be seen.
        TypeError, ValueError: an argument that cannot be used, named; ``floor`` above a Ritz value.
        NotSymmetricError: the operator is seen to be non-symmetric.
        FloatingPointError: products gave NaN or Inf.

    Source: Golub, Meurant, "Matrices, Moments and Quadrature with Applications" (2010), chapters 6, 7 and 11.

    Example:
        >>> import torch
        >>> from flatkern.estimators import logdet
        >>> round(float(logdet(torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)))), 6)  # log 120
        4.787492
    """
    if floor is not None and not floor > 0:
        raise ValueError(f"floor: expected a positive number, got {floor!r}")
    return integrate_trace(
        op,
        torch.log,
        "bernstein",
        floor=floor,
        ceiling=ceiling,
        rtol=rtol,
        atol=atol,
        probes=probes,
        steps=steps,
        max_matvecs=max_matvecs,
        method=method,
        reorthogonalize=reorthogonalize,
        seed=seed,
        generator=generator,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        definite=True,
        what="logdet",
    )
