"""From what was asked for to an outcome: a fixed number of samples, or a pilot that grows and a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flatkern.estimators.common import require_finite
from flatkern.estimators.decay import Decay, observe
from flatkern.estimators.hutchinson import quadratic_forms
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
from flatkern.results import standard_error

__all__ = ["Method", "Request"]

EXPLORE = 8
"""A pilot grows while it is at most an eighth of what the plan costs."""

Method = Literal["auto", "hutchinson", "hutch++", "xtrace", "xnystrace", "exact"]


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    method: Method
    goal: Goal
    samples: int | None
    max_matvecs: int
    max_memory: int
    semidefinite: bool

    def check(self, size: int, dtype: torch.dtype) -> None:
        """Refuse what cannot be done, naming the argument."""
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
        """How many vectors fit into ``max_memory``."""
        return largest_sketch(size, dtype.itemsize, self.max_memory)

    def perform(self, run: Run, probes: Probes) -> tuple[Outcome | None, int, bool]:
        """The outcome (``None``: interrupted too early), the products wanted, whether there was a pilot."""
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
        """A pilot of probes that are not kept, grown to an eighth of the plan; then fresh ones."""
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

    def _from_forms(self, pilot: Tensor) -> Plan:
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
            if self.method == "xnystrace" and decay.nystrom is None:
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
