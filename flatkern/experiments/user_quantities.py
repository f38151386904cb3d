"""What ``flatkern measure`` measures of a user's model: each quantity with its errors, or the reason it has none."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import flatkern as fk
from flatkern.experiments.errors import UserError
from flatkern.experiments.factory import Problem
from flatkern.losses import resolve_loss
from flatkern.measurement import bounds_row, geometry_row, top_volume
from flatkern.monitor.probe import choose_probe
from flatkern.problem import Batches, is_pair, model_device
from flatkern.results import Estimate, PerSample
from flatkern.rows import Row

__all__ = ["Entry", "Measured", "NotFiniteError", "choose_inputs", "measure_problem"]

_OF_THE_LOSS = (
    "gradient_norm", "gradient_norms", "fisher_trace", "ggn_trace", "hessian_trace", "max_eigenvalue",
    "adaptive_sharpness", "relative_flatness",
)  # fmt: skip
"""Of :func:`flatkern.flatness`, without the loss (which is there already) and S (which the geometry has)."""
_RTOL = 0.01
_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
"""What a quantity raises where a model or loss does not have it; the others are measured all the same."""


class NotFiniteError(UserError):
    """The loss is NaN or Inf at these weights."""


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    key: str
    """Of :data:`flatkern.experiments.quantities.QUANTITIES`."""
    value: float
    stderr: float = 0.0
    """The estimator's own standard error; 0 where exact."""
    sample_stderr: float | None = None
    """Standard error of the mean over samples."""
    error_bound: float | None = None
    """A bound on the error instead of a standard error (of an eigenvalue)."""
    method: str = ""
    seconds: float = 0.0
    problem: str = ""
    """Why it could not be measured."""


@dataclass(frozen=True)
class Measured:
    """One set of weights, measured."""

    flatness: list[Entry]
    """Of the loss, on all data."""
    geometry: list[Entry]
    """Of the outputs, on the chosen samples."""
    bounds: fk.Bounds | None
    row: Row
    """All of it flat, for files and curves."""
    notes: tuple[str, ...]


def measure_problem(problem: Problem, x: Tensor, seed: int) -> Measured:
    """Measure the problem's model as it stands.

    Args:
        problem: model (in eval mode), loss and data; the quantities of the loss are of all data.
        x: the inputs that the geometry is taken on (:func:`choose_inputs`).
        seed: of whatever is sampled.

    Raises:
        UserError: the model or the loss fails on the data.
        NotFiniteError: the loss is NaN or Inf there.
    """
    started = time.perf_counter()
    loss = _loss(problem)
    flatness = [Entry("loss", loss, method="exact", seconds=time.perf_counter() - started)]
    try:
        flatness += loss_flatness(problem, seed)
    except _REFUSALS as error:
        flatness.append(Entry("hessian_trace", math.nan, problem=" ".join(str(error).split())))
    geometry: list[Entry] = []
    bounds, row, notes = None, Row(), tuple[str, ...]()
    try:
        g = fk.geometry(problem.model, x, params=problem.params)
        bounds = fk.bounds(problem.model, x, geometry=g)
    except _REFUSALS as error:
        geometry = [Entry("log_volume", math.nan, problem=" ".join(str(error).split()))]
    else:
        geometry, row, notes = geometry_entries(g), geometry_row(g) | bounds_row(bounds), g.notes
    for entry in flatness:
        row[entry.key] = entry.value
        row[f"{entry.key}_stderr"] = entry.stderr if entry.error_bound is None else entry.error_bound
    return Measured(flatness, geometry, bounds, row, notes)


def choose_inputs(problem: Problem, samples: int, seed: int) -> Tensor:
    """Inputs for the geometry, drawn once: a loader that shuffles would give every checkpoint others."""
    x, y = problem.data if is_pair(problem.data) else (problem.data, None)
    try:
        probe = choose_probe(x, y, samples, seed)
    except Exception as error:
        raise UserError(f"{problem.source}: data cannot be read: {' '.join(str(error).split())}") from error
    return probe.x.to(model_device(problem.model))


def loss_flatness(problem: Problem, seed: int) -> list[Entry]:
    """The quantities of the loss, from one call that shares its passes."""
    table = fk.flatness(
        problem.model,
        problem.loss_fn,
        problem.data,
        quantities=_OF_THE_LOSS,
        params=problem.params,
        reduction=problem.reduction,
        rtol=_RTOL,
        seed=seed,
    )
    return [
        Entry(
            m.name,
            math.nan if m.value is None else m.value,
            m.stderr,
            m.sample_stderr,
            m.error_bound,
            m.method,
            m.seconds,
            m.reason,
        )
        for m in table.measures.values()
    ]


def geometry_entries(g: fk.Geometry) -> list[Entry]:
    """The table's lines of a geometry."""
    found: Iterable[tuple[str, Estimate | PerSample | None]] = (
        ("sharpness", g.sharpness),
        ("log_volume", g.log_volume),
        ("log_volume_top3", top_volume(g)),
        ("mls", g.mls),
        ("nmls", g.nmls),
        ("normalized_mls", g.normalized_mls),
        ("local_dimensionality", g.local_dimensionality),
    )
    return [_of_result(key, result, g.seconds) for key, result in found if result is not None]


def _of_result(key: str, result: object, seconds: float) -> Entry:
    if isinstance(result, PerSample):
        left_out = (
            f", {result.rank_deficient} rank-deficient samples left out" if result.rank_deficient else ""
        )
        method = result.method + left_out
        return Entry(key, result.mean, result.stderr, result.sample_stderr, method=method, seconds=seconds)
    if isinstance(result, Estimate):
        method = result.method if result.converged else f"{result.method}, tolerance not reached"
        return Entry(key, result.value, result.stderr, result.sample_stderr, method=method, seconds=seconds)
    assert isinstance(result, fk.MaxEigenvalue)
    reached = "" if result.converged else ", not converged"
    method = f"Lanczos, {result.matvecs} products{reached}"
    return Entry(key, result.value, error_bound=result.error_bound, method=method, seconds=seconds)


def _loss(problem: Problem) -> float:
    """The loss on all data; the first thing to run, so that a model that does not work says so once."""
    try:
        loss = resolve_loss(problem.loss_fn, problem.reduction)
        numerator = weight = 0.0
        with torch.no_grad():
            for x, y in Batches(problem.data, model_device(problem.model)):
                output = problem.model(x)
                numerator += float(loss.numerator(output, y))
                weight += float(loss.weight(output, y))
        value = numerator / loss.denominator(weight)
    except Exception as error:
        told = " ".join(str(error).split())
        raise UserError(f"{problem.source}: the model or its loss fails on the data: {told}") from error
    if not math.isfinite(value):
        raise NotFiniteError(
            f"{problem.source}: the loss is {value} on the data; there is nothing to measure"
        )
    return value
