"""Quantiles of Student's t distribution, without SciPy."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["reaches", "student_quantile"]


def reaches(level: float, stderr: float, dof: int | None, skewness: float) -> tuple[float, float]:
    """How far an interval goes below and above a mean: t · stderr ∓ γ (1 + 2 t²) stderr / 6.

    γ is the skewness of the mean; the shift inverts Johnson's modified t statistic ("Modified t tests and
    confidence intervals for asymmetrical populations", JASA 73, 1978). Where it is larger than t · stderr the
    expansion says nothing, and it is cut there.

    Raises:
        ValueError: ``level`` is not between 0 and 1.

    Example:
        >>> reaches(0.9, 1.0, 15, 0.0) == (student_quantile(0.95, 15),) * 2
        True
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level!r}")
    if not stderr:
        return 0.0, 0.0
    t = student_quantile((1 + level) / 2, dof)
    shift = max(-t, min(t, skewness * (1 + 2 * t * t) / 6))
    return (t - shift) * stderr, (t + shift) * stderr


def student_quantile(probability: float, dof: int | None) -> float:
    """The t with P(T ≤ t) = probability for an integer number of degrees of freedom; ``None``: the normal one.

    By bisection of the finite series of the distribution function (Abramowitz and Stegun 26.7.3, 26.7.4); from
    1,000 degrees of freedom on by the first two terms of the Cornish–Fisher expansion, right to 1e-9 there.

    Example:
        >>> round(student_quantile(0.95, 15), 4)
        1.7531
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability: expected a number between 0 and 1, got {probability!r}")
    if dof is not None and dof < 1:
        raise ValueError(f"dof: expected at least 1, got {dof!r}")
    if probability < 0.5:
        return -student_quantile(1 - probability, dof)
    normal = NormalDist().inv_cdf(probability)
    if dof is None:
        return normal
    if dof >= 1000:
        first = (normal**3 + normal) / 4
        second = (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
        return normal + first / dof + second / dof**2
    low, high = 0.0, math.pi / 2  # the angle whose tangent is t/√dof: bounded, whatever the quantile
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, dof) < 2 * probability - 1 else (low, middle)
    return math.sqrt(dof) * math.tan(low)


def _central(angle: float, dof: int) -> float:
    """P(|T| ≤ √dof · tan angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = 1.0 if dof % 2 == 0 else cosine
    for j in range(1 if dof % 2 == 0 else 2, dof - 1, 2):
        term *= cosine * cosine * j / (j + 1)
        total += term
    if dof % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if dof > 1 else 0.0))
