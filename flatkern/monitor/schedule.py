"""When to measure: on which steps, and how much of the training's time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

__all__ = ["Clock", "Schedule"]


class Schedule:
    """The steps that are due: every k-th, equally spaced in the logarithm, or a list of them."""

    def __init__(self, every: int | str | Iterable[int], per_decade: int) -> None:
        if isinstance(per_decade, bool) or not isinstance(per_decade, int) or per_decade < 1:
            raise ValueError(f"per_decade: expected a positive whole number, got {per_decade!r}")
        self._per_decade = per_decade
        self._every: int | None = None
        self._steps: frozenset[int] | None = None
        if isinstance(every, str):
            if every != "log":
                raise ValueError(
                    f"every: expected a number of steps, a list of steps or 'log', got {every!r}"
                )
        elif isinstance(every, int) and not isinstance(every, bool):
            if every < 1:
                raise ValueError(f"every: expected a positive number of steps, got {every}")
            self._every = every
        elif isinstance(every, Iterable):
            steps = list(every)
            if not steps or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in steps):
                raise ValueError(f"every: expected a list of steps from 0 on, got {steps!r}")
            self._steps = frozenset(steps)
        else:
            raise TypeError(
                f"every: expected a number of steps, a list of steps or 'log', got {type(every).__name__}"
            )

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a measurement after this step."""
        if self._every is not None:
            return step % self._every == 0
        if self._steps is not None:
            return step in self._steps
        if step == 0:
            return True
        nearest = round(self._per_decade * math.log10(step))
        return any(round(10 ** (k / self._per_decade)) == step for k in range(nearest - 1, nearest + 2))


class Clock:
    """Seconds of training and of measuring, kept apart and carried over restarts."""

    def __init__(self, share: float | None) -> None:
        if share is not None and (isinstance(share, bool) or not 0 < share < 1):
            raise ValueError(
                f"share: expected a part of the training time between 0 and 1, such as 0.05, got {share!r}"
            )
        self.share = share
        self.measuring = 0.0
        self._trained = 0.0
        self._last = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Training goes on from here."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Training is interrupted."""
        self._trained, self._since = self.training, None

    def restore(self, training: float, measuring: float, last: float) -> None:
        """What earlier runs took in all, and their last measurement."""
        self._trained, self.measuring, self._last = training, measuring, last
        if self._since is not None:
            self._since = time.perf_counter()

    @property
    def training(self) -> float:
        """Seconds of training so far, without measuring."""
        return self._trained + (0.0 if self._since is None else time.perf_counter() - self._since)

    def measured(self, seconds: float) -> None:
        """A measurement has just taken so long."""
        self.measuring += seconds
        self._last = seconds
        if self._since is not None:
            self._since += seconds

    def affordable(self) -> bool:
        """Whether one more measurement as long as the last stays within the share."""
        return self.share is None or self.measuring + self._last <= self.share * self.training
