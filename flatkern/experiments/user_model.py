"""``flatkern measure``: a user's model, at its own weights or at those of a series of checkpoints."""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatkern.experiments.checkpoints import load_into, positions, read_checkpoint
from flatkern.experiments.environment import describe
from flatkern.experiments.errors import UserError
from flatkern.experiments.factory import Problem, load_problem
from flatkern.experiments.output import staged
from flatkern.experiments.user_quantities import (
    Entry,
    Measured,
    NotFiniteError,
    choose_inputs,
    measure_problem,
)
from flatkern.rows import Row, write_csv, write_json

__all__ = ["MeasureConfig", "MeasurePoint", "MeasureResult", "run_measure"]


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured, and where the files go."""

    source: str
    """``module:factory`` or ``file.py:factory``."""
    checkpoints: tuple[Path, ...] = ()
    key: str | None = None
    """Where in a checkpoint the state dict is."""
    output: Path = Path("flatkern-measure")
    samples: int = 100
    """Inputs that the geometry is taken on."""
    seed: int = 0
    device: str | None = None


@dataclass(frozen=True)
class MeasurePoint:
    """One set of weights."""

    name: str
    step: int
    measured: Measured

    @property
    def row(self) -> Row:
        """For files and curves."""
        return {"checkpoint": self.name, "step": self.step, **self.measured.row}


@dataclass(frozen=True)
class MeasureResult:
    """All that was found, in the order of the steps; the report is drawn from this and nothing else."""

    config: MeasureConfig
    model: str
    parameters: int
    loss: str
    points: list[MeasurePoint]
    environment: dict[str, Any]
    started: str
    seconds: float

    @property
    def rows(self) -> list[Row]:
        """A row a point."""
        return [point.row for point in self.points]

    @property
    def last(self) -> MeasurePoint:
        """The final weights, of those that could be measured."""
        return next(point for point in reversed(self.points) if point.measured.geometry)


def run_measure(config: MeasureConfig, *, say: Callable[[str], None] = lambda _: None) -> MeasureResult:
    """Measure, and write ``report.html``, ``results.json``, ``measurements.csv`` and, of a series, the six panels.

    Raises:
        UserError: anything the user can mend; nothing is then written.
    """
    from flatkern.report.measured import write_measured

    begun = time.perf_counter()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with staged(config.output) as folder:
        problem = load_problem(config.source)
        _place(problem.model, config.device)
        problem.model.eval()
        points = _measure_all(config, problem, say)
        result = MeasureResult(
            config=config,
            model=type(problem.model).__name__,
            parameters=sum(p.numel() for p in problem.model.parameters() if p.requires_grad),
            loss=getattr(problem.loss_fn, "__name__", type(problem.loss_fn).__name__),
            points=points,
            environment=describe(),
            started=started,
            seconds=time.perf_counter() - begun,
        )
        write_csv(folder / "measurements.csv", result.rows)
        write_json(folder / "results.json", _as_json(result))
        write_measured(folder, result)
    return result


def _place(model: nn.Module, device: str | None) -> None:
    if device is None:
        return
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _measure_all(config: MeasureConfig, problem: Problem, say: Callable[[str], None]) -> list[MeasurePoint]:
    x = choose_inputs(problem, config.samples, config.seed)
    if not config.checkpoints:
        say("measuring ...")
        return [MeasurePoint("as made", 0, measure_problem(problem, x, config.seed))]
    found: list[tuple[Path, int | None, Measured]] = []
    for path in config.checkpoints:
        checkpoint = read_checkpoint(path, config.key)
        load_into(problem.model, checkpoint)
        say(f"measuring {path} ...")
        try:
            measured = measure_problem(problem, x, config.seed)
        except NotFiniteError as error:
            say(f"{path}: {error}")
            reason = f"{path}: the loss is NaN or Inf"
            measured = Measured(
                [Entry("loss", math.nan, problem=reason)], [], None, {"loss": math.nan}, (reason,)
            )
        found.append((path, checkpoint.step, measured))
    if not any(measured.geometry for _, _, measured in found):
        raise UserError(f"{config.source}: the loss is NaN or Inf at the weights of every checkpoint")
    steps = positions([(path, step) for path, step, _ in found])
    points = [MeasurePoint(str(path), at, m) for (path, _, m), at in zip(found, steps, strict=True)]
    return sorted(points, key=lambda point: point.step)


def _as_json(result: MeasureResult) -> dict[str, Any]:
    return {
        "factory": result.config.source,
        "model": result.model,
        "parameters": result.parameters,
        "loss": result.loss,
        "samples": result.config.samples,
        "seed": result.config.seed,
        "environment": result.environment,
        "started": result.started,
        "seconds": result.seconds,
        "points": [
            {
                "checkpoint": point.name,
                "step": point.step,
                "quantities": {
                    e.key: {k: v for k, v in dataclasses.asdict(e).items() if k != "key"}
                    for e in (*point.measured.flatness, *point.measured.geometry)
                },
                "bounds": None
                if point.measured.bounds is None
                else {name: dataclasses.asdict(i) for name, i in point.measured.bounds.inequalities.items()},
                "notes": list(point.measured.notes),
            }
            for point in result.points
        ],
    }
