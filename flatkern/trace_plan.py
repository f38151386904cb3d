"""How many groups, draws and probes each chunk of samples gets, so that a variance is met at the least cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Outlook", "Share", "Way", "allot"]

RESERVE = 1.3
"""What is planned stays this much below the variance that is allowed: the outlook is from a few samples."""
_STEPS = 80


@dataclass(frozen=True)
class Way:
    """A way to the Gauss-Newton part of a chunk."""

    alone: int
    """Columns pulled back by themselves; all of them: the exact trace."""
    groups: int
    """Of the others;"""
    draws: int
    """of signs for these."""

    @property
    def cotangents(self) -> int:
        """A sample."""
        return self.alone + self.groups * self.draws


@dataclass(frozen=True)
class Outlook:
    """What is expected of a chunk: variances as they will be stated, by what is done."""

    samples: int
    sketches: Mapping[Way, float]
    """Of the Gauss-Newton part."""
    probe: float
    """Of one probe of the residual, from the probes' own spread (two probes at least);"""
    single: float
    """that of a single one, from its spread over the samples."""


@dataclass(frozen=True)
class Share:
    """What is done on a chunk."""

    way: Way
    probes: int


def allot(chunks: Sequence[Outlook], allowed: float, probe_cost: float, most: int) -> list[Share] | None:
    """The cheapest shares whose variances add up to ``allowed``, with a reserve; ``None`` where there are none.

    Cost is counted in cotangents of a sample; one multiplier for all chunks weighs variance against cost (samples
    are independent, so variances add).

    Args:
        chunks: what is expected of each.
        allowed: variance of the sum.
        probe_cost: of a probe, in cotangents.
        most: probes a chunk.
    """
    scale = sum(max(c.probe, c.single, *c.sketches.values()) for c in chunks)
    if not allowed > 0 or not math.isfinite(scale):
        return None
    samples = sum(c.samples for c in chunks)
    low, high = samples / max(scale, allowed), 1e3 * most * samples / allowed
    if not high > low:
        return None
    best: tuple[float, list[Share]] | None = None
    for step in range(_STEPS + 1):
        weight = low * (high / low) ** (step / _STEPS)
        shares = [_cheapest(c, weight, probe_cost, most) for c in chunks]
        cost = sum(c for c, _, _ in shares)
        if RESERVE * sum(v for _, v, _ in shares) <= allowed and (best is None or cost < best[0]):
            best = cost, [s for _, _, s in shares]
    return None if best is None else best[1]


def _cheapest(chunk: Outlook, weight: float, probe_cost: float, most: int) -> tuple[float, float, Share]:
    """Cost, variance and share that make cost + weight · variance smallest."""

    def total(choice: tuple[float, float, int]) -> float:
        return choice[0] + weight * choice[1]

    way, seen = min(
        chunk.sketches.items(), key=lambda item: chunk.samples * item[0].cotangents + weight * item[1]
    )
    a_probe = chunk.samples * probe_cost
    ideal = (weight * chunk.probe / a_probe) ** 0.5
    counts = {min(most, max(2, k)) for k in (math.floor(min(ideal, most)), math.ceil(min(ideal, most)))}
    choices = [(a_probe * k, chunk.probe / k, k) for k in sorted(counts)]
    if chunk.samples > 3:
        choices.append((a_probe, chunk.single, 1))
    cost, variance, probes = min(choices, key=total)
    return cost + chunk.samples * way.cotangents, variance + seen, Share(way, probes)
