"""Drawing until a relative error is met: how many more is looked at again after every round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rounds", "in_rounds"]

_ROUNDS = 4
_RESERVE = 1.1
UNREACHABLE = 10**12
"""Stands for more draws than any budget allows."""


class Rounds(NamedTuple):
    """Draws [k, ...] and what became of the goal."""

    values: Tensor
    wanted: int
    """Draws planned at last; more than there are where the budget was too small."""
    met: bool
    dear: bool = False
    """Whether it was given up because ``instead`` would be cheaper."""

    def notes(self, what: str, budget: str) -> tuple[str, ...]:
        """Why the goal was not met; ``what``: the draws in words."""
        if self.wanted > len(self.values):
            planned = "more" if self.wanted >= UNREACHABLE else str(self.wanted)
            return (f"{budget} allowed {len(self.values)} {what}; {planned} were planned",)
        return () if self.met else (f"the {what} spread more than the first had; ask for more samples",)


def in_rounds(
    draw: Callable[[int, int], Tensor],
    error: Callable[[Tensor], float],
    goal: Callable[[Tensor], float],
    *,
    first: int,
    samples: int | None,
    most: int,
    instead: int | None = None,
) -> Rounds:
    """Draw ``first``, then as many as their spread asks for, in at most four rounds.

    When to stop depends on the spread of the draws alone, not on their mean looking good.

    Args:
        draw: (index of the first, count) → draws [count, ...].
        error: standard error of the mean of some draws.
        goal: what it is to be.
        first: draws of the first round.
        samples: number of draws instead, without a goal.
        most: never more.
        instead: draws that another way costs; given up before a round that takes as many.
    """
    wanted = samples or first
    values = draw(0, min(wanted, most))
    if samples is not None:
        return Rounds(values, wanted, True)
    for _ in range(_ROUNDS - 1):
        spread, aim = error(values), goal(values)
        if spread <= aim or len(values) >= most:
            break
        ratio = (spread / aim) ** 2 if aim else math.inf
        wanted = math.ceil(min(_RESERVE * len(values) * ratio, UNREACHABLE))
        wanted = max(wanted, len(values) + 1)
        more = min(wanted, most) - len(values)
        if instead is not None and instead <= more:
            return Rounds(values, wanted, False, dear=True)
        values = torch.cat([values, draw(len(values), more)])
    return Rounds(values, wanted, error(values) <= goal(values))
