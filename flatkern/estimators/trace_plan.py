"""From a pilot to a plan: how many products each method would take, and which takes fewest."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from flatkern.estimators.decay import Decay

__all__ = ["PILOT", "Goal", "Plan", "choose", "samples_for"]

PILOT = 16
"""Fewest samples of a pilot, and of an estimate to a tolerance."""
CAUTION = 0.5
"""How many of its own standard errors are added to the predicted variance of XTrace and XNysTrace."""
UNREACHABLE = 1 << 40
GROWTH = 1.125
"""By how much a pilot grows between two looks at it."""


@dataclass(frozen=True)
class Goal:
    """The standard error aimed at."""

    rtol: float | None
    atol: float | None

    def tolerance(self, value: float) -> float:
        """The looser of the two, given a value of the trace; infinite without either."""
        if self.rtol is None and self.atol is None:
            return math.inf
        return max((self.rtol or 0.0) * abs(value), self.atol or 0.0)


@dataclass(frozen=True)
class Plan:
    """``vectors`` in the sketch and ``forms`` beside it, for ``cost`` products beyond those made."""

    method: str
    vectors: int
    forms: int
    cost: int


def samples_for(variance: float, tolerance: float, doubt: float) -> int:
    """How many independent values bring the standard error to ``tolerance``, at least 16.

    ``doubt`` is the relative error of variance/tolerance². The standard error found in the end scatters as
    well, by 1/√(2n): the plan allows for one standard error of both.
    """
    if variance <= 0 or math.isinf(tolerance):
        return PILOT
    if tolerance <= 0 or (count := variance / tolerance**2) > UNREACHABLE:
        return UNREACHABLE
    plain = count
    for _ in range(20):
        count = plain * (1 + math.sqrt(2 / max(count, PILOT) + doubt**2))
    return max(PILOT, math.ceil(count))


def doubt_of(trace: float, stderr: float, goal: Goal) -> float:
    """Relative error of the squared tolerance that comes from the pilot's trace."""
    relative = goal.rtol is not None and goal.tolerance(trace) > (goal.atol or 0.0)
    return min(1.0, 2 * stderr / abs(trace)) if relative and trace else 0.0


def next_size(m: int) -> int:
    """How many vectors a pilot of m has at the next look."""
    return max(m + 2, int(GROWTH * m))


def choose(
    decay: Decay, goal: Goal, methods: Collection[str], size: int, *, most: int, left: int
) -> tuple[Plan, int]:
    """The cheapest plan within ``left`` products and ``most`` vectors, and what it should have cost.

    Where nothing is enough, the plan that comes closest with what is left; its cost then is less than what is
    said beside it.
    """
    tolerance = goal.tolerance(decay.trace)
    doubt = doubt_of(decay.trace, decay.trace_stderr, goal)
    m = decay.seen
    plans: list[Plan] = []
    if "exact" in methods:
        plans.append(Plan("exact", 0, 0, size))
    if "hutchinson" in methods:
        count = samples_for(decay.sign_variance, tolerance, math.hypot(doubt, decay.relative_error))
        plans.append(Plan("hutchinson", 0, count, count))
    if "xtrace" in methods:
        vectors = vectors_for(decay.form_variance, tolerance, doubt, m, most)
        plans.append(Plan("xtrace", vectors, 0, 2 * vectors - m))
    if "xnystrace" in methods and decay.nystrom is not None:
        vectors = vectors_for(decay.nystrom_variance, tolerance, doubt, m, most, shared=0.5, most_shared=2.0)
        plans.append(Plan("xnystrace", vectors, 0, vectors - m))
    if "hutch++" in methods:
        for rank in _ranks(m, most):
            forms = samples_for(decay.form_variance(rank), tolerance, doubt)
            plans.append(Plan("hutch++", rank, forms, 2 * rank - m + forms))
    best = min(plans, key=lambda plan: plan.cost)
    if best.cost <= left:
        return best, best.cost
    return _closest(decay, plans, most, left), best.cost


def _ranks(m: int, most: int) -> list[int]:
    ranks, rank = [], m
    while rank <= most:
        ranks.append(rank)
        rank = max(rank + 1, int(1.15 * rank))
    return ranks


def vectors_for(
    variance: Callable[[int], float],
    tolerance: float,
    doubt: float,
    m: int,
    most: int,
    *,
    shared: float = 1.0,
    most_shared: float = 1.0,
) -> int:
    """Fewest test vectors, at least as many as there are, whose leave-one-out mean is good enough.

    The values share a range, and are the more correlated the faster the spectrum decays: where the variance
    falls like rank^(−β), the mean varies about 1 + shared · β times as much as that of independent values
    would, up to 1 + most_shared.
    """
    vectors = m
    while vectors <= most:
        rank, before = vectors - 1, int(0.7 * (vectors - 1))
        one, earlier = variance(rank), variance(before)
        decay = math.log(earlier / one) / math.log(rank / before) if earlier > one > 0 < before else 0.0
        spread = (
            one * (1 + min(most_shared, shared * decay)) * (1 + CAUTION * math.sqrt(2 / vectors + doubt**2))
        )
        if spread / vectors <= tolerance**2:
            return vectors
        vectors = max(vectors + 1, int(1.03 * vectors))
    return UNREACHABLE


def _closest(decay: Decay, plans: list[Plan], most: int, left: int) -> Plan:
    m, reached = decay.seen, []
    for method in {plan.method for plan in plans}:
        if method == "hutchinson" and left >= 2:
            reached.append((decay.sign_variance / left, Plan(method, 0, left, left)))
        if method == "xtrace" and (v := min(most, (left + m) // 2)) >= m:
            reached.append((decay.form_variance(v - 1) / v, Plan(method, v, 0, 2 * v - m)))
        if method == "xnystrace" and (v := min(most, left + m)) >= m:
            reached.append((decay.nystrom_variance(v - 1) / v, Plan(method, v, 0, v - m)))
        if method == "hutch++":
            for rank in _ranks(m, most):
                if (forms := left + m - 2 * rank) >= 2:
                    plan = Plan(method, rank, forms, left)
                    reached.append((decay.form_variance(rank) / forms, plan))
    if not reached:
        raise ValueError(
            f"max_matvecs: {left} products are left after a pilot of {m}, too few for any estimate"
        )
    return min(reached, key=lambda pair: pair[0])[1]
