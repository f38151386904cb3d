"""What ``flatkern measure`` measures of a user's model: each quantity with its errors, or the reason it has none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
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

__all__ = ["Entry", "Measured", "choose_inputs", "measure_problem"]

_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
"""What a quantity raises where a model or loss does not have it; the others are measured all the same."""


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
    """
    started = time.perf_counter()
    loss = _loss(problem)
    flatness = [Entry("loss", loss, method="exact", seconds=time.perf_counter() - started)]
    flatness += loss_flatness(problem, seed)
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
    """The quantities of the loss, each by its own function."""
    model, loss_fn, data = problem.model, problem.loss_fn, problem.data
    common = {"params": problem.params, "reduction": problem.reduction}
    ways: dict[str, Callable[[], object]] = {
        "ggn_trace": lambda: fk.ggn_trace(model, loss_fn, data, seed=seed, **common),
        "hessian_trace": lambda: fk.hessian_trace(model, loss_fn, data, seed=seed, **common),
        "max_eigenvalue": lambda: fk.max_eigenvalue(model, loss_fn, data, seed=seed, **common),
        "gradient_norms": lambda: fk.gradient_norms(model, loss_fn, data, **common),
    }
    return [_entry(key, way) for key, way in ways.items()]


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


def _entry(key: str, way: Callable[[], object]) -> Entry:
    begun = time.perf_counter()
    try:
        result = way()
    except _REFUSALS as error:
        return Entry(key, math.nan, problem=" ".join(str(error).split()))
    return _of_result(key, result, time.perf_counter() - begun)


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
        raise UserError(f"{problem.source}: the loss is {value} on the data; there is nothing to measure")
    return value
