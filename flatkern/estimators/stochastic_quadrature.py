"""Probes for the trace of a matrix function: a pilot finds the number of steps and of probes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.estimators.checkpoint import Checkpoint
from flatkern.estimators.common import rows_per_block
from flatkern.estimators.function_trace import Integrand, Values
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.lanczos import LockstepLanczos
from flatkern.estimators.probes import Probes
from flatkern.operators.base import LinearOperator

__all__ = ["PILOT", "Plan", "QuadratureSampler", "group_size"]

PILOT = 16
"""Probes whose spread fixes the number of all."""
RESERVE = 1.5
"""Planned probes over (sd/tolerance)²: the spread of 16 probes is itself known to some 18 % only."""
SHARE = 0.1
"""Width of the bracket, relative to the sampling error, at which no more steps are made."""
FIRST_LOOK = 8


@dataclass(frozen=True)
class Plan:
    """What a run may do and when it is good enough."""

    probes: int | None
    steps: int | None
    rtol: float
    atol: float
    max_matvecs: int
    kept: int
    """Vectors that each probe keeps for re-orthogonalization."""

    @property
    def pilot(self) -> int:
        """Probes in the first round."""
        return self.probes or PILOT

    def tolerance(self, value: float) -> float:
        """The standard error aimed at."""
        return max(self.rtol * abs(value), self.atol)

    def wide(self, values: Values, share: float = SHARE) -> bool:
        """Whether the bracket still matters beside the sampling error these probes are part of."""
        mean, spread = float(values.value.mean()), float(values.value.std())
        tolerance = self.tolerance(mean)
        sampling = spread / self.pilot**0.5
        if self.probes is None:
            sampling = min(sampling, tolerance)
        return values.width > share * max(sampling, 0.1 * tolerance) + 1e-13 * abs(mean)


def group_size(op: LinearOperator, probes: int) -> int:
    """How many of so many probes run in lockstep."""
    return min(max(4, rows_per_block(op)), probes)


class QuadratureSampler:
    """Values of ∫ f over the spectral measures of random sign vectors, times P.

    The first group of probes decides the number of steps, looking at its bracket after 8 steps and then after a
    quarter more each time; the pilot of 16 then decides the number of probes.
    """

    def __init__(
        self,
        op: LinearOperator,
        integrand: Integrand,
        plan: Plan,
        generator: torch.Generator,
        file: Checkpoint,
        bar: tqdm,
        what: str,
    ) -> None:
        self._op, self._integrand, self._plan = op, integrand, plan
        self._probes, self._file, self._bar, self._what = Probes(op, generator), file, bar, what
        self._cap = min(op.shape[0], plan.max_matvecs // plan.pilot)
        self._steps = 0  # of each probe; 0 until it is decided
        self._parts: list[Values] = []
        self._run: LockstepLanczos | None = None
        self.matvecs = 0
        self.pilot_sd = 0.0
        self.wanted = plan.pilot
        self.interrupted = False
        if file.state is not None:
            self._restore(file.state)
            file.state = None

    @property
    def steps(self) -> int:
        """Steps made with each probe."""
        return self._steps

    def draw(self) -> Values:
        """All the probes' values."""
        plan = self._plan
        with Interruptible() as stop:
            self._round(plan.pilot, stop)
            pilot = Values.joined(self._parts)
            if not self.interrupted and len(pilot.value) >= 2:
                first = pilot.value[: plan.pilot]
                self.pilot_sd = float(first.std())
                if plan.probes is None:
                    tolerance = plan.tolerance(float(first.mean()))
                    if self.pilot_sd > 0:
                        ratio = self.pilot_sd / tolerance if tolerance > 0 else math.inf
                        self.wanted = max(PILOT, math.ceil(min(RESERVE * ratio**2, 1e15)))
                    affordable = PILOT + (plan.max_matvecs - PILOT * self._steps) // self._steps
                    self._round(min(self.wanted, affordable), stop)
        if not self.interrupted:
            self._save()
        return Values.joined(self._parts)

    def _save(self) -> None:
        if self._file.writes:
            self._file.save(**self._state())

    def _round(self, count: int, stop: Interruptible) -> None:
        """Groups of probes until there are ``count``."""
        self._bar.total = count * (self._steps or self._cap)
        while not self.interrupted and (have := sum(len(p.value) for p in self._parts)) < count:
            if self._run is None:
                self._run = self._start(group_size(self._op, count - have))
            values = self._finish(self._run, stop)
            if values is not None:
                self._parts.append(values)
                self._run = None

    def _start(self, count: int) -> LockstepLanczos:
        vectors = self._probes.signs(count).div_(self._op.shape[0] ** 0.5)
        return LockstepLanczos(self._op, vectors, keep=self._plan.kept, what=self._what)

    def _finish(self, run: LockstepLanczos, stop: Interruptible) -> Values | None:
        """All steps of one group; ``None`` where an interrupt cut a later group short."""
        goal = self._steps or min(self._cap, self._plan.steps or FIRST_LOOK)
        goal = max(goal, self._looked(run.steps))
        while True:
            while run.steps < goal and not (stop.requested and run.steps):
                run.step()
                self.matvecs += run.count
                self._bar.update(run.count)
                if self._file.due():
                    self._save()
            self.interrupted = run.steps < goal
            if self.interrupted:
                self._save()
                if self._parts:
                    return None
            values = self._values(run)
            decided = bool(self._steps) or self._plan.steps is not None or goal >= self._cap
            if self.interrupted or decided or not self._plan.wide(values):
                self._steps = run.steps
                return values
            goal = self._next(goal)

    def _next(self, goal: int) -> int:
        return min(self._cap, max(goal + FIRST_LOOK, goal + goal // 4))

    def _looked(self, steps: int) -> int:
        """The look that a group resumed after so many steps was on its way to."""
        if self._steps or self._plan.steps is not None or steps == 0:
            return 0
        goal = min(self._cap, FIRST_LOOK)
        while goal < steps:
            goal = self._next(goal)
        return goal

    def _values(self, run: LockstepLanczos) -> Values:
        size = self._op.shape[0]
        values = self._integrand.evaluate(run.tridiagonals())
        return Values(size * values.value, size * values.lower, size * values.upper)

    # -- going on in another process ---------------------------------------------------------------
    def _state(self) -> dict[str, Tensor]:
        done = (
            Values.joined(self._parts) if self._parts else Values(*[torch.empty(0, dtype=torch.float64)] * 3)
        )
        state = {
            "values": torch.stack([done.value, done.lower, done.upper]),
            "numbers": torch.tensor([self._steps, self.matvecs]),
            "probes": self._probes.state(),
        }
        if self._run is not None and self._run.steps:
            state |= {f"run.{key}": value for key, value in self._run.state().items()}
        return state

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        if state["values"].shape[1]:
            self._parts = [Values(*state["values"].unbind())]
        self._steps, self.matvecs = (int(n) for n in state["numbers"])
        self._probes.resume(state["probes"])
        run = {key.removeprefix("run."): value for key, value in state.items() if key.startswith("run.")}
        if run:
            start = torch.empty(run["current"].shape, dtype=self._op.dtype, device=self._op.device)
            self._run = LockstepLanczos(self._op, start, keep=self._plan.kept, what=self._what)
            self._run.restore(run)
        self._bar.update(self.matvecs)
