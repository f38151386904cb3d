"""Rows as TensorBoard scalars."""

from __future__ import annotations

import math
import os
from typing import Any

from flatkern.rows import Row

__all__ = ["Scalars"]

_NOT_DRAWN = ("step", "seconds", "measure_seconds")


class Scalars:
    """Writes every number of a row under ``flatkern/``, to a writer of the user's or to one made for a folder."""

    def __init__(self, target: Any) -> None:
        self._folder: str | None = None
        self._writer: Any = None
        if isinstance(target, (str, os.PathLike)):
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    "tensorboard: the package is not there; pip install tensorboard, or leave the argument out"
                ) from error
            self._folder = os.fspath(target)
        elif target is not None and not callable(getattr(target, "add_scalar", None)):
            raise TypeError(f"tensorboard: expected a folder or a SummaryWriter, got {type(target).__name__}")
        else:
            self._writer = target

    def start(self, step: int) -> None:
        """Open the folder; what an earlier run wrote there after ``step`` is hidden."""
        if self._folder is not None and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=step + 1 if step else None)

    def write(self, row: Row) -> None:
        """The row's finite numbers at its step."""
        if self._writer is None:
            return
        for key, value in row.items():
            if key not in _NOT_DRAWN and not isinstance(value, str) and math.isfinite(value):
                self._writer.add_scalar(f"flatkern/{key}", value, int(row["step"]))

    def stop(self) -> None:
        """Close a writer that was made here, flush one that was not."""
        if self._writer is None:
            return
        if self._folder is not None:
            self._writer.close()
            self._writer = None
        elif callable(flush := getattr(self._writer, "flush", None)):
            flush()
