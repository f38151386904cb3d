"""Training runs in files, written so that a kill at any moment loses a little time and nothing else."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

__all__ = ["RunFile"]


class RunFile:
    """The state of one group of runs: a file that is always whole, replaced in one atomic move.

    Args:
        folder: exists.
        name: of the file, without its ending; one writer at a time.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.pt"
        self._part = f".{name}.*.part"

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file; what was there before stays until the new one is whole and on the disk."""
        part = self.path.with_name(self._part.replace("*", str(os.getpid())))
        try:
            with part.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()

    def clean(self) -> None:
        """Remove what writers that were killed left behind; for the one writer to call."""
        for part in self.path.parent.glob(self._part):
            with contextlib.suppress(FileNotFoundError):
                part.unlink()

    def load(self) -> dict[str, Any] | None:
        """What was saved last; ``None`` where nothing was, or where the disk lost what it had been given."""
        if not self.path.is_file():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError):
            return None
        return found if isinstance(found, dict) else None
