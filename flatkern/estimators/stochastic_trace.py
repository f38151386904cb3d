"""The trace of a linear operator: a pilot fixes the plan, then the plan is carried out."""

from __future__ import annotations

import os
import time
from typing import Any, get_args

import torch

from flatkern.estimators.checkpoint import Checkpoint, require_seed
from flatkern.estimators.common import (
    check_count,
    check_positive,
    in_own_precision,
    make_generator,
    progress_bar,
    square_operator,
)
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.probes import Probes
from flatkern.estimators.sample_shape import Shape
from flatkern.estimators.sampling_run import Run
from flatkern.estimators.trace_plan import UNREACHABLE, Goal
from flatkern.estimators.trace_request import Method, Request
from flatkern.results import Estimate

__all__ = ["trace"]

DEFAULT_RTOL = 0.05


@in_own_precision
def trace(
    op: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    samples: int | None = None,
    max_matvecs: int = 2000,
    method: Method = "auto",
    max_memory: int = 1 << 30,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = False,
) -> Estimate:
    """Tr A of a square operator, with the standard error of the estimate.

    With a tolerance a pilot of at least 16 vectors fixes the plan: which method, with how many products. Then
    the plan is carried out, and neither value nor error bar depends on when it looked good enough: stopping on
    a running interval is overconfident. ``estimate.interval(0.90)`` is a Student interval.

    Args:
        op: a flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``; need not be
            symmetric.
        rtol: aim at stderr ≤ rtol · |trace|; 0.05 where neither ``atol`` nor ``samples`` is given.
        atol: aim at stderr ≤ atol; with both, the looser one counts.
        samples: number k of probes or test vectors, at least 2; then there is no pilot, and ``"auto"`` is
            Hutchinson's estimate, or exact where P ≤ k.
        max_matvecs: all products together, pilot included.
        method: ``"hutchinson"``: mean of vᵀAv over sign vectors, k products. ``"hutch++"``: exact on the range
            of a sketch of k images, forms on the rest, 3 k products (with a tolerance both numbers are
            planned). ``"xtrace"``: every test vector tested against the range that the others found, 2 k
            products; exact with k ≥ rank + 1. ``"xnystrace"``: the same with Nyström approximations, for
            positive semi-definite operators, k products. ``"exact"``: P products. ``"auto"``: the one for which
            the pilot predicts the fewest products; XNysTrace only where ``op.semidefinite`` is true (the GGN of
            a loss with a convex closed form, Fisher matrices).
        max_memory: bytes for vectors that are kept: 4 k P numbers at the peak (XTrace, Hutch++; XNysTrace 2 k P).
            The number of vectors of a plan is bounded by it; Hutchinson keeps none.
        seed: integer seed; or ``generator``: a ``torch.Generator`` to draw from. The global one is never
            used. Vectors do not depend on the block size of the products.
        generator: see ``seed``.
        checkpoint: a file; the run's state is written there, and a run with the same arguments on the same
            operator continues from it to bit-identical results.
        checkpoint_seconds: least time between two writes.
        progress: show a bar.

    Returns:
        An :class:`flatkern.results.Estimate`. ``samples`` holds the k single values, [k] float64, ``dof`` the
        degrees of freedom of ``stderr``. ``converged`` is true when the run was cut neither by ``max_matvecs``
        nor by Ctrl-C and the final stderr met the tolerance. Quadratic forms are summed in float64, products
        are in the operator's dtype. Given the pilot, Hutchinson and Hutch++ are unbiased: they use fresh
        probes. XTrace and XNysTrace keep the pilot's vectors among their own.

    On Ctrl-C what is there is returned, with a note; a second Ctrl-C raises.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named; an indefinite operator with
            ``"xnystrace"``.
        FloatingPointError: products gave NaN or Inf.

    Sources: Hutchinson, Communications in Statistics 18 (1989); Meyer, Musco, Musco, Woodruff, "Hutch++",
    SOSA 2021; Epperly, Tropp, Webber, "XTrace", SIAM J. Matrix Anal. Appl. 45 (2024).

    Example:
        >>> import torch
        >>> from flatkern.estimators import trace
        >>> float(trace(torch.diag(torch.arange(1.0, 101.0)), samples=4, seed=0))  # diagonal: no variance
        5050.0
        >>> low_rank = torch.ones(500, 3, dtype=torch.float64) @ torch.ones(3, 500, dtype=torch.float64)
        >>> estimate = trace(low_rank, rtol=0.01, method="xtrace", seed=0)
        >>> round(float(estimate), 6), estimate.matvecs
        (1500.0, 32)
    """
    start = time.perf_counter()
    operator = square_operator(op)
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is unknown; expected one of {', '.join(get_args(Method))}")
    goal = Goal(check_positive(rtol, "rtol"), check_positive(atol, "atol"))
    check_count(max_matvecs, "max_matvecs", least=2)
    check_count(max_memory, "max_memory")
    if samples is not None:
        check_count(samples, "samples", least=2)
    elif goal == Goal(None, None):
        goal = Goal(DEFAULT_RTOL, None)
    require_seed(checkpoint, generator)
    semidefinite = bool(getattr(op, "semidefinite", False))
    request = Request(method, goal, samples, max_matvecs, max_memory, semidefinite)
    request.check(operator.shape[0], operator.dtype)
    make_generator(seed, generator, operator.device)  # bad ones are refused before anything is written
    settings = {"seed": seed, "rtol": rtol, "atol": atol, "samples": samples, "max_matvecs": max_matvecs,
                "method": method, "max_memory": max_memory}  # fmt: skip
    with (
        Interruptible() as stop,
        Checkpoint(
            checkpoint, what="trace", op=operator, settings=settings, seconds=checkpoint_seconds
        ) as file,
        progress_bar(samples or max_matvecs, enabled=progress, what="trace") as bar,
    ):
        run = Run(operator, bar, file, stop, max_matvecs)
        source = make_generator(run.seed(seed) if checkpoint else seed, generator, operator.device)
        outcome, wanted, tolerance_known = request.perform(run, Probes(operator, source))
        run.save()
        if outcome is None:
            raise KeyboardInterrupt("interrupted before there were two values")
        cut = run.interrupted
    values = outcome.values
    value, stderr = float(values.mean()), outcome.stderr
    met = stderr <= goal.tolerance(value)
    # the leave-one-out values of the sketches are not independent: their shape says nothing of the mean's
    shape = Shape.of(values, len(values) - 1) if outcome.independent else Shape(len(values) - 1, 0.0)
    return Estimate(
        value=value,
        stderr=stderr,
        method=outcome.method,
        num_data=getattr(op, "num_data", None),
        matvecs=run.matvecs,
        seconds=time.perf_counter() - start,
        converged=met and not cut and wanted <= max_matvecs,
        samples=None if outcome.exact else values,
        dof=None if outcome.exact else shape.dof,
        skewness=shape.skewness,
        notes=_notes(cut, wanted, max_matvecs, met, planned=tolerance_known),
    )


def _notes(cut: bool, wanted: int, budget: int, met: bool, *, planned: bool) -> tuple[str, ...]:
    if cut:
        return ("interrupted: the values made until then",)
    if wanted >= UNREACHABLE:
        return (f"max_matvecs: {budget} products were made; the trace is about zero beside its spread",)
    if wanted > budget:
        return (f"max_matvecs: {wanted} products were planned, {budget} allowed",)
    if met:
        return ()
    if not planned:
        return (f"max_matvecs: {budget} products are too few for a pilot and an estimate",)
    return ("the values spread more than the pilot had predicted; run again with more samples",)
