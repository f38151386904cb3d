"""The trace of a function of a symmetric operator, by quadrature with bounds."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flatkern.estimators.checkpoint import Checkpoint, require_seed
from flatkern.estimators.common import (
    NotSymmetricError,
    check_count,
    check_positive,
    in_own_precision,
    make_generator,
    progress_bar,
    require_finite,
    row_bytes,
    square_operator,
)
from flatkern.estimators.function_trace import FunctionTrace, Integrand, Values
from flatkern.estimators.quadrature import DerivativeSigns
from flatkern.estimators.sample_shape import Shape
from flatkern.estimators.slq import BASIS_BYTES, kept_vectors
from flatkern.estimators.stochastic_quadrature import PILOT, Plan, QuadratureSampler, group_size
from flatkern.operators.base import LinearOperator

__all__ = ["trace_function"]

EXACT_SIZE = 24 * PILOT
"""P up to which ``method="auto"`` forms the matrix: P products, no more than 24 steps of a pilot."""
DEFAULT_RTOL = 0.01
FEWEST_KEPT = 16
"""Vectors below which keeping the first ones is not worth their products."""

Method = Literal["auto", "slq", "exact"]


@in_own_precision
def trace_function(
    op: Any,
    f: Callable[[Tensor], Tensor],
    *,
    bracket: DerivativeSigns | None = None,
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
    """Tr f(A) = Σ_i f(λ_i) of a symmetric operator, with its sampling error and bounds on the quadrature's.

    The mean over sign vectors v of vᵀ f(A) v, each by m Lanczos steps: P Σ_j w_j f(θ_j) over the nodes of Gauss
    quadrature, exact for polynomials of degree up to 2 m − 1. Where the signs of f's derivatives are known on the
    spectrum, Gauss and Gauss–Radau quadrature enclose vᵀ f(A) v:

    * ``"bernstein"`` (f' ≥ 0, f'' ≤ 0, f''' ≥ 0, …: log, log(1 + x), √x): Gauss and Radau at ``ceiling`` are
      upper bounds, Radau at ``floor`` is a lower one;
    * ``"completely_monotone"`` (f' ≤ 0, f'' ≥ 0, …: 1/x, e^(−x)): Gauss and Radau at ``ceiling`` are lower
      bounds, Radau at ``floor`` is an upper one;
    * ``"absolutely_monotone"`` (all ≥ 0: e^x): Gauss and Radau at ``floor`` are lower bounds, Radau at
      ``ceiling`` is an upper one.

    A side without a bound gets an indication, what the last quarter of the steps changed, and ``proven`` says so:
    a slow convergence can hide behind it.

    A pilot of 16 probes makes steps until the bracket is a tenth as wide as the sampling error, and fixes the
    number of probes, k = 1.5 (sd/tolerance)², at least 16. The pilot's probes count among the k; so that stopping
    after them cannot look better than it is, ``stderr`` = max(sd of the pilot, sd of all)/√k, with 15 degrees of
    freedom.

    Args:
        op: a symmetric flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``.
        f: maps a float64 tensor of eigenvalues to one of the same shape, entry by entry; finite on the spectrum.
        bracket: what is known of f's derivatives, as above. Contradictions seen in f's values are refused.
        floor: a number known to be ≤ λ_min, e.g. δ for a positive semidefinite operator shifted by δ. A Ritz
            value below it (by more than rounding, 64 eps · max|θ|) is refused; one below by rounding is taken as
            ``floor``.
        ceiling: a number known to be ≥ λ_max.
        rtol: aim at stderr ≤ rtol · |value|; 0.01 where ``atol`` is not given.
        atol: aim at stderr ≤ atol; with both, the looser one counts.
        probes: number of probes, at least 2; then the tolerance decides the number of steps only.
        steps: number of Lanczos steps; then the bracket is what it is.
        max_matvecs: all products together, at least those of two steps of the pilot.
        method: ``"slq"``; ``"exact"`` (the matrix from P products, its eigenvalues); ``"auto"``: exact for P up
            to 384 where neither ``probes`` nor ``steps`` is given.
        reorthogonalize: how many of its first Lanczos vectors each probe keeps and orthogonalizes against;
            ``True``: all, ``False``: none. Default: as many as fit into 256 MiB, none where that is fewer than
            16. Near singularity it saves steps.
        seed: integer seed; or ``generator``: a ``torch.Generator`` to draw from. The global one is never used.
        generator: see ``seed``.
        progress: show a bar.
        checkpoint: file to keep the state in; a run killed at any moment and started again goes on from it to
            bit-identical results. Needs ``seed``, not ``generator``.
        checkpoint_seconds: least time between two writes.

    Returns:
        A :class:`FunctionTrace`: ``value``, ``stderr`` (sampling alone), ``lower``, ``upper``, ``proven``,
        ``samples`` [k], ``interval(level)``. ``converged``: stderr met a tolerance that was given, the bracket
        is small beside it, and neither ``max_matvecs`` nor Ctrl-C cut the run.

    Cost: k · m products in blocks of up to 32; memory 3 vectors a probe of a block, and those kept. Lanczos runs
    in the operator's dtype, quadrature in float64.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named; f not finite at a Ritz value.
        NotSymmetricError: the operator is seen to be non-symmetric.
        FloatingPointError: products gave NaN or Inf.

    Source: Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 38 (2017); Golub, Meurant, "Matrices, Moments and
    Quadrature with Applications" (2010), chapters 6 and 7.

    Example:
        >>> import torch
        >>> from flatkern.estimators import trace_function
        >>> matrix = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
        >>> round(float(trace_function(matrix, torch.sqrt)), 6)  # small: exact
        8.382332
    """
    if not callable(f):
        raise TypeError(f"f: expected a callable on tensors, got {type(f).__name__}")
    if bracket is not None and bracket not in get_args(DerivativeSigns):
        raise ValueError(
            f"bracket: {bracket!r} is unknown; expected None or one of {', '.join(get_args(DerivativeSigns))}"
        )
    return integrate_trace(
        op,
        f,
        bracket,
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
    )


def integrate_trace(
    op: Any,
    f: Callable[[Tensor], Tensor],
    signs: DerivativeSigns | None,
    *,
    floor: float | None,
    ceiling: float | None,
    rtol: float | None,
    atol: float | None,
    probes: int | None,
    steps: int | None,
    max_matvecs: int,
    method: Method,
    reorthogonalize: bool | int | None,
    seed: int | None,
    generator: torch.Generator | None,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_seconds: float,
    definite: bool = False,
    what: str = "trace_function",
) -> FunctionTrace:
    """What :func:`trace_function` says; with ``definite`` for positive definite operators alone."""
    start = time.perf_counter()
    operator = square_operator(op)
    size = operator.shape[0]
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is unknown; expected one of {', '.join(get_args(Method))}")
    _check_bounds(floor, ceiling)
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    asked = rtol is not None or atol is not None
    if probes is not None:
        check_count(probes, "probes", least=2)
    if steps is not None:
        check_count(steps, "steps")
    check_count(max_matvecs, "max_matvecs", least=2 * (probes or PILOT))
    require_seed(checkpoint, generator)
    eps = torch.finfo(operator.dtype).eps
    integrand = Integrand(f, signs, floor, ceiling, definite, eps)
    fits = size <= min(EXACT_SIZE, max_matvecs) and probes is None and steps is None
    if method == "exact" or (method == "auto" and fits):
        if size > max_matvecs:
            raise ValueError(f"max_matvecs: the exact trace takes {size} products, more than {max_matvecs}")
        return _exact(op, operator, integrand, start)
    plan = Plan(
        probes,
        steps,
        DEFAULT_RTOL if not asked else rtol or 0.0,
        atol or 0.0,
        max_matvecs,
        kept_of_group(operator, group_size(operator, probes or PILOT), reorthogonalize),
    )
    recognised = None if checkpoint is None else _points(f)
    settings = {"f": recognised, "signs": signs, "floor": floor, "ceiling": ceiling, "rtol": plan.rtol}
    settings |= {"atol": plan.atol, "probes": probes, "steps": steps, "max_matvecs": max_matvecs}
    settings |= {"kept": plan.kept, "seed": seed}
    file = Checkpoint(checkpoint, what=what, op=operator, settings=settings, seconds=checkpoint_seconds)
    with file, progress_bar(max_matvecs, enabled=progress, what=what) as bar:
        source = make_generator(seed, generator, operator.device)
        sampler = QuadratureSampler(operator, integrand, plan, source, file, bar, what)
        values = sampler.draw()
    count = len(values.value)
    spread = max(sampler.pilot_sd, float(values.value.std()))
    value, stderr = float(values.value.mean()), spread / count**0.5
    shape = Shape.of(values.value, min(count, PILOT if probes is None else count) - 1)
    notes = _notes(sampler, plan, size, values, stderr, asked=asked)
    if not all(integrand.proven):
        notes = (*notes, "the quadrature's bracket is an indication where it is not proven")
    return FunctionTrace(
        value=value,
        stderr=stderr,
        method="stochastic Lanczos quadrature",
        num_data=getattr(op, "num_data", None),
        matvecs=sampler.matvecs,
        seconds=time.perf_counter() - start,
        converged=len(notes) == (0 if all(integrand.proven) else 1),
        samples=values.value,
        notes=notes,
        lower=float(values.lower.mean()),
        upper=float(values.upper.mean()),
        proven=integrand.proven,
        steps=sampler.steps,
        dof=shape.dof,
        skewness=shape.skewness,
    )


def kept_of_group(op: LinearOperator, group: int, reorthogonalize: bool | int | None) -> int:
    """How many vectors each of a group's probes keeps; by default those that fit, where enough of them do."""
    fitting = BASIS_BYTES // (group * row_bytes(op))
    fitting = fitting if fitting >= FEWEST_KEPT else 0
    return kept_vectors(fitting if reorthogonalize is None else reorthogonalize, op.shape[0], fitting)


def _check_bounds(floor: float | None, ceiling: float | None) -> None:
    for name, bound in (("floor", floor), ("ceiling", ceiling)):
        if bound is not None and not math.isfinite(bound):
            raise ValueError(f"{name}: expected a finite number, got {bound!r}")
    if floor is not None and ceiling is not None and floor > ceiling:
        raise ValueError(f"floor: {floor!r} is above ceiling, {ceiling!r}")


def _points(f: Callable[[Tensor], Tensor]) -> Tensor:
    """The function's values at fixed points, by which a checkpoint recognises it."""
    points = torch.linspace(0.5, 20.0, 16, dtype=torch.float64)
    values = f(points)
    return values if isinstance(values, Tensor) else points


def _exact(op: Any, operator: LinearOperator, integrand: Integrand, start: float) -> FunctionTrace:
    size = operator.shape[0]
    matrix = require_finite(operator.to_dense().double().cpu(), "trace_function")
    largest = float(matrix.abs().max())
    if float((matrix - matrix.mT).abs().max()) > 1e3 * integrand.eps * largest:
        raise NotSymmetricError("op: it is not symmetric")
    eigenvalues = torch.linalg.eigvalsh(matrix)
    integrand.check_range(float(eigenvalues[0]), float(eigenvalues[-1]))
    if integrand.floor is not None:
        eigenvalues = eigenvalues.clamp(min=integrand.floor)
    values = integrand.f(eigenvalues.clone())
    if not bool(torch.isfinite(values).all()):
        at = float(eigenvalues[~torch.isfinite(values)][0])
        raise ValueError(f"f: it is not finite at the eigenvalue {at:.6g}")
    value = float(values.sum())
    return FunctionTrace(
        value=value,
        num_data=getattr(op, "num_data", None),
        matvecs=size,
        seconds=time.perf_counter() - start,
        lower=value,
        upper=value,
        proven=(True, True),
    )


def _notes(
    sampler: QuadratureSampler, plan: Plan, size: int, values: Values, stderr: float, *, asked: bool
) -> tuple[str, ...]:
    count, value, width = len(values.value), float(values.value.mean()), values.width
    if sampler.interrupted:
        return (f"interrupted with {count} probes of {sampler.steps} steps",)
    notes = []
    if plan.steps is not None and sampler.steps < min(plan.steps, size):
        notes.append(f"max_matvecs left {sampler.steps} of {plan.steps} steps")
    if plan.probes is None and sampler.wanted > count:
        notes.append(f"max_matvecs left {count} probes; {sampler.wanted} were planned")
    elif stderr > plan.tolerance(value) and (plan.probes is None or asked):
        notes.append("the probes spread more than the pilot's did; run again with more probes")
    if width > 0.3 * max(stderr, 0.1 * plan.tolerance(value)) + 1e-12 * abs(value):
        notes.append("the quadrature's bracket is not small beside the sampling error; allow more steps")
    return tuple(notes)
