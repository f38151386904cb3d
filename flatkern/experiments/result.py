"""What a demo or a reproduction found, and the files that hold it."""

from __future__ import annotations

import dataclasses
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flatkern.experiments.abstract import summarize
from flatkern.experiments.claims import Claim, InequalityCheck, check_inequalities, judge, judge_transformers
from flatkern.experiments.correlation import Correlation, correlation_star, correlation_table
from flatkern.experiments.data import CLASSES, Dataset
from flatkern.experiments.environment import describe
from flatkern.experiments.networks import takes_vectors
from flatkern.experiments.quantities import CORRELATED, final_value
from flatkern.experiments.settings import DemoConfig
from flatkern.experiments.spectrum import Spectrum
from flatkern.experiments.training import Run
from flatkern.experiments.trajectories import Trajectory, trajectories
from flatkern.experiments.transformers import Transformers
from flatkern.rows import Row, write_csv, write_json

__all__ = ["LINKED", "Clock", "Result", "analyse", "write_data"]

LINKED = ("log_volume_top3", "mls", "nmls", "local_dimensionality")
"""What is held against sharpness on samples that were not trained on."""


class Clock:
    """Time since it was made: wall, and CPU of this process and of those it started and waited for."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def read(self) -> tuple[float, float]:
        """Wall and CPU seconds."""
        return time.perf_counter() - self._wall, _cpu_seconds() - self._cpu


@dataclass(frozen=True)
class Result:
    """Everything that was found; the report is drawn from this and nothing else."""

    config: DemoConfig
    source: str
    """Where the images came from."""
    num_train: int
    num_test: int
    sizes: tuple[int, ...]
    """Layers of an MLP; of another network its inputs and outputs."""
    runs: list[Run]
    correlations: list[Correlation]
    elsewhere: dict[str, list[Correlation]]
    """√S of the training samples with quantities on other samples, across runs."""
    trajectories: list[Trajectory]
    claims: list[Claim]
    inequalities: list[InequalityCheck]
    spectrum: Spectrum | None
    transformers: Transformers | None
    environment: dict[str, Any]
    started: str
    wall_seconds: float
    cpu_seconds: float


def analyse(
    config: DemoConfig,
    data: Dataset,
    runs: list[Run],
    *,
    started: str,
    clock: Clock,
    spectrum: Spectrum | None = None,
    transformers: Transformers | None = None,
) -> Result:
    """Correlations, verdicts and counts of finished runs."""
    trained = [run for run in runs if not run.diverged]
    correlations = correlation_table({key: [final_value(r, key) for r in trained] for key in CORRELATED})
    in_time = trajectories(trained, config.last_phase)
    elsewhere = {where: _links(trained, where) for where in config.elsewhere}
    claims = judge(config, runs, correlations, in_time, elsewhere) if runs else []
    if transformers is not None:
        claims.append(judge_transformers(config, transformers))
    wall, cpu = clock.read()
    return Result(
        config=config,
        source=data.source,
        num_train=len(data.train),
        num_test=len(data.test),
        sizes=config.sizes(data.pixels) if takes_vectors(config.network) else (data.pixels, CLASSES),
        runs=runs,
        correlations=correlations,
        elsewhere=elsewhere,
        trajectories=in_time,
        claims=claims,
        inequalities=check_inequalities(runs),
        spectrum=spectrum,
        transformers=transformers,
        environment=describe(),
        started=started,
        wall_seconds=wall,
        cpu_seconds=cpu,
    )


def _links(runs: list[Run], where: str) -> list[Correlation]:
    return correlation_star(
        ("sqrt_sharpness", [r.final("sqrt_sharpness") for r in runs]),
        {key: [final_value(r.on(where), key) for r in runs] for key in LINKED},
    )


def write_data(folder: Path, result: Result, data: Dataset) -> None:
    """Write the measurements, the correlations, all results as JSON, and the final weights."""
    write_csv(folder / "measurements.csv", _tidy(result))
    flat = [_flat(c) for c in result.correlations]
    write_csv(folder / "correlations.csv", flat)
    if result.inequalities:
        write_csv(folder / "inequalities.csv", [_columns(c) for c in result.inequalities])
    if result.transformers is not None:
        write_csv(folder / "transformers.csv", result.transformers.rows)
    spectrum = result.spectrum
    write_json(
        folder / "results.json",
        {
            "settings": dataclasses.asdict(result.config),
            "scale": result.config.scale,
            "data": {"source": result.source, "train": result.num_train, "test": result.num_test},
            "network": list(result.sizes),
            "environment": result.environment,
            "started": result.started,
            "wall_seconds": result.wall_seconds,
            "cpu_seconds": result.cpu_seconds,
            "abstract": [dataclasses.asdict(c) for c in summarize(result.claims)],
            "claims": [dataclasses.asdict(c) for c in result.claims],
            "inequalities": [dataclasses.asdict(c) for c in result.inequalities],
            "correlations": flat,
            "elsewhere": {where: [_flat(c) for c in found] for where, found in result.elsewhere.items()},
            "trajectories": [dataclasses.asdict(t) for t in result.trajectories],
            "spectrum": None if spectrum is None else dataclasses.asdict(spectrum),
            "transformers": None if result.transformers is None else dataclasses.asdict(result.transformers),
            "runs": [
                {
                    "name": run.name,
                    "learning_rate": run.setting.learning_rate,
                    "batch_size": run.setting.batch_size,
                    "seed": run.seed,
                    "diverged": run.diverged,
                    "wall_seconds": run.wall_seconds,
                    "cpu_seconds": run.cpu_seconds,
                    "measurements": run.rows,
                    "elsewhere": run.elsewhere,
                }
                for run in result.runs
            ],
        },
    )
    torch.save(
        {
            "network": result.config.network,
            "shape": list(data.shape),
            "sizes": list(result.sizes),
            "probe": data.train.first(result.config.num_probe).x.clone(),
            "weights": {run.name: run.weights for run in result.runs},
        },
        folder / "final_weights.pt",
    )


def _tidy(result: Result) -> list[Row]:
    """A line a run, iteration and kind of sample; the kind is a column where there is more than one."""
    if not result.config.elsewhere:
        return [row for run in result.runs for row in run.rows]
    found: list[Row] = []
    for run in result.runs:
        for where, rows in {"train": run.rows, **run.elsewhere}.items():
            found += [Row(samples=where) | row for row in rows]
    return found


def _columns(check: InequalityCheck) -> dict[str, Any]:
    row = dataclasses.asdict(check)
    smallest, median, largest = row.pop("looseness")
    decades = row.pop("decades")
    row |= {"decades_smallest": smallest, "decades_median": median, "decades_largest": largest}
    return row | {f"points_in_decade_{decade}": count for decade, count in decades.items()}


def _flat(c: Correlation) -> dict[str, Any]:
    row: dict[str, Any] = {"first": c.first, "second": c.second, "runs": c.runs}
    for kind, coefficient in (("pearson", c.pearson), ("spearman", c.spearman)):
        row[kind] = coefficient.value
        row |= {f"{kind}_{k}": v for k, v in dataclasses.asdict(coefficient).items() if k != "value"}
    return row


def _cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)
