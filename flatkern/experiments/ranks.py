"""Shares of the work for processes that torchrun started, on one machine or several; they meet in files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flatkern.experiments.errors import UserError

__all__ = ["Ranks", "await_files"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def here() -> Ranks:
        """From the variables RANK and WORLD_SIZE, which torchrun sets; alone without them."""
        try:
            ranks = Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError:
            raise UserError("RANK and WORLD_SIZE must be whole numbers") from None
        if not 0 <= ranks.rank < ranks.world:
            raise UserError(f"RANK {ranks.rank} is not one of WORLD_SIZE {ranks.world}")
        return ranks

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``world``-th item, from the ``rank``-th on."""
        return list(items[self.rank :: self.world])


def await_files(
    paths: Sequence[Path],
    ready: Callable[[Path], bool],
    *,
    patience: float = 3600.0,
    interval: float = 1.0,
) -> None:
    """Wait until every file is ready, as long as something still changes in their folders.

    Raises:
        UserError: nothing has changed for ``patience`` seconds: the folder is not shared, or a process died.
    """
    waiting = list(paths)
    seen: dict[Path, float] = {}
    changed = time.monotonic()
    while True:
        times = {path: path.stat().st_mtime for path in waiting if path.is_file()}
        fresh = [path for path, at in times.items() if seen.get(path) != at]
        if fresh:
            changed = time.monotonic()
            seen |= {path: times[path] for path in fresh}
        waiting = [path for path in waiting if path not in fresh or not ready(path)]
        if not waiting:
            return
        if time.monotonic() - changed > patience:
            raise UserError(
                f"{waiting[0]}: not finished, and nothing has changed for {patience:.0f} s; all processes need the "
                "same --output on a file system that they share"
            )
        time.sleep(interval)
