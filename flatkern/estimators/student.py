"""Quantiles of Student's t distribution."""

from __future__ import annotations

import math

__all__ = ["t_quantile"]


def t_quantile(level: float, dof: int) -> float:
    """t with P(|T| ≤ t) = ``level`` for T of Student's distribution with ``dof`` degrees of freedom.

    Source: Abramowitz, Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4; inverted by bisection.
    """
    low, high = 0.0, math.pi / 2  # θ = arctan(t/√dof)
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _inside(middle, dof) < level else (low, middle)
    return math.tan(0.5 * (low + high)) * dof**0.5


def _inside(theta: float, dof: int) -> float:
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = dof % 2
    term = cosine if odd else 1.0
    total = 0.0
    for j in range(1, dof // 2 + 1):
        total += term
        term *= cosine * cosine * ((2 * j) / (2 * j + 1) if odd else (2 * j - 1) / (2 * j))
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
