"""How quantities go with sharpness along a single run, after its loss has flattened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap  # type: ignore[attr-defined]

from flatkern.experiments.correlation import pearson
from flatkern.experiments.training import Run

__all__ = ["FOLLOWED", "Trajectory", "last_phase", "trajectories"]

FOLLOWED = ("log_volume_top3", "log_volume", "mls", "nmls", "local_dimensionality")
_FEWEST = 4
"""Measurement points in the last phase that a correlation over them needs."""


@dataclass(frozen=True)
class Trajectory:
    """Pearson's r between √S and a quantity over the checkpoints of the last phase, one r a run.

    Neighbouring checkpoints are far from independent, so a single run's r gets no interval: the interval is of the mean
    over runs, which are.
    """

    key: str
    coefficients: list[float]
    """One a run that has enough points there."""
    mean: float
    low: float
    """Ends of the bootstrap 95 % interval (BCa, runs resampled); NaN with fewer than four runs."""
    high: float


def last_phase(run: Run, threshold: float) -> int:
    """The first measurement point whose training loss is below the threshold; their number where there is none."""
    losses = run.column("train_loss")
    return next((i for i, value in enumerate(losses) if value < threshold), len(losses))


def trajectories(runs: Sequence[Run], threshold: float, *, seed: int = 0) -> list[Trajectory]:
    """Of each quantity that is followed."""
    return [_trajectory(key, runs, threshold, seed) for key in FOLLOWED]


def _trajectory(key: str, runs: Sequence[Run], threshold: float, seed: int) -> Trajectory:
    found = []
    for run in runs:
        start = last_phase(run, threshold)
        pairs = np.array([run.column("sqrt_sharpness")[start:], run.column(key)[start:]])
        pairs = pairs[:, np.isfinite(pairs).all(0)]
        if pairs.shape[1] < _FEWEST:
            continue
        r = float(pearson(pairs[0], pairs[1]))
        if math.isfinite(r):
            found.append(r)
    if not found:
        return Trajectory(key, found, math.nan, math.nan, math.nan)
    mean, low, high = float(np.mean(found)), math.nan, math.nan
    if len(found) >= 4:
        if np.ptp(found) == 0:
            low = high = mean
        else:
            interval = bootstrap(
                (found,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(seed)
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
    return Trajectory(key, found, mean, low, high)
