"""Training one setting, all its seeds together, and measuring on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from flatkern.experiments.data import Dataset
from flatkern.experiments.measure import evaluate, measure, unmeasured
from flatkern.experiments.schedule import log_schedule
from flatkern.experiments.settings import DemoConfig, Setting
from flatkern.experiments.sgd import BatchStream, Ensemble
from flatkern.rows import Row

__all__ = ["Row", "Run", "train_setting"]

TICK = 100
"""Steps between two reports of progress."""
DIVERGED = 1e4
"""A training loss this large, or NaN, has diverged: the loss of a constant is below 1."""


@dataclass
class Run:
    """One trained network: its measurements, oldest first, and its final weights."""

    setting: Setting
    seed: int
    rows: list[Row]
    weights: dict[str, Tensor] = field(repr=False)
    wall_seconds: float
    """Of the whole setting divided by its networks, which are trained together."""
    cpu_seconds: float
    diverged: bool = False

    @property
    def name(self) -> str:
        """Unique name, e.g. ``lr 1, batch 20, seed 0``."""
        return f"{self.setting.label}, seed {self.seed}"

    def column(self, key: str) -> list[float]:
        """One quantity at every measurement point."""
        return [float(row.get(key, float("nan"))) for row in self.rows]

    def final(self, key: str) -> float:
        """One quantity at the end."""
        return float(self.rows[-1].get(key, float("nan")))


def train_setting(
    config: DemoConfig, setting: Setting, data: Dataset, report: Callable[[int], None] = lambda _: None
) -> list[Run]:
    """Train ``config.seeds`` networks on one setting and measure each on the schedule.

    ``report`` is told the network steps done since it was last called; what it raises stops the training.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    seeds = range(config.seeds)
    networks = Ensemble(config.sizes(data.pixels), seeds)
    stream = BatchStream(len(data.train), setting.batch_size, seeds)
    probe = data.train.first(config.num_probe).x
    x, targets = data.train.x, data.train.targets
    schedule = set(log_schedule(config.steps, config.points))
    rows: list[list[Row]] = [[] for _ in seeds]
    alive = set(seeds)
    pending = 0
    for step in range(config.steps + 1):
        if step:
            batch = stream.next()
            networks.step(_take(x, batch), _take(targets, batch), setting.learning_rate)
            pending += len(seeds)
        if step in schedule:
            for k in sorted(alive):
                row: Row = {
                    "learning_rate": setting.learning_rate,
                    "batch_size": setting.batch_size,
                    "seed": k,
                    "step": step,
                }
                model = networks.member(k)
                # a diverging network has no geometry worth the name long before its weights overflow
                if evaluate(model, data.train).loss < DIVERGED:
                    rows[k].append(row | measure(model, probe, data.train, data.test))
                else:
                    rows[k].append(row | unmeasured())
                    alive.discard(k)
            if not alive:
                break
        if pending >= TICK or step == config.steps:
            report(pending)
            pending = 0
    share = 1 / config.seeds
    wall, cpu = (time.perf_counter() - wall) * share, (time.process_time() - cpu) * share
    return [Run(setting, k, rows[k], networks.state(k), wall, cpu, diverged=k not in alive) for k in seeds]


def _take(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [n, d] by indices [K, B]: [K, B, d]."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)
