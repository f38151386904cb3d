"""The trace of a linear operator: a pilot fixes the plan, then the plan is carried out."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from flatkern.estimators.checkpoint import Checkpoint, require_seed
from flatkern.estimators.common import (
    check_count,
    check_positive,
    make_generator,
    progress_bar,
    require_finite,
    square_operator,
)
from flatkern.estimators.decay import Decay, observe
from flatkern.estimators.hutchinson import quadratic_forms
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.probes import Probes
from flatkern.estimators.sampling_run import Run
from flatkern.estimators.sketch import Sketch, largest_sketch
from flatkern.estimators.trace_methods import Outcome, carry_out, refuse_indefinite, sketch_forms
from flatkern.estimators.trace_plan import (
    PILOT,
    UNREACHABLE,
    Goal,
    Plan,
    choose,
    doubt_of,
    next_size,
    samples_for,
)
from flatkern.results import Estimate, standard_error

__all__ = ["trace"]

DEFAULT_RTOL = 0.05
EXPLORE = 12
"""A pilot grows while it is at most a twelfth of what the plan costs."""

Method = Literal["auto", "hutchinson", "hutch++", "xtrace", "xnystrace", "exact"]


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
    request = _Request(method, goal, samples, max_matvecs, max_memory, semidefinite)
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
    return Estimate(
        value=value,
        stderr=stderr,
        method=outcome.method,
        num_data=getattr(op, "num_data", None),
        matvecs=run.matvecs,
        seconds=time.perf_counter() - start,
        converged=met and not cut and wanted <= max_matvecs,
        samples=None if outcome.exact else values,
        dof=None if outcome.exact else len(values) - 1,
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


@dataclass(frozen=True)
class _Request:
    """What was asked for. ``perform`` gives the outcome, the products wanted, and whether there was a pilot."""

    method: Method
    goal: Goal
    samples: int | None
    max_matvecs: int
    max_memory: int
    semidefinite: bool

    def check(self, size: int, dtype: torch.dtype) -> None:
        if self.method == "exact" and size > self.max_matvecs:
            raise ValueError(
                f"max_matvecs: the exact trace takes {size} products, more than {self.max_matvecs}"
            )
        if self.method in ("auto", "hutchinson", "exact"):
            return
        least = self.samples or min(PILOT, size)
        most = min(size, self.most(size, dtype))
        if self.samples is not None and self.samples > size and self.method != "hutch++":
            raise ValueError(
                f"samples: {self.method} takes at most P = {size} test vectors, not {self.samples}"
            )
        if min(least, size) > most:
            raise ValueError(
                f"max_memory: {self.method} with {least} vectors of {size} numbers takes "
                f"{4 * least * size * dtype.itemsize} bytes; allow more, or use method='hutchinson'"
            )
        needed = {"hutch++": 2 * min(least, size) + 2, "xtrace": 2 * least, "xnystrace": least}[self.method]
        if needed > self.max_matvecs:
            raise ValueError(
                f"max_matvecs: {self.method} with {least} vectors takes at least {needed} products"
            )

    def most(self, size: int, dtype: torch.dtype) -> int:
        return largest_sketch(size, dtype.itemsize, self.max_memory)

    def perform(self, run: Run, probes: Probes) -> tuple[Outcome | None, int, bool]:
        size = run.op.shape[0]
        outright = 2 * PILOT if self.samples is None else self.samples
        # a sketch of 16 and its 16 further products are never fewer than P = 32
        either = self.method == "auto" or (self.samples is None and self.method != "hutchinson")
        if self.method == "exact" or (either and size <= min(outright, run.left)):
            return self._finish(run, probes, Plan("exact", 0, 0, size), size, None)
        if self.samples is not None:
            return self._fixed(run, probes, self.samples)
        most = min(size, self.most(size, run.op.dtype))
        if self.method == "hutchinson" or (self.method == "auto" and (most < PILOT or run.left <= 2 * PILOT)):
            return self._hutchinson(run, probes)
        return self._planned(run, probes, most)

    def _finish(
        self, run: Run, probes: Probes, plan: Plan, wanted: int, sketch: Sketch | None, *, pilot: bool = True
    ) -> tuple[Outcome | None, int, bool]:
        run.expect(run.matvecs + plan.cost)
        outcome = carry_out(run, probes, plan, sketch)
        if outcome is None and sketch is not None:
            outcome = sketch_forms(sketch)
        return outcome, wanted, pilot

    def _fixed(self, run: Run, probes: Probes, k: int) -> tuple[Outcome | None, int, bool]:
        if self.method in ("auto", "hutchinson"):
            count = min(k, run.left)
            return self._finish(run, probes, Plan("hutchinson", 0, count, count), k, None)
        rank = min(k, run.op.shape[0])
        vectors, forms, wanted = {
            "hutch++": (rank, min(k, run.left - 2 * rank), 2 * rank + k),
            "xtrace": (k, 0, 2 * k),
            "xnystrace": (k, 0, k),
        }[self.method]
        cost = wanted if self.method != "hutch++" else 2 * rank + forms
        return self._finish(
            run, probes, Plan(self.method, vectors, forms, cost), wanted, Sketch(run, probes.normals)
        )

    def _hutchinson(self, run: Run, probes: Probes) -> tuple[Outcome | None, int, bool]:
        """A pilot of probes that are not kept, grown to a twelfth of the plan; then fresh ones."""
        if run.left <= 2 * PILOT:
            plan = Plan("hutchinson", 0, run.left, run.left)
            return self._finish(run, probes, plan, plan.cost, None, pilot=False)
        pilot = quadratic_forms(run, probes, PILOT, stage="pilot0")
        plan = self._from_forms(pilot)
        more = min(plan.cost, run.left) // EXPLORE - PILOT
        if more > 0 and not run.interrupted:
            pilot = torch.cat([pilot, quadratic_forms(run, probes, more, stage="pilot1")])
            plan = self._from_forms(pilot)
        wanted = run.matvecs + plan.cost
        count = min(plan.forms, run.left)
        if run.interrupted:
            return (Outcome("hutchinson", pilot.cpu()) if len(pilot) > 1 else None), wanted, True
        exact = run.op.shape[0]
        if self.method == "auto" and exact <= min(count, run.left):
            return self._finish(run, probes, Plan("exact", 0, 0, exact), exact, None)
        return self._finish(run, probes, Plan("hutchinson", 0, count, count), min(wanted, UNREACHABLE), None)

    def _from_forms(self, pilot: torch.Tensor) -> Plan:
        values = require_finite(pilot.cpu(), "trace")
        if len(values) < 2:
            return Plan("hutchinson", 0, PILOT, PILOT)
        mean, stderr = float(values.mean()), standard_error(values) or 0.0
        variance, fourth = float(values.var()), float((values - mean).pow(4).mean())
        spread = max(2.0, fourth / variance**2 - 1) if variance > 0 else 0.0
        doubt = math.hypot(math.sqrt(spread / len(values)), doubt_of(mean, stderr, self.goal))
        count = samples_for(variance, self.goal.tolerance(mean), doubt)
        return Plan("hutchinson", 0, count, count)

    def _planned(self, run: Run, probes: Probes, most: int) -> tuple[Outcome | None, int, bool]:
        """A sketch that grows while it is cheap beside the plan or part of it, then the plan."""
        size, eps = run.op.shape[0], torch.finfo(run.op.dtype).eps
        methods = [self.method] if self.method != "auto" else ["exact", "hutchinson", "hutch++", "xtrace"]
        if self.method == "auto" and self.semidefinite:
            methods.append("xnystrace")
        sketch = Sketch(run, probes.normals)
        target = min(PILOT, most)
        while True:
            sketch.grow(target)
            if run.interrupted:
                return sketch_forms(sketch), run.matvecs, True
            decay = observe(sketch, size, eps)
            if self.method == "xnystrace":
                if not decay.symmetric:
                    raise NotSymmetricError(
                        "op: it is not symmetric, which xnystrace needs; use method='xtrace'"
                    )
                if decay.nystrom is None:
                    refuse_indefinite(sketch)
            plan, cost = choose(decay, self.goal, methods, size, most=most, left=run.left)
            target = self._next_size(decay, plan, most)
            if target <= len(sketch):
                break
        spent = run.matvecs
        return self._finish(run, probes, plan, min(spent + cost, UNREACHABLE), sketch)

    @staticmethod
    def _next_size(decay: Decay, plan: Plan, most: int) -> int:
        """How far the sketch should grow before the next look; no further: its present size."""
        m = decay.seen
        step = next_size(m)
        if plan.vectors > step:  # its vectors are part of the plan
            return step
        if plan.vectors <= m and step <= min(most, plan.cost // EXPLORE):
            return step
        return m
