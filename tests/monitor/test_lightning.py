"""The Lightning callback: rows, restarts from Lightning's checkpoints, and training as without it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.monitor.training import LOSS, Mixed, X, Y, seeded

L = pytest.importorskip("lightning.pytorch", reason="needs Lightning")
from flatkern.interop.lightning import MonitorCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(L.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.net = Mixed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        return LOSS(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Log(L.loggers.logger.Logger):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    name, version = "log", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("flatkern/") for key in metrics):
            assert metrics["flatkern/sharpness"] > 0
            self.steps.append(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def fit(
    folder: Path,
    callbacks: list[Any],
    steps: int,
    logger: Any = False,
    resume: Path | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = seeded(Module)
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=logger, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks, default_root_dir=folder,
            **options,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(X, Y), 10, shuffle=True), ckpt_path=resume)
    return module, trainer


def test_rows_losses_and_loggers(tmp_path: Path) -> None:
    callback, log = MonitorCallback(loss_fn=LOSS, every=5, path=tmp_path / "a.csv"), Log()
    fit(tmp_path, [callback], 13, logger=log)
    assert callback.monitor is not None
    assert callback.monitor.column("step") == [0, 5, 10, 13]
    assert log.steps == [0, 5, 10, 13]
    rows = callback.monitor.history
    assert "train_loss" not in rows[0]
    assert all(0 < row["train_loss"] < 5 for row in rows[1:])
    assert all("probe_loss" in row for row in rows)


def test_training_is_as_without(tmp_path: Path) -> None:
    alone, _ = fit(tmp_path, [], 12)
    callback = MonitorCallback(every=1, bounds=True)
    watched, _ = fit(tmp_path, [callback], 12)
    assert callback.monitor is not None
    assert len(callback.monitor.history) == 13
    for (name, a), b in zip(alone.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_steps_are_the_optimizers(tmp_path: Path) -> None:
    callback = MonitorCallback(X, Y, LOSS, every=2)
    fit(tmp_path, [callback], 5, accumulate_grad_batches=3)
    assert callback.monitor is not None
    assert callback.monitor.column("step") == [0, 2, 4, 5]


def test_restart_from_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    first = MonitorCallback(loss_fn=LOSS, every=5, path=path)
    _, trainer = fit(tmp_path, [first], 12)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = MonitorCallback(loss_fn=LOSS, every=5, path=path)
    fit(tmp_path, [second], 21, resume=tmp_path / "a.ckpt")
    assert second.monitor is not None
    assert first.monitor is not None
    assert second.monitor.column("step") == [0, 5, 10, 12, 15, 20, 21]
    assert second.monitor.history[:4] == first.monitor.history
    # the same file from the start is another run
    third = MonitorCallback(loss_fn=LOSS, every=5, path=path)
    fit(tmp_path, [third], 6)
    assert third.monitor is not None
    assert third.monitor.column("step") == [0, 5, 6]
    assert (tmp_path / "run.bak.csv").exists()
