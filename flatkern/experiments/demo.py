"""The demo: train five settings, measure, analyse, and write one report with the data behind it."""

from __future__ import annotations

import dataclasses
import datetime
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flatkern.experiments.claims import Claim, InequalityCheck, check_inequalities, judge
from flatkern.experiments.correlation import Correlation, correlation_table
from flatkern.experiments.data import Dataset, load
from flatkern.experiments.environment import describe
from flatkern.experiments.errors import UserError
from flatkern.experiments.output import staged
from flatkern.experiments.parallel import train_all
from flatkern.experiments.quantities import CORRELATED, final_value
from flatkern.experiments.settings import DemoConfig
from flatkern.experiments.spectrum import Spectrum, final_spectrum
from flatkern.experiments.training import Run
from flatkern.rows import write_csv, write_json

__all__ = ["DemoResult", "run_demo"]


@dataclass(frozen=True)
class DemoResult:
    """Everything a demo found; the report is drawn from this and nothing else."""

    config: DemoConfig
    source: str
    """Where the images came from."""
    num_train: int
    num_test: int
    sizes: tuple[int, ...]
    runs: list[Run]
    correlations: list[Correlation]
    claims: list[Claim]
    inequalities: list[InequalityCheck]
    spectrum: Spectrum | None
    environment: dict[str, Any]
    started: str
    wall_seconds: float
    cpu_seconds: float


def run_demo(
    config: DemoConfig, *, progress: bool = True, say: Callable[[str], None] = lambda _: None
) -> DemoResult:
    """Run a demo and write its files to ``config.output``, all of them or none.

    From a script of your own call this below ``if __name__ == "__main__":``, as the settings are trained in processes
    that import the script anew (``jobs=1`` needs no processes).
    """
    from flatkern.report import write_report

    wall, cpu = time.perf_counter(), _cpu_seconds()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with staged(config.output) as folder:
        data = load(
            config.data,
            root=config.root,
            num_train=config.num_train,
            num_test=config.num_test,
            seed=config.data_seed,
        )
        if config.batch_sizes[-1] > len(data.train):
            raise UserError(f"batch size {config.batch_sizes[-1]} for {len(data.train)} training images")
        runs = train_all(config, data, progress=progress)
        say("statistics and the Hessian's spectrum ...")
        result = _analyse(config, data, runs, started, wall, cpu)
        say("figures and report ...")
        _write_data(folder, result, data)
        write_report(folder, result)
    return result


def _analyse(
    config: DemoConfig, data: Dataset, runs: list[Run], started: str, wall: float, cpu: float
) -> DemoResult:
    trained = [run for run in runs if not run.diverged]
    correlations = correlation_table({key: [final_value(r, key) for r in trained] for key in CORRELATED})
    shown = next((run for run in trained if run.setting == config.middle), trained[0] if trained else None)
    spectrum = final_spectrum(config, shown, data) if shown is not None else None
    return DemoResult(
        config=config,
        source=data.source,
        num_train=len(data.train),
        num_test=len(data.test),
        sizes=config.sizes(data.pixels),
        runs=runs,
        correlations=correlations,
        claims=judge(config, runs, correlations),
        inequalities=check_inequalities(runs),
        spectrum=spectrum,
        environment=describe(),
        started=started,
        wall_seconds=time.perf_counter() - wall,
        cpu_seconds=_cpu_seconds() - cpu,
    )


def _write_data(folder: Path, result: DemoResult, data: Dataset) -> None:
    write_csv(folder / "measurements.csv", [row for run in result.runs for row in run.rows])
    flat = [_flat(c) for c in result.correlations]
    write_csv(folder / "correlations.csv", flat)
    spectrum = result.spectrum
    write_json(
        folder / "results.json",
        {
            "settings": dataclasses.asdict(result.config),
            "data": {"source": result.source, "train": result.num_train, "test": result.num_test},
            "network": list(result.sizes),
            "environment": result.environment,
            "started": result.started,
            "wall_seconds": result.wall_seconds,
            "cpu_seconds": result.cpu_seconds,
            "claims": [dataclasses.asdict(c) for c in result.claims],
            "inequalities": [dataclasses.asdict(c) for c in result.inequalities],
            "correlations": flat,
            "spectrum": None if spectrum is None else dataclasses.asdict(spectrum),
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
                }
                for run in result.runs
            ],
        },
    )
    torch.save(
        {
            "sizes": list(result.sizes),
            "probe": data.train.first(result.config.num_probe).x.clone(),
            "weights": {run.name: run.weights for run in result.runs},
        },
        folder / "final_weights.pt",
    )


def _flat(c: Correlation) -> dict[str, Any]:
    row: dict[str, Any] = {"first": c.first, "second": c.second, "runs": c.runs}
    for kind, coefficient in (("pearson", c.pearson), ("spearman", c.spearman)):
        row[kind] = coefficient.value
        row |= {f"{kind}_{k}": v for k, v in dataclasses.asdict(coefficient).items() if k != "value"}
    return row


def _cpu_seconds() -> float:
    """Of this process and of those it started and waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)
