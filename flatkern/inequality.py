"""A chain of inequalities in log space, and the verdict on it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Inequality", "chain", "log_mean_exp", "log_of", "not_applicable"]


@dataclass(frozen=True)
class Inequality:
    """A chain of sides, each at most the next, as natural logarithms (they span many decades)."""

    name: str
    sides: dict[str, float]
    """Natural logs of the sides, from left to right; those that need a missing condition are absent."""
    status: str
    """``"holds"``, ``"violated"`` or ``"not applicable"``."""
    reason: str = ""
    """Why it is not applicable, or which side is violated and by how much."""
    replacement: str = ""
    """The inequality that stands in for this one where it is not applicable."""
    per_sample: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Logs of the sides for each sample, [n], for an inequality about single samples."""

    @property
    def looseness(self) -> float:
        """log(last side) − log(first side); divide by log 10 for decades. NaN where not applicable."""
        values = list(self.sides.values())
        if not self.applicable:
            return math.nan
        return 0.0 if values[0] == values[-1] else values[-1] - values[0]  # both may be log 0

    @property
    def applicable(self) -> bool:
        """Whether the conditions of the inequality are met."""
        return self.status != "not applicable"


def chain(name: str, sides: dict[str, float], slack: float, reason: str = "") -> Inequality:
    """The verdict on sides that should be in order, up to rounding."""
    for (left, a), (right, b) in itertools.pairwise(sides.items()):
        if math.isnan(a) or math.isnan(b):
            return Inequality(name, sides, "violated", f"log {left} or log {right} is NaN")
        if a > b + slack * max(1.0, abs(b)) and a != -math.inf:
            return Inequality(name, sides, "violated", f"log {left} exceeds log {right} by {a - b:.3g}")
    return Inequality(name, sides, "holds", reason)


def not_applicable(name: str, sides: dict[str, float], reason: str, replacement: str = "") -> Inequality:
    """What is known of an inequality whose conditions are not met."""
    return Inequality(name, sides, "not applicable", reason, replacement)


def log_of(value: Tensor | float) -> float:
    """log, −inf for 0 (and for what rounding has put below)."""
    number = float(value)
    return math.log(number) if number > 0 else -math.inf


def log_mean_exp(logs: Tensor) -> float:
    """log of the mean of exp(logs)."""
    return float(torch.logsumexp(logs, 0)) - math.log(len(logs))
