"""The mean loss of the training steps since the last measurement, without waiting for a device at each step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RunningLoss"]

PENDING = 1000
"""Losses kept on a device before they are added up, which waits for it."""


class RunningLoss:
    """Sum and number of losses."""

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self._total, self.count = total, count
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor | float) -> None:
        """Called at every step: on the CPU nothing but reading the number."""
        if not isinstance(loss, Tensor):
            if not isinstance(loss, (int, float)):
                raise TypeError(f"loss: expected a scalar tensor or a number, got {type(loss).__name__}")
            self._total += loss
        elif loss.numel() != 1:
            raise ValueError(f"loss: expected a scalar, got shape {tuple(loss.shape)}")
        elif loss.is_cpu:
            self._total += loss.item()
        else:
            self._pending.append(loss.detach().clone().reshape(()))
            if len(self._pending) == PENDING:
                self._add_up()
        self.count += 1

    @property
    def total(self) -> float:
        """The sum; waits for the device."""
        self._add_up()
        return self._total

    def _add_up(self) -> None:
        if self._pending:
            self._total += float(torch.stack(self._pending).float().sum())
            self._pending.clear()
