"""Stochastic Lanczos quadrature of a symmetric operator's spectral density."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor

from flatkern.estimators.checkpoint import Checkpoint, require_seed
from flatkern.estimators.common import (
    check_count,
    in_own_precision,
    make_generator,
    progress_bar,
    square_operator,
)
from flatkern.estimators.deflation import Deflation
from flatkern.estimators.eigenpairs import Eigenpairs
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.lanczos import LockstepLanczos
from flatkern.estimators.probes import Probes
from flatkern.estimators.spectrum import SpectralDensity, merge_close

__all__ = ["spectral_density"]

BASIS_BYTES = 1 << 28
"""Largest basis that is kept for re-orthogonalization unless it is asked for: 256 MiB."""


@in_own_precision
def spectral_density(
    op: Any,
    *,
    probes: int = 8,
    steps: int = 40,
    reorthogonalize: bool | int | None = None,
    deflate: Eigenpairs | tuple[Tensor, Tensor] | None = None,
    max_matvecs: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
) -> SpectralDensity:
    """The eigenvalue distribution (1/P) Σ_i δ(λ − λ_i) of a symmetric operator.

    Each of k sign vectors v, ‖v‖² = P, gives by m Lanczos steps the Gauss quadrature of its own spectral
    measure: Σ_j w_j f(θ_j) = vᵀ f(A) v / P exactly for polynomials f of degree up to 2 m − 1, with Σ_j w_j =
    1. The mean over probes estimates Tr f(A) / P, the spread over probes its error.

    With ``deflate`` = (λ_1 … λ_j, u_1 … u_j) these eigenvalues are counted exactly, with weight 1/P each, and
    the quadrature runs on their orthogonal complement with random directions in it: unbiased as before, and
    the outliers add nothing to the error.

    Args:
        op: a symmetric flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``.
        probes: number k of independent probes; 2 or more for error bars. They run in lockstep as one block.
        steps: Lanczos steps m (at most P are made).
        reorthogonalize: ``True``: each probe keeps all its Lanczos vectors, one vector of memory each, and
            orthogonalizes against them; ``False``: none; an integer: so many of the first ones, enough where a
            few outliers converge early. Default: all where they fit into 256 MiB, else none. The broadened
            density does not need it; without, converged eigenvalues are found again instead of new ones.
        deflate: converged eigenpairs to count exactly: an :class:`Eigenpairs` (those of its pairs that have
            converged), or values [j] and vectors [P, j]. They are checked with j products.
        max_matvecs: all products together, at least one step; fewer steps are made where it is not enough, and
            ``converged`` is false.
        seed: integer seed; or ``generator``: a ``torch.Generator`` to draw from. The global one is never
            used.
        generator: see ``seed``.
        progress: show a bar.
        checkpoint: file to keep the state in; a run killed at any moment and started again goes on from it
            to bit-identical results, and returns at once where it had finished. Needs ``seed``, not
            ``generator``.
        checkpoint_seconds: least time between two writes.

    Returns:
        A :class:`SpectralDensity`. Nodes of a probe closer than 10 eps · max|θ| (eps of the operator's dtype) are
        merged: they are copies of one eigenvalue. After Ctrl-C it holds the steps made until then, with
        ``converged`` false.

    Cost: k · m products, in blocks of k. Lanczos runs in the operator's dtype, the quadrature in float64. Values
    reach the host once, at the end.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named; an operator seen to be non-symmetric;
            ``deflate`` not eigenpairs of this operator; a checkpoint of another run.
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
    size = operator.shape[0]
    check_count(probes, "probes")
    steps = min(check_count(steps, "steps"), size)
    require_seed(checkpoint, generator)
    outliers = None if deflate is None else Deflation.of(deflate, operator)
    known = 0 if outliers is None else len(outliers)
    wanted = steps = min(steps, size - known)
    if max_matvecs is not None:
        check_count(max_matvecs, "max_matvecs", least=known + probes)
        steps = min(steps, (max_matvecs - known) // probes)
    finfo = torch.finfo(operator.dtype)
    keep = kept_vectors(reorthogonalize, steps, BASIS_BYTES // (probes * size * finfo.bits // 8))
    settings = {
        "probes": probes,
        "steps": steps,
        "kept": keep,
        "seed": seed,
        "deflate": None if outliers is None else outliers.rows,
    }
    file = Checkpoint(
        checkpoint, what="spectral_density", op=operator, settings=settings, seconds=checkpoint_seconds
    )
    with file, progress_bar(probes * steps, enabled=progress, what="spectral_density") as bar:
        stream = Probes(operator, make_generator(seed, generator, operator.device))
        if outliers is None:
            vectors = stream.signs(probes).div_(size**0.5)
        else:
            vectors = outliers.directions(stream.normals(probes))
        run = LockstepLanczos(
            operator,
            vectors,
            keep=keep,
            chunk=steps,
            outside=None if outliers is None else outliers.rows,
            what="spectral_density",
        )
        del vectors
        if file.state is not None:
            run.restore(file.state)
            file.state = None
        bar.update(probes * run.steps)
        with Interruptible() as stop:
            while run.steps < steps and not stop.requested:
                run.step()
                bar.update(probes)
                if file.due() or (file.writes and (run.steps == steps or stop.requested)):
                    file.save(**run.state())
        rule = run.tridiagonals().gauss()
    notes = []
    if run.steps < steps:
        notes.append(f"interrupted after {run.steps} of {steps} steps")
    elif steps < wanted:
        notes.append(f"max_matvecs left {steps} of {wanted} steps")
    resolution = 10 * finfo.eps * float(rule.nodes.abs().max())
    nodes, weights = merge_close(rule.nodes, rule.weights, resolution)
    if outliers is not None:
        nodes, weights = outliers.add_to(nodes, weights, size)
    powers = torch.stack([(weights * nodes**j).sum(1) for j in range(5)])  # [5, k]
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        moments=powers.mean(1),
        stderr=powers.std(1) / probes**0.5 if probes > 1 else None,
        size=size,
        matvecs=probes * run.steps + known,
        seconds=time.perf_counter() - start,
        resolution=resolution,
        converged=not notes,
        notes=tuple(notes),
    )


def kept_vectors(reorthogonalize: bool | int | None, steps: int, fitting: int) -> int:
    """How many vectors each run keeps; by default all ``steps`` of them where so many are ``fitting``."""
    if reorthogonalize is None:
        return steps if steps <= fitting else 0
    if isinstance(reorthogonalize, bool):
        return steps if reorthogonalize else 0
    return min(steps, check_count(reorthogonalize, "reorthogonalize", least=0))
