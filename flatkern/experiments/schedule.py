"""When to measure: before the first step, after the last, and in between at equal ratios."""

from __future__ import annotations

__all__ = ["log_schedule"]


def log_schedule(steps: int, points: int) -> list[int]:
    """Ascending steps from 0 to ``steps``: 0 and about ``points`` more, equally spaced in the logarithm.

    The first steps are too close together for integers to follow, so there are somewhat fewer.
    """
    if steps < 0 or points < 1:
        raise ValueError(f"steps {steps} and points {points}: at least 0 and 1 are needed")
    if steps == 0:
        return [0]
    spaced = [steps ** (i / max(points - 1, 1)) for i in range(points)]
    return sorted({0, steps, *(round(s) for s in spaced)})
