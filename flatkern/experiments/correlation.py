"""Correlations across runs, with the intervals and corrections that a handful of runs calls for."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.stats import bootstrap  # type: ignore[attr-defined]

__all__ = [
    "Coefficient",
    "Correlation",
    "correlate",
    "correlation_star",
    "correlation_table",
    "holm",
    "pearson",
    "spearman",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Coefficient:
    """A correlation coefficient with its bootstrap 95 % interval and its p-value against no correlation."""

    value: float
    low: float
    high: float
    p_value: float
    p_holm: float = math.nan
    """The p-value corrected for all pairs of the table (Holm)."""


@dataclass(frozen=True)
class Correlation:
    """How two quantities go together across runs."""

    first: str
    second: str
    runs: int
    pearson: Coefficient
    spearman: Coefficient


def pearson(x: Array, y: Array, axis: int = -1) -> Array:
    """Pearson's r along an axis; NaN where one side does not vary."""
    a = x - x.mean(axis=axis, keepdims=True)
    b = y - y.mean(axis=axis, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=axis) * (b * b).sum(axis=axis))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.clip((a * b).sum(axis=axis) / scale, -1.0, 1.0))


def spearman(x: Array, y: Array, axis: int = -1) -> Array:
    """Spearman's rank correlation along an axis: Pearson's r of the ranks, ties sharing theirs."""
    return pearson(stats.rankdata(x, axis=axis), stats.rankdata(y, axis=axis), axis=axis)


def correlate(
    x: Sequence[float], y: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> tuple[Coefficient, Coefficient, int]:
    """Pearson and Spearman coefficients of paired values, and the number of pairs that are finite."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    kept = np.isfinite(a) & np.isfinite(b)
    a, b = a[kept], b[kept]
    n = len(a)
    if n < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        nothing = Coefficient(math.nan, math.nan, math.nan, math.nan)
        return nothing, nothing, n
    with warnings.catch_warnings():
        # degenerate resamples are dealt with in _coefficient (scipy warns of them with a RuntimeWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        return (
            _coefficient(pearson, stats.pearsonr(a, b).pvalue, a, b, resamples, seed),
            _coefficient(spearman, stats.spearmanr(a, b).pvalue, a, b, resamples, seed),
            n,
        )


def _coefficient(
    statistic: Callable[..., Array], p_value: float, a: Array, b: Array, resamples: int, seed: int
) -> Coefficient:
    low = high = math.nan
    # BCa corrects the skew of a correlation's distribution; where it is degenerate (every resample the same,
    # or one of equal points) the plain percentiles of the resamples that have a value are left
    for method in ("BCa", "percentile"):
        found = bootstrap(
            (a, b),
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            method=method,
            rng=np.random.default_rng(seed),
        )
        low, high = (float(v) for v in found.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            break
        drawn = np.asarray(found.bootstrap_distribution)
        drawn = drawn[np.isfinite(drawn)]
        if len(drawn) > resamples // 2:
            low, high = (float(v) for v in np.quantile(drawn, (0.025, 0.975)))
            break
    return Coefficient(float(statistic(a, b)), low, high, float(p_value))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the family's chance of one false alarm stays below the level. NaN stays NaN."""
    corrected = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = running
    return corrected


def correlation_table(
    columns: Mapping[str, Sequence[float]], *, resamples: int = 2000, seed: int = 0
) -> list[Correlation]:
    """Every pair of columns (one value a run), p-values corrected over the whole table."""
    return _corrected(columns, list(itertools.combinations(columns, 2)), resamples, seed)


def correlation_star(
    centre: tuple[str, Sequence[float]],
    columns: Mapping[str, Sequence[float]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Correlation]:
    """One column with each of the others, p-values corrected over these pairs."""
    name, values = centre
    return _corrected({name: values, **columns}, [(name, key) for key in columns], resamples, seed)


def _corrected(
    columns: Mapping[str, Sequence[float]], pairs: list[tuple[str, str]], resamples: int, seed: int
) -> list[Correlation]:
    found = [correlate(columns[a], columns[b], resamples=resamples, seed=seed) for a, b in pairs]
    by_pearson = holm([f[0].p_value for f in found])
    by_spearman = holm([f[1].p_value for f in found])
    return [
        Correlation(a, b, n, _with_holm(r, p), _with_holm(rho, q))
        for (a, b), (r, rho, n), p, q in zip(pairs, found, by_pearson, by_spearman, strict=True)
    ]


def _with_holm(c: Coefficient, p: float) -> Coefficient:
    return Coefficient(c.value, c.low, c.high, c.p_value, p)
