"""Stochastic Lanczos quadrature of a symmetric operator's spectral density."""

from __future__ import annotations

import time
from typing import Any

import torch

from flatkern.estimators.common import (
    check_count,
    make_generator,
    progress_bar,
    rademacher,
    square_operator,
)
from flatkern.estimators.lanczos import lockstep_lanczos
from flatkern.estimators.spectrum import SpectralDensity, merge_close

__all__ = ["spectral_density"]

BASIS_BYTES = 1 << 28
"""Largest basis that is kept for re-orthogonalization unless it is asked for: 256 MiB."""


def spectral_density(
    op: Any,
    *,
    probes: int = 8,
    steps: int = 40,
    reorthogonalize: bool | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SpectralDensity:
    """The eigenvalue distribution (1/P) Σ_i δ(λ − λ_i) of a symmetric operator.

    Each of k sign vectors v, ‖v‖² = P, gives by m Lanczos steps the Gauss quadrature of its own spectral
    measure: Σ_j w_j f(θ_j) = vᵀ f(A) v / P exactly for polynomials f of degree up to 2 m − 1, with Σ_j w_j =
    1. The mean over probes estimates Tr f(A) / P, the spread over probes its error.

    Args:
        op: a symmetric flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``.
        probes: number k of independent probes; 2 or more for error bars. They run in lockstep as one block.
        steps: Lanczos steps m (at most P are made).
        reorthogonalize: keep the basis, (m + 2) · k · P numbers, and orthogonalize against it twice. Without,
            3 · k · P numbers are enough; the broadened density is as good, the smallest eigenvalues come
            later. Default: where the basis fits into 256 MiB.
        seed: integer seed; or ``generator``: a ``torch.Generator`` to draw from. The global one is never
            used.
        generator: see ``seed``.
        progress: show a bar.

    Returns:
        A :class:`SpectralDensity`. Nodes of a probe closer than 10 eps · max|θ| (eps of the operator's dtype)
            are
        merged: they are copies of one eigenvalue.

    Cost: k · m products, in blocks of k. Lanczos runs in the operator's dtype, the quadrature in float64.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named; an operator seen to be non-symmetric.
        FloatingPointError: products gave NaN or Inf.

    Source: Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix
    Anal. Appl. 38 (2017).

    Example:
        >>> import torch
        >>> from flatkern.estimators import spectral_density
        >>> density = spectral_density(torch.eye(50, dtype=torch.float64), probes=2, seed=0)
        >>> [round(x, 6) for x in density.moments.tolist()]
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    start = time.perf_counter()
    operator = square_operator(op)
    check_count(probes, "probes")
    check_count(steps, "steps")
    size = operator.shape[0]
    steps = min(steps, size)
    finfo = torch.finfo(operator.dtype)
    if reorthogonalize is None:
        reorthogonalize = (steps + 2) * probes * size * finfo.bits // 8 <= BASIS_BYTES
    source = make_generator(seed, generator, operator.device)
    vectors = rademacher(probes, operator, source) / size**0.5
    with progress_bar(probes * steps, enabled=progress, what="spectral_density") as bar:
        runs = lockstep_lanczos(operator, vectors, steps, reorthogonalize=reorthogonalize, bar=bar)
    nodes, weights = runs.quadrature()
    resolution = 10 * finfo.eps * float(nodes.abs().max())
    nodes, weights = merge_close(nodes, weights, resolution)
    powers = torch.stack([(weights * nodes**j).sum(1) for j in range(5)])  # [5, k]
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        moments=powers.mean(1),
        stderr=powers.std(1) / probes**0.5 if probes > 1 else None,
        size=size,
        matvecs=probes * steps,
        seconds=time.perf_counter() - start,
        resolution=resolution,
    )
