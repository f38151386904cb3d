"""Training networks of one setting together, measuring on the way, and going on after an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from flatkern.experiments.data import Dataset
from flatkern.experiments.devices import resolve
from flatkern.experiments.errors import Cancelled
from flatkern.experiments.measure import (
    evaluate,
    measure,
    measure_elsewhere,
    misclassified,
    unmeasured,
)
from flatkern.experiments.run_files import RunFile
from flatkern.experiments.settings import DemoConfig, Group, Setting
from flatkern.experiments.sgd import BatchStream
from flatkern.experiments.trainers import trainer_for
from flatkern.rows import Row

__all__ = ["Row", "Run", "train_group", "train_setting"]

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
    elsewhere: dict[str, list[Row]] = field(default_factory=dict, repr=False)
    """The same measurements on other samples, by what they are."""

    @property
    def name(self) -> str:
        """Unique name, e.g. ``lr 1, batch 20, seed 0``."""
        return f"{self.setting.label}, seed {self.seed}"

    def on(self, samples: str) -> Run:
        """The run as measured on other samples."""
        return replace(self, rows=self.elsewhere[samples], elsewhere={})

    def column(self, key: str) -> list[float]:
        """One quantity at every measurement point."""
        return [float(row.get(key, float("nan"))) for row in self.rows]

    def final(self, key: str) -> float:
        """One quantity at the end."""
        return float(self.rows[-1].get(key, float("nan")))


def train_setting(
    config: DemoConfig, setting: Setting, data: Dataset, report: Callable[[int], None] = lambda _: None
) -> list[Run]:
    """Train ``config.seeds`` networks on one setting and measure each on the schedule."""
    return train_group(config, Group(setting, tuple(range(config.seeds))), data, report)


def train_group(
    config: DemoConfig,
    group: Group,
    data: Dataset,
    report: Callable[[int], None] = lambda _: None,
    file: RunFile | None = None,
    save_every: float = 30.0,
) -> list[Run]:
    """Train networks of one setting together, and measure each on the schedule.

    Args:
        config: steps, schedule, network, samples that are measured.
        group: the setting and the seeds.
        data: in the shape that the network takes.
        report: told the network steps done since it was last called, those of earlier processes included; what it
            raises stops the training, after the state was saved.
        file: where the state is kept; what it holds is gone on with, to the same numbers as without the interruption.
        save_every: seconds between two saves.
    """
    training = _Training(config, group, data)
    if file is not None:
        file.clean()
        if (held := file.load()) is not None:
            training.load(held)
            report(training.step * len(group.seeds))
    saved = time.perf_counter()
    try:
        while not training.done:
            report(training.advance())
            if file is not None and time.perf_counter() - saved >= save_every and not training.done:
                file.save(training.state())
                saved = time.perf_counter()
    except Cancelled:
        if file is not None:
            file.save(training.state())
        raise
    if file is not None and training.advanced:
        file.save(training.state())
    return training.runs()


class _Training:
    """Networks on their way; all that decides what comes next is in :meth:`state`."""

    def __init__(self, config: DemoConfig, group: Group, data: Dataset) -> None:
        device = resolve(config.device)
        data = data.to(device)
        self.config, self.group, self.data = config, group, data
        self.networks = trainer_for(config, data, group.seeds)
        self.stream = BatchStream(len(data.train), group.setting.batch_size, group.seeds, device)
        self.schedule = set(config.schedule)
        self.step = 0
        self.rows: list[list[Row]] = [[] for _ in group.seeds]
        self.elsewhere: list[dict[str, list[Row]]] = [{w: [] for w in config.elsewhere} for _ in group.seeds]
        self.alive = list(range(len(group.seeds)))
        self.measured = -1
        """The last step that was measured."""
        self.advanced = False
        self._before = (0.0, 0.0)
        self._begun = (time.perf_counter(), time.process_time())
        self._targets = data.train.targets

    @property
    def done(self) -> bool:
        """Trained to the end and measured there, or nothing left that has not diverged."""
        return self.measured == self.config.steps or not self.alive

    def advance(self) -> int:
        """Up to ``TICK`` network steps, or to the next measurement, which is taken; returns the network steps."""
        start, self.advanced = self.step, True
        if self.step not in self.schedule or self.measured == self.step:
            rate, x = self.group.setting.learning_rate, self.data.train.x
            most = max(1, TICK // len(self.group.seeds))
            while self.step < self.config.steps and self.step - start < most:
                batch = self.stream.next()
                self.networks.step(_take(x, batch), _take(self._targets, batch), rate)
                self.step += 1
                if self.step in self.schedule:
                    break
        if self.step in self.schedule:
            self._measure()
        return (self.step - start) * len(self.group.seeds)

    def _measure(self) -> None:
        config, data = self.config, self.data
        for k in tuple(self.alive):
            model = self.networks.member(k)
            row = self._place(k)
            # a diverging network has no geometry worth the name long before its weights overflow
            if evaluate(model, data.train).loss < DIVERGED:
                row |= measure(model, data.train.first(config.num_probe).x, data.train, data.test)
                for where in config.elsewhere:
                    wrong = where == "misclassified"
                    samples = (
                        misclassified(model, data.test, config.num_probe)
                        if wrong
                        else data.test.first(config.num_probe)
                    )
                    found = measure_elsewhere(model, samples)
                    self.elsewhere[k][where].append(
                        self._place(k) | {"train_loss": row["train_loss"]} | found
                    )
            else:
                row |= unmeasured()
                self.alive.remove(k)
            self.rows[k].append(row)
        self.measured = self.step

    def _place(self, k: int) -> Row:
        setting = self.group.setting
        return {
            "learning_rate": setting.learning_rate,
            "batch_size": setting.batch_size,
            "seed": self.group.seeds[k],
            "step": self.step,
        }

    def _seconds(self) -> tuple[float, float]:
        now = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        return self._before[0] + now[0], self._before[1] + now[1]

    def state(self) -> dict[str, Any]:
        """All of it as tensors and plain values."""
        return {
            "step": self.step,
            "measured": self.measured,
            "alive": self.alive,
            "rows": self.rows,
            "elsewhere": self.elsewhere,
            "weights": [self.networks.state(k) for k in range(len(self.group.seeds))],
            "stream": self.stream.state(),
            "seconds": list(self._seconds()),
            "done": self.done,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.step, self.measured, self.alive = state["step"], state["measured"], state["alive"]
        self.rows, self.elsewhere = state["rows"], state["elsewhere"]
        for k, weights in enumerate(state["weights"]):
            self.networks.load(k, weights)
        self.stream.load(state["stream"])
        self._before = (state["seconds"][0], state["seconds"][1])

    def runs(self) -> list[Run]:
        """The finished networks."""
        wall, cpu = (seconds / len(self.group.seeds) for seconds in self._seconds())
        return [
            Run(
                self.group.setting,
                seed,
                self.rows[k],
                self.networks.state(k),
                wall,
                cpu,
                diverged=k not in self.alive,
                elsewhere=self.elsewhere[k],
            )
            for k, seed in enumerate(self.group.seeds)
        ]


def _take(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [n, d] by indices [K, B]: [K, B, d]."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)
