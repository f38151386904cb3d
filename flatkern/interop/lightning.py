"""The monitor as a Lightning callback (``lightning`` or ``pytorch-lightning``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flatkern.monitor import Monitor
from flatkern.rows import Row

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError(
            "flatkern.interop.lightning: Lightning is not there; pip install lightning"
        ) from error

__all__ = ["MonitorCallback"]


class MonitorCallback(Callback):  # type: ignore[misc]
    """:class:`flatkern.Monitor` on the ``LightningModule``, called as its ``forward``.

    Steps are the trainer's ``global_step``. The rows go into Lightning's checkpoints and continue from there; every
    logger of the trainer gets the numbers as ``flatkern/…``.

    Args:
        x, y, loss_fn, every: as for :class:`flatkern.Monitor`; ``x`` defaults to the trainer's training data loader.
        log: whether the trainer's loggers get the numbers.
        options: any other argument of :class:`flatkern.Monitor` but ``resume``.

    Attributes:
        monitor: the :class:`flatkern.Monitor`, from the start of ``fit`` on.

    Example (docs/monitor.md has a whole one)::

        trainer = Trainer(callbacks=[MonitorCallback(loss_fn=torch.nn.CrossEntropyLoss(), every=200)])
    """

    def __init__(
        self,
        x: Any = None,
        y: Tensor | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        every: Any = 200,
        *,
        log: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self._arguments, self._options, self._log = (x, y, loss_fn, every), options, log
        self._state: dict[str, Any] | None = None
        self.monitor: Monitor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Choose the probe set and measure the beginning, or take up what the checkpoint has."""
        x, *others = self._arguments
        data = trainer.train_dataloader if x is None else x
        self.monitor = Monitor(pl_module, data, *others, resume=True, **self._options)
        if self._state is not None:
            self.monitor.load_state_dict(self._state)
            self._state = None
        before = len(self.monitor.history) if trainer.global_step else 0
        self.monitor.start(trainer.global_step)
        for row in self.monitor.history[before:]:
            self._report(trainer, row)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimizer's steps; measure when one is due."""
        assert self.monitor is not None
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        loss = loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
        row = self.monitor.step(loss, at=trainer.global_step)
        if row is not None:
            self._report(trainer, row)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the end."""
        assert self.monitor is not None
        before = len(self.monitor.history)
        self.monitor.finish()
        for row in self.monitor.history[before:]:
            self._report(trainer, row)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close what is open."""
        if self.monitor is not None:
            self.monitor.stop()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints, before training starts."""
        self._state = dict(state_dict) or None

    def _report(self, trainer: Any, row: Row) -> None:
        if not self._log:
            return
        numbers = {f"flatkern/{k}": v for k, v in row.items() if not isinstance(v, str) and k != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=int(row["step"]))
